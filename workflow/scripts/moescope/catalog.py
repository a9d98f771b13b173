"""Catalogs: which branches of a hub repository are training steps, listed once and kept as a table.

A catalog is a TSV file (step, tokens_b, revision, commit, bytes), one row a branch; step and tokens (billions) are what
the branch's name says. Beside it lies the model's configuration. The names of the published series ship with the
workflow; ``make catalog`` writes fresh ones with commits and sizes. What a branch really holds, its manifest says.

Read while the workflow is parsed: the standard library only.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from moescope import files
from moescope.errors import MoescopeError

FOLDER = "results/catalogs"
COLUMNS = ("step", "tokens_b", "revision", "commit", "bytes")
#: Names of training steps: OLMoE and OLMo (step5000-tokens20B), OLMo-2 (stage1-step1000-tokens5B,
#: stage2-ingredient1-step1000-tokens3B), Pythia (step512).
PATTERN = r"(?:(?P<stage>stage\d+(?:-ingredient\d+)?)-)?step(?P<step>\d+)(?:-tokens(?P<tokens_b>\d+)B)?"
_EARLY = (*range(10_000, 70_001, 10_000), *range(100_000, 500_001, 100_000))
#: The steps that the paper of study dynamics reports, by repository. Its last step of OLMo-7B is 600,000, which that
#: series has not: it ends at 557,000, which stands for it under its own number.
PAPER = {
    "allenai/OLMoE-1B-7B-0924": (*_EARLY, *range(600_000, 1_200_001, 100_000)),
    "allenai/OLMo-7B-hf": (*_EARLY, 557_000),
}
#: What the report has to say where a step stands for another.
_STANDS_FOR = {
    (
        "allenai/OLMo-7B-hf",
        557_000,
    ): "The paper quotes step 600,000 of OLMo-7B, which this series has not: its last step, "
    "557,000, stands for it, under its own number.",
}


class CatalogError(MoescopeError):
    """A catalog that is not there, cannot be read, or holds no series."""


@dataclass(frozen=True)
class Revision:
    """A branch that is a training step; ``tokens_b`` in billions, ``commit`` and ``bytes`` of the weights where
    known."""

    step: int
    revision: str
    tokens_b: int | None = None
    commit: str | None = None
    bytes: int | None = None

    @property
    def tokens(self) -> int | None:
        """Tokens seen in training, as the name rounds them."""
        return None if self.tokens_b is None else self.tokens_b * 10**9


def file_name(repo: str, suffix: str = ".tsv") -> str:
    """The name of a repository's catalog."""
    return repo.replace("/", "--") + suffix


def path_of(repo: str, root: str | Path, suffix: str = ".tsv") -> Path:
    """The catalog of a repository: one listed here (in the working directory) before the one that ships with ``root``.
    ``suffix`` .json: what is kept beside it of the model's configuration."""
    name = file_name(repo, suffix)
    for path in (Path(FOLDER) / name, Path(root) / "resources" / "catalogs" / name):
        if path.is_file():
            return path
    raise CatalogError(f"{repo} has no catalog; run: make catalog ARGS={repo}")


def model(repo: str, root: str | Path) -> dict:
    """The configuration of a repository's model, as its catalog keeps it (the text part of a multimodal one)."""
    path = path_of(repo, root, ".json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config.get("text_config") or config
    except (OSError, ValueError, AttributeError) as error:
        raise CatalogError(f"{path}: cannot be read ({error}); run: make catalog") from error


def single(repo: str, revision: str, root: str | Path) -> Revision:
    """A branch, tag or commit by its name, whether the catalog knows it or not; its step is none."""
    with contextlib.suppress(CatalogError):
        for row in read(path_of(repo, root)):
            if row["revision"] == revision:
                return Revision(0, revision, None, row["commit"] or None, _number(row["bytes"]))
    return Revision(0, revision)


def series(repo: str, root: str | Path, stage: str | None = None, pattern: str | None = None) -> dict[int, Revision]:
    """The training steps of a repository by step, ascending.

    ``stage`` picks one where names carry several; ``pattern``, a regular expression with a group ``step`` (and, if
    wanted, ``tokens_b``), stands for the known forms of names. Raises CatalogError where there is no catalog, no such
    step, or a step with two branches.
    """
    path = path_of(repo, root)
    rows = read(path)
    found = [revision for row in rows if (revision := _parsed(row, stage, pattern))]
    if not found:
        stages = sorted({m["stage"] for row in rows if (m := re.fullmatch(PATTERN, row["revision"])) and m["stage"]})
        if stages and not pattern:
            raise CatalogError(f"{repo} has the stages {', '.join(stages)}; name one in stage, a series each")
        cure = "correct pattern" if pattern else "write pattern, or revision for a single one"
        raise CatalogError(f"{path}: no branch of {repo} is a training step by its name; {cure}")
    count = Counter(revision.step for revision in found)
    if twice := [r for r in found if count[r.step] > 1]:
        names = " and ".join(r.revision for r in twice if r.step == twice[0].step)
        raise CatalogError(f"{path}: {names} are both step {twice[0].step}; write a narrower pattern")
    return {revision.step: revision for revision in sorted(found, key=lambda r: r.step)}


def remarks(repo: str | None, steps: Iterable[int | str]) -> list[str]:
    """What a reader has to know of the choice of these steps of a repository."""
    return [text for (name, step), text in _STANDS_FOR.items() if name == repo and step in set(steps)]


def _parsed(row: dict[str, str], stage: str | None, pattern: str | None) -> Revision | None:
    match = re.fullmatch(pattern or PATTERN, row["revision"])
    groups = match.groupdict() if match else {}
    if match is None or (not pattern and groups["stage"] != stage):
        return None
    step, tokens_b = groups["step"], groups.get("tokens_b") or row["tokens_b"]
    if not step or not (step + tokens_b).isdecimal():
        raise CatalogError(f"{row['revision']}: its step or its tokens are no whole numbers; correct pattern")
    return Revision(int(step), row["revision"], _number(tokens_b), row["commit"] or None, _number(row["bytes"]))


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def named(revision: str) -> tuple[int | None, int | None]:
    """(step, tokens in billions) that the name of a branch gives, by the known forms."""
    match = re.fullmatch(PATTERN, revision)
    return (_number(match["step"]), _number(match["tokens_b"])) if match else (None, None)


def gaps(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring steps further apart than the spacing that most of a series has; none where there is no such."""
    spacing = [later - earlier for earlier, later in pairwise(steps)]
    if not spacing:
        return []
    usual, times = Counter(spacing).most_common(1)[0]
    wide = [pair for pair, distance in zip(pairwise(steps), spacing, strict=True) if distance > usual]
    return wide if 2 * times > len(spacing) else []


def read(path: str | Path) -> list[dict[str, str]]:
    """The rows of a catalog; missing columns are empty. Raises CatalogError where it is none."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CatalogError(f"{path}: cannot be read ({error}); run: make catalog") from error
    for number, row in enumerate(rows, start=2):
        numbers = [row.get(name) or "0" for name in ("step", "tokens_b", "bytes")]
        if not row.get("revision") or None in row or not all(n.isdecimal() for n in numbers):
            raise CatalogError(f"{path}: line {number} is no row of a catalog; run: make catalog")
    return [{name: row.get(name) or "" for name in COLUMNS} for row in rows]


def write(rows: Iterable[dict[str, object]], path: str | Path) -> None:
    """Write a catalog, whole, by step and name; a branch without a step stands last."""

    def order(row: dict) -> tuple:
        step = row.get("step")
        return (step is None, step or 0, row["revision"])

    with files.atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(sorted(rows, key=order))
