"""Relation sets: facts and templates read from files, the prompts made of them, and the groups of their subjects.

A relation is a JSON file in the schema of the LRE data set (``<category>/<relation>.json``) or the rows of a CSV file
that share a name. Only the standard library is imported here, because the Snakefile reads relations while it parses.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import http.client
import io
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moescope import files
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    import polars as pl

logger = logging.getLogger(__name__)

#: Subjects are split into this many fixed groups; groups 0-4 are fold 0, groups 5-9 are fold 1.
GROUPS = 10
#: Neighbours in the order of subjects fall into different folds, so that two subjects of a kind are enough for both.
_GROUP_OF_INDEX = tuple(fold * GROUPS // 2 + place for place in range(GROUPS // 2) for fold in (0, 1))

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_CSV_REQUIRED = ("relation", "subject", "object", "template")
_CSV_COLUMNS = (*_CSV_REQUIRED, "category")

#: The published relation files: github.com/evandez/relations (MIT), at the one commit that results refer to.
LRE_COMMIT = "1b9ec3cf2b8368e42bde7e80fcef384312a6ec07"
LRE_URL = f"https://raw.githubusercontent.com/evandez/relations/{LRE_COMMIT}"
LRE_SHA256 = {
    "data/bias/name_birthplace.json": "b796df239a577a6bf09d6ad6f1b537a72a7b1a483352090a1586a91f7712584e",
    "data/bias/name_religion.json": "49552370e79d2ea17ce0c3e5335af42506ac09d6924618de96be20201b300aed",
    "data/bias/occupation_age.json": "cc06ab94193e2a0c0a4b0a343ae3b234487cb4893e0377078eee90e3d474f276",
    "data/bias/occupation_gender.json": "1b5e02c08ebfcd79225f3e89dd43c859c9e7026beaf5cfc1e5135e053eb10a2f",
    "data/commonsense/fruit_inside_color.json": "7986138d585ca5abea5b6821f94b749e17adb027db737618fa7ba44ff2b94c61",
    "data/commonsense/object_superclass.json": "e594c3288df3059638ae885d83f2934266bb1968932272c027786bf7b3c02678",
    "data/commonsense/work_location.json": "2438376757f35fc80e8925070e855c190f42693f04e6305266cdc2b76e9878c1",
    "data/factual/country_capital_city.json": "9945d2da1fa1145c1d7e59ac61a25ebee74299c00bd53fc9308167f9e1d44fc0",
    "data/factual/country_language.json": "0996525735107934f0d2e467e6fac7d2c785c42e8300ccb41ae6e9b5dfde2b76",
    "data/linguistic/adj_antonym.json": "bcfe2e8ed0cabe0650499a1aa64df908aed94898192efc112a0b082dc49b32dd",
    "data/linguistic/word_first_letter.json": "b084acead4479f7305891074f4b53fc8b21f0ad6d31e44c992b5a72d75f9d467",
    "data/linguistic/word_last_letter.json": "a9ffb875a35323fe6151ed132186057c5c060e461aa119dc41ef50dc52fe5068",
}
#: Seconds a server may stay silent, and the pauses before a file is asked for again when it is busy.
_TIMEOUT = 30.0
_PAUSES = (1.0, 3.0, 9.0)


class RelationError(MoescopeError):
    """A relation file, or what the configuration says of relations, is not as it must be."""


@dataclass(frozen=True)
class Fact:
    """A true pair; ``template`` is the row's own template where it has one (facts of a CSV file)."""

    subject: str
    object: str
    template: str | None = None


@dataclass(frozen=True)
class Relation:
    """A named set of facts with the templates (one ``{}`` each) that ask for their object; ``source`` is the file."""

    name: str
    category: str
    templates_zs: tuple[str, ...]
    templates: tuple[str, ...]
    facts: tuple[Fact, ...]
    source: str

    @property
    def template(self) -> str:
        """The scored template, of facts that bring none of their own."""
        return self.templates_zs[0]

    def template_of(self, fact: Fact) -> str:
        """The template in which a fact is scored: its own, else the relation's."""
        return fact.template or self.template

    @property
    def all_templates(self) -> tuple[str, ...]:
        """The distinct templates, zero-shot ones first."""
        return tuple(dict.fromkeys((*self.templates_zs, *self.templates)))


def fill(template: str, subject: str) -> str:
    """The template with the subject in its blank; braces in the subject stay as they are."""
    return template.replace("{}", subject)


# Where relations stand -----------------------------------------------------------------------------------------------


