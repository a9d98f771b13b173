"""Which experts are blocked, and which stand in for them as controls. Tables in, sets out; no torch.

The leading experts of a relation (``expert_importance``) are blocked in its own prompts: those found on all of them
(optimistic, as published), and, fold by fold, those found on the other fold. Random controls are of equal size, the
same for all relations. Matched controls are of equal size and layer, and nearest in how often they are chosen over all
positions of the prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from moescope.expert_importance import METHODS
from moescope.selection import FOLDS, SelectionError, nearest

logger = logging.getLogger(__name__)

#: How many of the leading experts are blocked.
SIZES = (1, 5, 10)

Expert = tuple[int, int]
#: A relation and the fold that its prompts belong to: what an expert set can be chosen by.
Part = tuple[str, int]


@dataclass
class Blocked:
    """Sets of (layer, expert), by the part of the prompts that each is blocked in; the rest names it in
    ``expert_interventions``. ``folds``: whether sets were found on the other fold."""

    size: int
    control: str
    folds: bool
    seed: int | None
    sets: dict[Part, tuple[Expert, ...]] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The first layer in which anything is blocked."""
        return min(layer for experts in self.sets.values() for layer, _ in experts)


def parts(prompts: pl.DataFrame) -> tuple[list[Part], np.ndarray]:
    """The parts of a ``prompts`` table, and the number of the part of every prompt [P]."""
    fold_of = {group: fold for fold, groups in FOLDS.items() for group in groups}
    of_prompt = list(zip(prompts["relation"], prompts["group"].replace_strict(fold_of), strict=True))
    names = sorted(set(of_prompt))
    place = {name: i for i, name in enumerate(names)}
    return names, np.array([place[name] for name in of_prompt])


def plan(
    importance: pl.DataFrame,
    method: str,
    parts: Sequence[Part],
    hits: Mapping[int, np.ndarray],
    seeds: int = 5,
    seed: int = 0,
) -> tuple[list[Blocked], list[str]]:
    """Everything that is blocked in one checkpoint, and lines on what could not be had.

    ``importance``: table ``expert_importance``; ``method``: whose leading experts; ``hits``: by layer that routes,
    [parts, E], how many slots of all positions of the prompts of a part go to an expert. ``seeds``: controls of each
    kind. A relation with fewer leading experts than a size has all of them blocked; one without any on a fold is not
    cross-fitted at all. Random sets depend on ``seed`` alone. Raises SelectionError where there is no such method.
    """
    if method not in METHODS:
        raise SelectionError(f"{method}: experts lead by {', '.join(METHODS)}; name one of them")
    leading = _leading(importance.filter(pl.col("method") == method))
    halved = sorted({part[0] for part in parts if part not in leading})
    found, left_out = [], [f"{name}, cross-fitted blocking: no expert leads on one of the folds" for name in halved]
    for size in SIZES:
        inside = {part: chosen[:size] for part in parts if (chosen := leading.get((part[0], None)))}
        crossed = {part: chosen[:size] for part in parts if part[0] not in halved and (chosen := leading.get(part))}
        found += [Blocked(size, "none", False, None, inside), Blocked(size, "none", True, None, crossed)]
        found += (
            Blocked(size, "random", False, k, _of_sizes(_random(hits, size, seed, k), inside, parts))
            for k in range(seeds)
        )
        matched, missing = _all_matched(crossed, list(parts), hits, seeds, seed)
        found += (Blocked(size, "matched", True, k, sets) for k, sets in enumerate(matched))
        left_out += (f"{name}: top {size}, matched control: too few other experts in a layer" for name in missing)
    return [one for one in found if one.sets], left_out


def _leading(importance: pl.DataFrame) -> dict[tuple[str, int | None], tuple[Expert, ...]]:
    """The leading experts by relation and the fold that they are tested in (None: all prompts)."""
    groups = importance.sort("rank").group_by("relation", "fold", maintain_order=True).agg("layer", "expert")
    return {(name, fold): tuple(zip(*pairs, strict=True)) for name, fold, *pairs in groups.rows()}


