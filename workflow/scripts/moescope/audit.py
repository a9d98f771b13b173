"""Can a series be trusted? What its manifests say of one another, before any weights are fetched, and its models after.

Branches of published series have been found to serve the weights of other steps, or of other models. Measured unseen,
that reads as perfect stability.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moescope import layout, manifests
from moescope.errors import MoescopeError


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
    for name in layout.VOCABULARY_FILES:
        having = [entry for entry in entries if name in entry["files"]]
        _require_same(having, f"tokenizer ({name})", lambda entry, name=name: manifests.hashes(entry, [name]))
    duplicates = duplicated(entries, [_weights(entry) for entry in entries], allow_duplicates)
    return {
        "series": entries[0]["series"],
        "checkpoints": len(entries),
        "duplicates": duplicates,
        "gaps": [list(pair) for pair in gaps],
        "remarks": list(remarks),
    }


def duplicated(entries: Sequence[Mapping[str, Any]], prints: Sequence[Any], allow_duplicates: bool) -> list[list[str]]:
    """Groups of steps whose weights have the same print (hashes of their files, or ``loading.fingerprint``), in the
    order of the manifests. Raises AuditError where there are any, unless that is allowed."""
    groups: dict[str, list[str]] = {}
    for entry, found in zip(entries, prints, strict=True):
        groups.setdefault(repr(found), []).append(_name(entry))
    several = [steps for steps in groups.values() if len(steps) > 1]
    if several and not allow_duplicates:
        raise AuditError(
            f"{entries[0]['series']}: steps {' and '.join(several[0])} have the same weights, so at least one is not "
            "what its name says; leave one out, or write allow_duplicates: true to keep them, marked"
        )
    return several


def same_weights(entry: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> list[str]:
    """The other steps of a series whose files hold the weights of a checkpoint: what marks its results."""
    own = _weights(entry)
    return [_name(other) for other in others if other["step"] != entry["step"] and _weights(other) == own]


def _weights(entry: Mapping[str, Any]) -> list[str]:
    """The hashes of the weight files of a manifest, whatever these are called."""
    return sorted(manifests.hashes(entry, manifests.weights(entry)).values())


def _name(entry: Mapping[str, Any]) -> str:
    return "main" if entry["step"] is None else str(entry["step"])


def _require_unmoved(entry: Mapping[str, Any], commits: Mapping[str, str]) -> None:
    now = commits.get(entry["revision"])
    if now and entry["commit"] and now != entry["commit"]:
        place = f"results/{entry['series']}/{_name(entry)}"
        raise AuditError(
            f"{entry['series']}: {entry['revision']} was commit {entry['commit'][:12]} when it was listed and is "
            f"{now[:12]} in the catalog; delete {place} to score it anew"
        )


def _require_same(entries: Iterable[Mapping[str, Any]], what: str, of: Any) -> None:
    first = None
    for entry in entries:
        first = first or entry
        if of(entry) != of(first):
            raise AuditError(
                f"{entry['series']}: the {what} of step {_name(entry)} is not that of step {_name(first)}; "
                "one of them is another model, leave it out"
            )