def files_of(source: str | os.PathLike, root: str | os.PathLike) -> list[Path]:
    """The files of a relation source, sorted within a directory.

    source: ``embedded`` (resources/relations below root), ``lre`` (the pinned files below root/resources/lre, which
    need not be there yet), a directory (``data/<category>/<relation>.json``, else ``<category>/<relation>.json`` and
    ``<relation>.json``) or a CSV file. root: the folder of the Snakefile. Raises RelationError if nothing is there.
    """
    if str(source) == "lre":
        return lre_files(Path(root) / "resources" / "lre")
    path = Path(root) / "resources" / "relations" if str(source) == "embedded" else Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".csv":
        return [path]
    if not path.is_dir():
        problem = "neither a directory nor a .csv file" if path.exists() else "no such file or directory"
        raise RelationError(f"relations: {path}: {problem}; the source is embedded, lre, a directory or a .csv file")
    found = _visible(path, "data/*/*.json") or [*_visible(path, "*/*.json"), *_visible(path, "*.json")]
    if not found:
        raise RelationError(f"relations: {path}: no relation files; put them there as <category>/<relation>.json")
    return sorted(found)


def _visible(folder: Path, pattern: str) -> list[Path]:
    """The matches that are not hidden, which half-written files and tool folders are."""
    return [p for p in folder.glob(pattern) if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def names(paths: Iterable[str | os.PathLike]) -> list[str]:
    """Names of the relations in the files; JSON files need not exist yet, as they are named after their relation."""
    found: list[str] = []
    for path in map(Path, paths):
        found += [relation.name for relation in _read_csv(path)] if _is_csv(path) else [path.stem]
    return found


def check_names(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raises RelationError at the first wanted relation that is not known, with the names nearest to it."""
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise RelationError(f"relations: {name}: no such relation; {hint}known are {', '.join(known)}")


def select(relations: Sequence[Relation], wanted: Sequence[str] | str | None = None) -> list[Relation]:
    """The wanted relations, in the order of the files; None or ``all`` for all. Raises RelationError as check_names."""
    if wanted is None or wanted == "all":
        return list(relations)
    check_names(wanted, [relation.name for relation in relations])
    return [relation for relation in relations if relation.name in wanted]


# Reading them --------------------------------------------------------------------------------------------------------


def load(paths: str | os.PathLike | Iterable[str | os.PathLike], pinned: bool = False) -> list[Relation]:
    """The relations of a JSON or CSV file, or of several, in order; ``pinned``: they must be the published LRE files.

    A fact that repeats is kept and warned about. Raises RelationError (file, entry, cure) on anything malformed and on
    two relations of one name.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if pinned:
        verify_lre(paths)
    relations: dict[str, Relation] = {}
    for path in paths:
        for relation in _read_csv(path) if _is_csv(path) else [_read_json(path)]:
            if other := relations.get(relation.name):
                raise RelationError(f"{path}: relation {relation.name} stands in {other.source} too; rename one")
            relations[relation.name] = relation
    return list(relations.values())


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _read_json(path: Path) -> Relation:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RelationError(f"{path}: not valid JSON at {where} ({error.msg}); correct it there") from None
    if not isinstance(data, dict):
        raise RelationError(f"{path}: the file must hold one JSON object with prompt_templates_zs and samples")
    properties = _typed(path, data, "properties", dict) if "properties" in data else {}
    category = properties.get("relation_type", path.resolve().parent.name)
    facts = []
    for row, sample in enumerate(_typed(path, data, "samples", list)):
        if not isinstance(sample, dict):
            raise RelationError(f"{path}: samples[{row}] must be an object with subject and object")
        facts.append(Fact(*(_phrase(path, f"samples[{row}].{key}", sample.get(key)) for key in ("subject", "object"))))
    if not facts:
        raise RelationError(f"{path}: samples is empty; add a fact or remove the file")
    templates_zs = _templates(path, data, "prompt_templates_zs")
    if not templates_zs:
        raise RelationError(f"{path}: prompt_templates_zs is empty; add the template that is to be scored")
    _warn_of_duplicates(path, {f"samples[{row}]": fact for row, fact in enumerate(facts)})
    return Relation(
        name=_name(path, "the name of the file", path.stem),
        category=_phrase(path, "properties.relation_type", category),
        templates_zs=templates_zs,
        templates=_templates(path, data, "prompt_templates") if "prompt_templates" in data else (),
        facts=tuple(facts),
        source=str(path),
    )


def _read_csv(path: Path) -> list[Relation]:
    """The relations of a CSV file: header relation, subject, object, template and, optional, category; any order."""
    try:
        lines = list(csv.reader(io.StringIO(_read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise RelationError(f"{path}: not valid CSV ({error}); correct it or save the table again as CSV") from None
    header = lines[0] if lines else []
    if missing := [column for column in _CSV_REQUIRED if column not in header]:
        raise RelationError(f"{path}: row 1: column {missing[0]} is missing; the header is {','.join(_CSV_COLUMNS)}")
    if wrong := [c for i, c in enumerate(header) if c not in _CSV_COLUMNS or c in header[:i]]:
        raise RelationError(f"{path}: row 1: column {wrong[0]!r} is unknown or repeats; remove it")
    facts: dict[str, dict[str, Fact]] = defaultdict(dict)
    categories: dict[str, str] = {}
    for number, fields in enumerate(lines[1:], start=2):
        if not any(fields):
            continue
        entry = f"row {number}"
        if len(fields) != len(header):
            cure = "put a field that holds a comma in double quotes"
            raise RelationError(f"{path}: {entry} has {len(fields)} fields, the header {len(header)}; {cure}")
        values = dict(zip(header, fields, strict=True))
        name = _name(path, f"{entry}: relation", values["relation"])
        category = _phrase(path, f"{entry}: category", values.get("category") or "user")
        if categories.setdefault(name, category) != category:
            problem = f"relation {name} is in category {categories[name]} above and in {category} here"
            raise RelationError(f"{path}: {entry}: {problem}; give it one category")
        subject, right = (_phrase(path, f"{entry}: {key}", values[key]) for key in ("subject", "object"))
        facts[name][entry] = Fact(subject, right, _template(path, f"{entry}: template", values["template"]))
    if not facts:
        raise RelationError(f"{path}: no facts below the header; add a row")
    relations = []
    for name, rows in facts.items():
        _warn_of_duplicates(path, rows)
        templates = tuple(dict.fromkeys(fact.template for fact in rows.values()))
        relations.append(Relation(name, categories[name], templates, (), tuple(rows.values()), str(path)))
    return relations


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RelationError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise RelationError(f"{path}: {error.strerror or error}; check the path and its permissions") from None


def _typed(path: Path, data: Mapping, key: str, kind: type) -> list | dict:
    if key not in data:
        raise RelationError(f"{path}: {key} is missing; add it")
    if not isinstance(data[key], kind):
        raise RelationError(f"{path}: {key} must be a JSON {'array' if kind is list else 'object'}")
    return data[key]


def _name(path: Path, entry: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        cure = "start with a letter, then use letters, digits, _ . and -"
        raise RelationError(f"{path}: {entry} is {name!r}, which cannot name a relation; {cure}")
    return name


def _phrase(path: Path, entry: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RelationError(f"{path}: {entry} must be a text that is not empty; fill it in or remove the row")
    if value != value.strip():
        raise RelationError(f"{path}: {entry} is {value!r}; remove the blanks around it")
    return value


def _template(path: Path, entry: str, value: object) -> str:
    template = _phrase(path, entry, value)
    if template.count("{}") != 1:
        raise RelationError(f"{path}: {entry} is {template!r}; write {{}} exactly once, where the subject goes")
    return template


def _templates(path: Path, data: Mapping, key: str) -> tuple[str, ...]:
    return tuple(_template(path, f"{key}[{i}]", value) for i, value in enumerate(_typed(path, data, key, list)))


def _warn_of_duplicates(path: Path, facts: Mapping[str, Fact]) -> None:
    first: dict[Fact, str] = {}
    for entry, fact in facts.items():
        if (earlier := first.setdefault(fact, entry)) != entry:
            logger.warning("%s: %s repeats %s (%s, %s); both are kept", path, entry, earlier, fact.subject, fact.object)


# Prompts and groups of subjects --------------------------------------------------------------------------------------


def subject_groups(relations: Iterable[Relation], seed: int = 0) -> dict[str, int]:
    """The group (0-9) of every subject: the unit of the jackknife and of the two folds (groups 0-4 and 5-9).

    Subjects are ordered by the relations they occur in, then by a seeded hash, and dealt out in turn, alternating
    between the folds. So group sizes differ by at most one, in every set of subjects with the same relations too, and
    neither the order of the rows nor the model plays a part.
    """
    occurs_in: dict[str, set[str]] = defaultdict(set)
    for relation in relations:
        for fact in relation.facts:
            occurs_in[fact.subject].add(relation.name)

    def order(subject: str) -> tuple[list[str], str]:
        return sorted(occurs_in[subject]), hashlib.sha256(f"{seed}:{subject}".encode()).hexdigest()

    return {subject: _GROUP_OF_INDEX[i % GROUPS] for i, subject in enumerate(sorted(occurs_in, key=order))}


def prompts(relations: Sequence[Relation], seed: int = 0) -> list[dict[str, str | int]]:
    """One row a fact, columns of the table ``prompts``. Raises RelationError if there is none."""
    groups = subject_groups(relations, seed)
    rows: list[dict[str, str | int]] = []
    for relation in relations:
        for number, fact in enumerate(relation.facts):
            template = relation.template_of(fact)
            rows.append(
                {
                    "prompt_id": f"{relation.name}/{number}",
                    "relation": relation.name,
                    "category": relation.category,
                    "subject": fact.subject,
                    "object": fact.object,
                    "template": template,
                    "text": fill(template, fact.subject),
                    "group": groups[fact.subject],
                }
            )
    if not rows:
        raise RelationError("relations: no prompts are left; name at least one relation that has facts")
    return rows


def prompt_table(relations: Sequence[Relation], seed: int = 0) -> pl.DataFrame:
    """The rows of ``prompts`` as a checked and sorted polars frame."""
    import polars as pl

    from moescope import tables

    return tables.check(pl.DataFrame(prompts(relations, seed)), "prompts")


# The published LRE files ---------------------------------------------------------------------------------------------


def lre_files(folder: str | os.PathLike) -> list[Path]:
    """Where the pinned LRE files stand, or will stand, below a folder."""
    return [Path(folder) / name for name in LRE_SHA256]


def verify_lre(paths: Iterable[str | os.PathLike]) -> None:
    """Raises RelationError unless every file (``.../data/<category>/<relation>.json``) is the published one."""
    for path in map(Path, paths):
        name = "/".join(path.parts[-3:])
        if name not in LRE_SHA256:
            raise RelationError(f"{path}: not one of the published LRE files; use its folder as the source instead")
        if not path.is_file():
            raise RelationError(f"{path}: the file is missing; {_by_hand(path.parents[2])}")
        if files.sha256(path) != LRE_SHA256[name]:
            cure = f"delete it so that it is fetched again, or {_by_hand(path.parents[2])}"
            raise RelationError(f"{path}: not the published file (its sha256 is another one); {cure}")


def fetch_lre(folder: str | os.PathLike, base_url: str | None = None) -> list[Path]:
    """Fill the folder with the published LRE files and return their paths; right files that stand there are kept.

    base_url: what ``/data/<category>/<relation>.json`` is appended to, an http(s) or file URL or a directory; by
    default the environment variable MOESCOPE_LRE_URL, else GitHub at the pinned commit. Every file is checked against
    its sha256 before it is put in place. Raises RelationError if one cannot be had or written, or is not the right one.
    """
    base = base_url or os.environ.get("MOESCOPE_LRE_URL") or LRE_URL
    if "://" not in base:
        base = Path(base).expanduser().resolve().as_uri()
    for name, path in zip(LRE_SHA256, lre_files(folder), strict=True):
        if not (path.is_file() and files.sha256(path) == LRE_SHA256[name]):
            _fetch(f"{base.rstrip('/')}/{name}", path, LRE_SHA256[name])
    return lre_files(folder)


def _by_hand(folder: Path) -> str:
    source = f"github.com/evandez/relations at {LRE_COMMIT[:12]}"
    return f"put the files of {source} into {folder} by hand, or name a mirror in MOESCOPE_LRE_URL"


def _fetch(url: str, path: Path, expected: str) -> None:
    folder = path.parents[2]
    try:
        content = _download(url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RelationError(f"{url}: cannot be fetched ({error}); {_by_hand(folder)}") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise RelationError(f"{url}: not the published file (its sha256 is another one); {_by_hand(folder)}")
    try:
        with files.atomic(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise RelationError(f"{path}: cannot be written ({error.strerror}); make {folder} writable") from None


def _download(url: str) -> bytes:
    """The bytes at a URL; asks again, after growing pauses, while the server is busy or silent."""
    for pause in _PAUSES:
        try:
            return _get(url)
        except (OSError, http.client.HTTPException) as error:
            if not _passing(error):
                raise
        time.sleep(pause)
    return _get(url)


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _passing(error: Exception) -> bool:
    """Whether the failure may be gone in a moment: a busy server, a timeout, a connection that broke off."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code == 429 or error.code >= 500
    cause = getattr(error, "reason", error)
    return isinstance(cause, TimeoutError | ConnectionResetError | http.client.IncompleteRead)
