"""Which facts are asked: chosen when the Snakefile is parsed, read again by every job that needs them.

Files that ship with the workflow, or are fetched at a pinned commit, are known by their contents (sha256): where they
lie differs from clone to clone. A user's own files are known by the path in the configuration.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moescope import files, relations

LRE_FOLDER = "resources/lre"


@dataclass(frozen=True)
class Facts:
    """The chosen relations by name; ``inputs`` are the user's files, ``shipped`` maps ours below the root to sha256."""

    names: tuple[str, ...]
    seed: int
    inputs: tuple[str, ...]
    shipped: dict[str, str]

    @property
    def cfg(self) -> dict:
        """What a job that reads the facts is told, as plain values."""
        return {"names": list(self.names), "seed": self.seed, "files": self.shipped}


def choose(wanted: dict, root: str | os.PathLike) -> Facts:
    """The facts that ``relations`` of the configuration asks for; ``root`` is the folder of the Snakefile.

    Raises RelationError on a missing or malformed file, an unknown relation, and if no prompt is left. Files of the
    published set need not be there yet.
    """
    source, names, seed, root = wanted["source"], wanted["names"], wanted["seed"], Path(root)
    paths = relations.files_of(source, root)
    known = relations.names(paths)
    if names != "all":
        relations.check_names(names, known)
    chosen = tuple(name for name in known if names == "all" or name in names)
    paths = [path for path in paths if path.suffix.lower() == ".csv" or path.stem in chosen]
    if source == "lre":
        hashes = dict(zip(relations.lre_files(LRE_FOLDER), relations.LRE_SHA256.values(), strict=True))
        shipped = {path.as_posix(): sha256 for path, sha256 in hashes.items() if path.stem in chosen}
        return Facts(chosen, seed, (), shipped)
    relations.prompts(relations.select(relations.load(paths), chosen), seed)
    if source == "embedded":
        return Facts(chosen, seed, (), {path.relative_to(root).as_posix(): files.sha256(path) for path in paths})
    return Facts(chosen, seed, tuple(map(str, paths)), {})


def read(cfg: dict, inputs: Sequence[str], root: str | os.PathLike) -> list[relations.Relation]:
    """The relations that a job is told to use (``Facts.cfg``, its input files), fetched first where they must be."""
    if any(path.startswith(LRE_FOLDER) for path in cfg["files"]):
        relations.fetch_lre(Path(root) / LRE_FOLDER)
    return relations.select(relations.load([Path(root) / path for path in cfg["files"]] or inputs), cfg["names"])
