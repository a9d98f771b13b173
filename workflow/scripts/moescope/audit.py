"""Can a series be trusted? What its manifests say of one another, before any weights are fetched, and its models after.

Branches of published series have been found to serve the weights of other steps, or of other models. Measured unseen,
that reads as perfect stability.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moescope import layout, manifests
from moescope.errors import MoescopeError
from moescope.steps import step_name


class AuditError(MoescopeError):
    """A series whose checkpoints contradict one another."""


def audit(
    entries: Sequence[Mapping[str, Any]],
    commits: Mapping[str, str],
    gaps: Sequence[Sequence[int]] = (),
    remarks: Sequence[str] = (),
    allow_duplicates: bool = False,
) -> dict:
    """What is to be known of a series, from the manifests of its checkpoints in the order of their steps:
    ``duplicates`` (steps with the same weights), ``gaps``, ``remarks``.

    ``commits``: what the catalog says now, by revision. Raises AuditError where two steps have the same weights, unless
    that is allowed, where a revision has moved since its manifest was made, and where shape or tokenizer change within
    the series.
    """
    for entry in entries:
        _require_unmoved(entry, commits)
    _require_same(entries, "shape", lambda entry: entry["shape"])
    for name, kind in itertools.product(layout.VOCABULARY_FILES, ("sha256", "git_sha1")):  # large files leave git
        having = [entry for entry in entries if kind in entry["files"].get(name, ())]
        _require_same(having, f"tokenizer ({name})", lambda entry, of=(name, kind): entry["files"][of[0]][of[1]])
    duplicates = duplicated(entries, [_weights(entry) for entry in entries], allow_duplicates)
    return {
        "series": entries[0]["series"],
        "steps": [step_name(entry["step"]) for entry in entries],
        "duplicates": duplicates,
        "gaps": [list(pair) for pair in gaps],
        "remarks": list(remarks),
    }


def duplicated(entries: Sequence[Mapping[str, Any]], prints: Sequence[Any], allow_duplicates: bool) -> list[list[str]]:
    """Groups of steps whose weights have the same print (hashes of their files, or ``loading.fingerprint``), in the
    order of the manifests. Raises AuditError where there are any, unless that is allowed."""
    groups: dict[str, list[str]] = {}
    for entry, found in zip(entries, prints, strict=True):
        groups.setdefault(repr(found), []).append(step_name(entry["step"]))
    several = [steps for steps in groups.values() if len(steps) > 1]
    if several and not allow_duplicates:
        raise AuditError(_told(entries[0]["series"], several[0]))
    return several


def require_apart(
    entry: Mapping[str, Any], own: Mapping[str, Any], others: Iterable[Mapping[str, Any]], allow_duplicates: bool
) -> list[str]:
    """The steps of a series whose models turned out to be that of a checkpoint, however they are stored, when they
    were loaded. ``own`` and ``others``: what was found of each (``step``, ``fingerprint``, ``prompts``, ``tokens``).

    Raises AuditError where there are any, unless that is allowed, and where the prompts became other tokens.
    """
    others = [other for other in others if other["step"] != own["step"]]
    asked_alike = [other for other in others if other["prompts"] == own["prompts"]]  # no former facts
    if strange := next((other["step"] for other in asked_alike if other["tokens"] != own["tokens"]), None):
        raise AuditError(
            f"{entry['series']}: the tokenizer of step {own['step']} makes other tokens of the prompts than that of "
            f"step {strange}; one of them is another model, leave it out"
        )
    same = [other["step"] for other in others if other["fingerprint"] == own["fingerprint"]]
    if same and not allow_duplicates:
        raise AuditError(_told(entry["series"], [*same, own["step"]]))
    return same


def _told(series: str, steps: Sequence[str]) -> str:
    return (
        f"{series}: steps {' and '.join(steps)} have the same weights, so at least one is not what its name says; "
        "leave one out, or write allow_duplicates: true to keep them, marked"
    )


def _weights(entry: Mapping[str, Any]) -> list[str]:
    """The hashes of the weight files of a manifest, whatever these are called."""
    return sorted(manifests.hashes(entry, manifests.weights(entry)).values())


def _require_unmoved(entry: Mapping[str, Any], commits: Mapping[str, str]) -> None:
    now = commits.get(entry["revision"])
    if now and entry["commit"] and now != entry["commit"]:
        place = f"results/{entry['series']}/{step_name(entry['step'])}"
        raise AuditError(
            f"{entry['series']}: {entry['revision']} was commit {entry['commit'][:12]} when it was listed and is "
            f"{now[:12]} in the catalog; run make catalog, and if they still differ delete {place} to score it anew"
        )


def _require_same(entries: Iterable[Mapping[str, Any]], what: str, of: Any) -> None:
    first = None
    for entry in entries:
        first = first or entry
        if of(entry) != of(first):
            mine, other = step_name(entry["step"]), step_name(first["step"])
            raise AuditError(
                f"{entry['series']}: the {what} of step {mine} is not that of step {other}; one of them is another "
                "model, leave it out"
            )