def _of_sizes(
    drawn: Sequence[Expert], inside: Mapping[Part, Sequence[Expert]], parts: Sequence[Part]
) -> dict[Part, tuple[Expert, ...]]:
    """The first of the experts drawn, as many as are blocked in a part (all, where none leads there)."""
    return {part: tuple(drawn[: len(inside.get(part, drawn))]) for part in parts}


def _random(hits: Mapping[int, np.ndarray], size: int, seed: int, number: int) -> tuple[Expert, ...]:
    """Experts in the order in which they are drawn."""
    everyone = [(layer, expert) for layer in sorted(hits) for expert in range(hits[layer].shape[1])]
    chosen = np.random.default_rng([seed, size, number]).choice(len(everyone), min(size, len(everyone)), replace=False)
    return tuple(everyone[i] for i in chosen)


def _all_matched(
    crossed: Mapping[Part, Sequence[Expert]],
    parts: list[Part],
    hits: Mapping[int, np.ndarray],
    seeds: int,
    seed: int,
) -> tuple[list[dict[Part, tuple[Expert, ...]]], list[str]]:
    """Matched controls [seeds] of the parts; all of a relation or none, since a control of some prompts compares with
    no selection. And the relations without."""
    found: list[dict[Part, tuple[Expert, ...]]] = [{} for _ in range(seeds)]
    missing = {name for (name, fold), chosen in crossed.items() if not _has_others(chosen, hits)}  # of either fold
    for part, chosen in crossed.items():
        for k in range(seeds if part[0] not in missing else 0):
            random = np.random.default_rng([seed, len(chosen), parts.index(part), k])
            found[k][part] = matched(chosen, {layer: of[parts.index(part)] for layer, of in hits.items()}, random)
    return found, sorted(missing)


def _has_others(chosen: Sequence[Expert], hits: Mapping[int, np.ndarray]) -> bool:
    layers = [layer for layer, _ in chosen]
    return all(2 * layers.count(layer) <= hits[layer].shape[1] for layer in set(layers))


def matched(
    chosen: Iterable[Expert], hits: Mapping[int, np.ndarray], random: np.random.Generator
) -> tuple[Expert, ...]:
    """As many experts outside a set, each of the same layer as one of it: at random one of the two that are nearest in
    ``hits`` [E] by layer, and not taken yet."""
    chosen = sorted(chosen)
    taken, found = set(chosen), []
    for layer, expert in chosen:
        others = np.array([e for e in range(len(hits[layer])) if (layer, e) not in taken])
        (other,) = nearest(others, np.abs(hits[layer][others] - hits[layer][expert]), 1, random)
        taken.add((layer, int(other)))
        found.append((layer, int(other)))
    return tuple(sorted(found))


def hits_ratio(plan: Iterable[Blocked], parts: Sequence[Part], hits: Mapping[int, np.ndarray]) -> dict[int, float]:
    """By size, how many (position, slot) go to the experts that are blocked fold by fold, for one that goes to their
    matched controls, in the parts that have both; sizes without such are left out."""
    sets: dict[int, dict[str, list[Blocked]]] = {}
    for one in plan:
        if one.folds:
            sets.setdefault(one.size, {}).setdefault(one.control, []).append(one)

    def total(one: Blocked, part: Part) -> int:
        return sum(int(hits[layer][parts.index(part), expert]) for layer, expert in one.sets[part])

    found = {}
    for size, of in sets.items():
        controls, (selection,) = of.get("matched", []), of["none"]
        both = controls[0].sets if controls else {}
        theirs = np.mean([sum(total(one, part) for part in both) for one in controls]) if both else 0
        if theirs:
            found[size] = sum(total(selection, part) for part in both) / float(theirs)
    return found
