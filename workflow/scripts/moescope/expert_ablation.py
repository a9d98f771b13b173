"""One loaded mixture of experts and the prompts -> what breaks when its routers have less to choose from.

Budgets leave some of the slots of all routers, at all layers and positions; blocking keeps the leading experts of every
relation out of its prompts. One pass over all prompts blocks the experts of every relation in the prompts of that
relation alone; what lies before the first layer that is changed is taken from one clean pass.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from moescope import interventions, tables
from moescope.clean import CleanRun
from moescope.decomposition import Decomposition
from moescope.errors import MoescopeError
from moescope.expert_sets import Blocked, Expert, Part
from moescope.interventions import BlockingError, InterventionError
from moescope.passes import Batch, During, Passes
from moescope.routing import Routing

MODES = get_args(interventions.Slots)
SEMANTICS = get_args(interventions.Blocking)
WEIGHTS = ("family", "keep")


class ExpertError(MoescopeError):
    """A model without routed experts where experts are asked about."""


class Interventions:
    """Collects the rows of ``expert_interventions``."""

    def __init__(self, run: CleanRun):
        self.prompts = run.prompts
        self.frames: list[pl.DataFrame] = []

    def add(self, log_prob: np.ndarray, rank: np.ndarray, asked: np.ndarray, **names: object) -> None:
        """Results [P] of the prompts named in a mask [P]; ``names``: those columns that say anything, one value or one
        for each of those prompts."""
        some = np.flatnonzero(asked)
        types = tables.SCHEMAS["expert_interventions"].columns
        found = {"prompt_id": self.prompts["prompt_id"].gather(some), "rank": rank[some], "log_prob": log_prob[some]}
        said = {"control": "none", **names}
        columns = {name: said.get(name) for name in types if name not in found}
        self.frames.append(
            pl.DataFrame(found).with_columns(
                value.cast(types[name]).alias(name)
                if isinstance(value, pl.Series)
                else pl.lit(value, types[name]).alias(name)
                for name, value in columns.items()
            )
        )

    def table(self) -> pl.DataFrame:
        """All of them, checked."""
        return tables.check(pl.concat(self.frames, how="diagonal"), "expert_interventions")


def require_experts(run: CleanRun) -> None:
    """Raises ExpertError where no layer routes."""
    if not run.decomposition.routed():
        raise ExpertError(f"{type(run.model).__name__}: no layer routes between experts; name a mixture of experts")


def add_clean(found: Interventions, run: CleanRun) -> None:
    """The run that nothing interferes with."""
    found.add(*run.answers(), np.ones(len(run.prompts), dtype=bool), experiment="clean")


# --- budgets


class Budget(NamedTuple):
    """Which slots of every router are left (``interventions.slots``), and whether shared experts are."""

    mode: str
    size: int
    weights: str
    shared: bool

    def kept(self, slots: int) -> frozenset[int]:
        """The ranks that are left, from 1."""
        ranks = range(1, slots + 1)
        left = {"top_n": range(1, self.size + 1), "only_rank": [self.size], "drop_rank": set(ranks) - {self.size}}
        return frozenset(left[self.mode])


def budgets(asked: Mapping[str, Sequence[int] | str], weights: Sequence[str], slots: int, shared: bool) -> list[Budget]:
    """All that are asked for of a model with so many slots; ``asked``: sizes by mode, or ``all``.

    Raises InterventionError where a size is more than the slots, a rank is none, or a mode is not known.
    """
    if unknown := [mode for mode in asked if mode not in MODES]:
        raise InterventionError(f"{unknown[0]}: budgets are {', '.join(MODES)}")
    found = []
    for mode, sizes in asked.items():
        least = 0 if mode == "top_n" else 1
        chosen = range(least, slots + 1) if sizes == "all" else sizes
        if wrong := [n for n in chosen if not least <= n <= slots]:
            raise InterventionError(f"{mode} {wrong[0]}: routers fill {slots} slots, counted from 1; ask for no other")
        found += [
            Budget(mode, n, w, s) for n in chosen for w in weights for s in ((True, False) if shared else (True,))
        ]
    return found


def add_budgets(found: Interventions, passes: Passes, asked: Sequence[Budget], progress: bool = False) -> None:
    """Every prompt under every budget. Budgets that leave the same run once."""
    decomposition = passes.clean.decomposition
    slots = slots_of(passes.clean)
    everyone, known = np.ones(len(passes.clean.prompts), dtype=bool), {}
    passes.start_at(min((_first(decomposition, budget.shared) for budget in asked), default=passes.layer))
    for budget in tqdm(asked, desc="budgets", unit="budget", disable=not progress):
        kept = budget.kept(slots)
        same_weights = not any(decomposition.normalises.values()) or len(kept) in (0, slots)
        key = kept, same_weights or budget.weights, budget.shared
        if key not in known:
            with contextlib.ExitStack() as restoring:
                restoring.enter_context(interventions.slots(decomposition, budget.mode, budget.size, budget.weights))
                if not budget.shared:
                    restoring.enter_context(interventions.without_shared(decomposition))
                known[key] = passes.run(everyone, passes.before.residual_out)
        found.add(*known[key], everyone, experiment="budget", **budget._asdict())


def slots_of(run: CleanRun) -> int:
    """How many slots every router fills: K. Raises ExpertError where layers differ in it."""
    filled = {run.trace.layers[site.layer].index.shape[1] for site in run.decomposition.routed()}
    if len(filled) > 1:
        raise ExpertError(
            f"{type(run.model).__name__}: layers route to {sorted(filled)} experts; budgets need one number"
        )
    return filled.pop()


def _first(decomposition: Decomposition, shared: bool) -> int:
    kinds = ("routed",) if shared else ("routed", "shared")
    return min(site.layer for site in decomposition.sites if site.kind in kinds)


# --- blocking


def hits(passes: Passes, clean: Mapping[int, Routing], times: Tensor) -> dict[int, np.ndarray]:
    """How many (position, slot) of the prompts of every label go to an expert, by layer: [labels, E]."""
    labels, counts = int(passes.label.max()) + 1, {}
    for layer, routing in clean.items():
        (site,) = passes.clean.decomposition.at(layer, "routed")
        found = torch.zeros(labels * site.experts, dtype=torch.long, device=times.device)
        place = passes.label[:, None] * site.experts + routing.index
        found.index_add_(0, place.flatten(), times[:, None].expand_as(place).flatten())
        counts[layer] = found.view(labels, -1).cpu().numpy()
    return counts


def add_blocking(
    found: Interventions,
    passes: Passes,
    plan: Sequence[Blocked],
    parts: Sequence[Part],
    semantics: Sequence[str],
    importance: str,
    progress: bool = False,
) -> list[str]:
    """Every set in the prompts of its parts, by all semantics. ``parts``: what the labels of the passes stand for;
    ``importance``: the method that the leading experts were found by. Returns lines on what could not be done."""
    left_out: list[str] = []
    for one in tqdm(sorted(plan, key=lambda one: one.first), desc="blocking", unit="set", disable=not progress):
        passes.start_at(one.first)
        for how in semantics:
            name = f"blocking by {how}, top {one.size}, control {one.control}"
            sets = _possible(passes.clean, one.sets) if how != "zero_weight" else one.sets
            left_out += (
                f"{name}: no router would have enough others, {part[0]}" for part in one.sets.keys() - sets.keys()
            )
            asked = np.isin(passes.labels, [parts.index(part) for part in sets])
            try:
                result = passes.run(asked, passes.before.residual_out, _blocked(passes, sets, parts, how))
            except BlockingError as error:  # a router that cannot be changed in this way, or not so far
                left_out.append(f"{name}: {error}")
                continue
            said = {"semantics": how, "size": one.size, "control": one.control, "seed": one.seed}
            if one.control != "random":  # found nowhere, the same for all relations
                said |= {"importance": importance, "relation": pl.Series([parts[i][0] for i in passes.labels[asked]])}
            if one.folds:
                said["fold"] = pl.Series([parts[i][1] for i in passes.labels[asked]])
            found.add(*result, asked, experiment="blocking", **said)
    return sorted(set(left_out))


def _possible(run: CleanRun, sets: Mapping[Part, Sequence[Expert]]) -> dict[Part, Sequence]:
    """The sets that leave every router enough experts to fill its slots; all of a relation or none."""
    spare = {
        site.layer: site.experts - run.trace.layers[site.layer].index.shape[1] for site in run.decomposition.routed()
    }
    short = {
        name
        for (name, _), chosen in sets.items()
        if any(count > spare[layer] for layer, count in Counter(layer for layer, _ in chosen).items())
    }
    return {part: chosen for part, chosen in sets.items() if part[0] not in short}


def _blocked(passes: Passes, sets: Mapping[Part, Sequence[Expert]], parts: Sequence[Part], how: str) -> During:
    """Block the experts of every part at the positions of its prompts."""
    decomposition, masks = passes.clean.decomposition, {}
    for part, chosen in sets.items():
        for layer, expert in chosen:
            (site,) = decomposition.at(layer, "routed")
            mask = masks.setdefault(layer, torch.zeros(len(parts), site.experts, dtype=torch.bool))
            mask[parts.index(part), expert] = True
    masks = {layer: mask.to(decomposition.device) for layer, mask in masks.items()}

    def during(batch: Batch) -> AbstractContextManager:
        experts = {layer: mask[passes.label[batch.at(layer)]] for layer, mask in masks.items()}
        return interventions.block(decomposition, experts, how)

    return during
