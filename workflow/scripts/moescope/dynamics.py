"""Stability and concentration of the most important neurons over a series of checkpoints, with what bounds them.

Tables of checkpoints in, one at a time, two in memory; summary tables out. From the sums over ten groups of subjects
come the importance of every neuron, the same without each group (for the jackknife), and the same in random halves of
the groups: what two halves agree on at one step is the ceiling of what two steps can agree on, and neurons that are
ranked on one half and measured on the other are not chosen by their own noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np
import polars as pl

from moescope import neuron_sets, tables
from moescope.errors import MoescopeError
from moescope.neuron_sets import READINGS, TOP, Positives
from moescope.relations import GROUPS
from moescope.statistics import jackknife, rounding_variance

#: Random halves of the groups.
SPLITS = 20
_IDS = {"ffn": ["layer", "kind", "expert", "neuron"], "attn": ["layer", "head", "neuron"]}
_MASKED_IDS = ["layer", "neuron"]
_GROUP_COLUMNS = [f"group_{g}" for g in range(GROUPS)]
#: Metrics that are no shares; the intervals of shares end at 0 and 1.
_UNBOUNDED = ("reliability", "excess")
#: Half width of a 95% interval in standard deviations of a normal distribution.
_NORMAL = 1.96


class DynamicsError(MoescopeError):
    """Checkpoints that make no series."""


class Checkpoint(NamedTuple):
    """A checkpoint of a series: its step, the tokens seen by then (null: unknown), and its tables.

    ``table(name, columns)`` reads these columns of a result table, sorted by the table's key, or gives None where the
    checkpoint has no such table.
    """

    step: int
    tokens: int | None
    table: Callable[[str, list[str]], pl.DataFrame | None]


def neuron_dynamics(
    checkpoints: Iterable[Checkpoint], prompts: pl.DataFrame, component: str, seed: int = 0, splits: int = SPLITS
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """J, R and shares of a component (``ffn``, ``attn``) over a series, as ``neuron_dynamics`` and ``overlap``.

    Reads ``<component>_groups``, ``<component>_neurons``, ``active_sums`` and, where there is one, ``masked_groups``.
    Population ``all``: the top 1% of all neurons of the component, with jackknife intervals, the agreement of random
    halves (``ceiling``, ``cross_half``, ``reliability``), the cross-fitted readings of R, and J given routing (N1).
    ``masked``: a dense model seen through a mixture's routing, mean over the seeds of its blocks (N2). ``matched``: of
    FFN neurons the top 1% x share of them that are active in a prompt, of a dense model 1%, exactly: the last neuron of
    a set counts in part, so that models of different size are held against each other at one fraction (N4); population
    ``all`` rounds up to whole neurons. Macro averages are point estimates.
    Without group tables there are point estimates alone. What two checkpoints tell stands at the later one. ``overlap``
    holds all pairs of steps; ``identical`` marks two checkpoints whose importance is equal, number by number. Raises
    DynamicsError where steps do not ascend, neurons change between steps, or a table is torn.
    """
    series = _Series(component, prompts, seed, splits)
    rows, sets = [], []
    before = None
    for checkpoint in checkpoints:
        after = series.read(checkpoint, before)
        rows += series.at(after)
        if before is not None:
            rows += series.between(before, after)
        sets.append((after.step, after.digest, after.populations["all", "micro"].sets[0].astype(np.int32)))
        before = after
    if not rows:
        raise DynamicsError("neuron_dynamics: there is no checkpoint to summarise")
    frame = pl.DataFrame(rows, schema=tables.SCHEMAS["neuron_dynamics"].columns).with_columns(
        pl.selectors.float().fill_nan(None)
    )
    return tables.check(frame, "neuron_dynamics"), _overlap(component, sets)


@dataclass(frozen=True)
class _Population:
    """Importance of the same neurons in several rows: of all subjects, then without each group; so for every seed. A
    row without prompts is None."""

    importance: list[np.ndarray | None]
    bounds: np.ndarray
    share: Fraction = TOP
    seeds: int = 1
    #: what makes a top share: rounded up to whole neurons, or exact
    choose: Callable[..., neuron_sets.Members] = neuron_sets.top

    @cached_property
    def sets(self) -> list[neuron_sets.Members | None]:
        """The top share of every row by |importance|."""
        return _each(lambda one: self.choose(np.abs(one), self.share), self.importance, missing=None)


@dataclass(frozen=True)
class _State:
    """What is kept of a checkpoint until the next one is done."""

    step: int
    tokens: int | None
    #: columns that tell neurons apart, by population
    ids: dict[str, pl.DataFrame]
    populations: dict[tuple[str, str], _Population]
    #: sums of LPI over the prompts of each group, [groups, neurons]; None where they were not stored
    sums: np.ndarray | None
    #: top sets of every split, and J of its halves: of all subjects, then without each group; empty without sums
    halves: list[_Halves]
    ceiling: np.ndarray
    digest: bytes


class _Split(NamedTuple):
    """Two halves of the groups. Rows: half A, half B, and for each group its half without it. ``pairs`` tells which
    rows stand against each other: for all subjects, then without each group."""

    weights: list[np.ndarray | None]
    pairs: list[tuple[int, int]]


class _Halves(NamedTuple):
    """Top sets of the rows of a split: by |importance|, and by signed importance within the model and each layer."""

    by_size: list[np.ndarray | None]
    signed: dict[str, list[np.ndarray | None]]


class _Series:
    """The groups of the prompts and their halves, and what a component's checkpoints tell with them."""

    def __init__(self, component: str, prompts: pl.DataFrame, seed: int, splits: int) -> None:
        self.component = component
        self.prompts = len(prompts)
        self.sizes = np.bincount(prompts["group"].to_numpy(), minlength=GROUPS)
        self.relations = prompts["relation"].unique().sort().to_list()
        everything = frozenset(range(GROUPS))
        self.weights = [self._weights(everything), *(self._weights(everything - {g}, g) for g in range(GROUPS))]
        halves = list(combinations(range(1, GROUPS), GROUPS // 2))  # group 0 lies in the other half, B
        chosen = np.random.default_rng([seed, GROUPS]).choice(len(halves), splits, replace=False)
        self.splits = [self._split(frozenset(halves[i])) for i in chosen]

    def _weights(self, groups: frozenset[int], removed: int | None = None) -> np.ndarray | None:
        """What makes the mean over prompts of sums over groups, [groups]; None where it is a mean over nothing, or
        where a group without prompts is removed, which changes nothing."""
        members = sorted(groups)
        size = self.sizes[members].sum()
        if size == 0 or (removed is not None and self.sizes[removed] == 0):
            return None
        weights = np.zeros(GROUPS)
        weights[members] = 1 / size
        return weights

    def _split(self, half: frozenset[int]) -> _Split:
        halves = half, frozenset(range(GROUPS)) - half
        side = [0 if g in half else 1 for g in range(GROUPS)]
        shortened = [self._weights(halves[side[g]] - {g}, g) for g in range(GROUPS)]
        pairs = [(0, 1), *((2 + g, 1 - side[g]) for g in range(GROUPS))]
        return _Split([*map(self._weights, halves), *shortened], pairs)

    # Reading -----------------------------------------------------------------------------------------------------

    def read(self, checkpoint: Checkpoint, before: _State | None) -> _State:
        """The checkpoint's importance and top sets; refuses one that does not follow the one before."""
        step, tokens, table = checkpoint
        if before is not None and step <= before.step:
            raise DynamicsError(f"step {step} follows step {before.step}; list the checkpoints by ascending step")
        neurons, sums, micro, macro = self._importance(table)
        ids = {"all": neurons}
        bounds = _bounds(neurons)
        populations = {("all", "micro"): _Population(micro, bounds), ("all", "macro"): _Population(macro, bounds)}
        masked = None
        if self.component == "ffn":
            share = TOP * self._active_share(table, len(neurons), step)
            for average, importance in (("micro", micro), ("macro", macro)):
                matched = _Population(importance, bounds, share, choose=neuron_sets.exact_top)
                populations["matched", average] = matched
            masked = table("masked_groups", [*_MASKED_IDS, "seed", *_GROUP_COLUMNS])
        if masked is not None:
            ids["masked"], populations["masked", "micro"] = self._masked(masked, step)
        if before is not None:
            self._require_the_same(before, step, ids)
        halves = [] if sums is None else [_Halves(*_half_sets(rows, bounds)) for rows in self._rows_of_splits(sums)]
        digest = hashlib.sha256(micro[0] if sums is None else sums).digest()
        return _State(step, tokens, ids, populations, sums, halves, self._agreement(halves, halves), digest)

    def _importance(self, table: Callable) -> tuple[pl.DataFrame, np.ndarray | None, list, list]:
        """The neurons, the sums over groups (None: not stored), and importance by row: over prompts, over relations."""
        columns = _IDS[self.component]
        relations = [f"importance_{relation}" for relation in self.relations]
        grouped = table(f"{self.component}_groups", [*columns, *_GROUP_COLUMNS])
        own = [*columns, "importance"] if grouped is None else []
        scored = table(f"{self.component}_neurons", [*own, *relations])
        macro = [sum(_column(scored, relation) for relation in relations) / len(relations)]
        if grouped is None:
            return scored.select(columns), None, [_column(scored, "importance")], macro
        sums = _sums(grouped)
        return grouped.select(columns), sums, _means(self.weights, sums), macro

    def _require_the_same(self, before: _State, step: int, ids: dict[str, pl.DataFrame]) -> None:
        for name in ids.keys() & before.ids.keys():
            if not ids[name].equals(before.ids[name]):
                counts = f"{len(before.ids[name])} and {len(ids[name])}"
                raise DynamicsError(
                    f"steps {before.step} and {step}: not the same {self.component} neurons ({counts}); "
                    "a series holds checkpoints of one model, take the others out"
                )

    def _active_share(self, table: Callable, neurons: int, step: int) -> Fraction:
        """The share of the component's neurons that are active in a prompt."""
        active = table("active_sums", ["component", "active"]).filter(component=self.component)["active"].unique()
        if len(active) != 1:
            raise DynamicsError(f"step {step}: prompts differ in active neurons; delete active_sums and run again")
        return Fraction(active[0], neurons)

    def _masked(self, masked: pl.DataFrame, step: int) -> tuple[pl.DataFrame, _Population]:
        parts = [part for _, part in sorted(masked.partition_by("seed", as_dict=True).items())]
        ids = parts[0].select(_MASKED_IDS)
        if not all(part.select(_MASKED_IDS).equals(ids) for part in parts):
            raise DynamicsError(f"step {step}: a seed of masked_groups lacks neurons; delete the file and run again")
        importance = [one for part in parts for one in _means(self.weights, _sums(part))]
        return ids, _Population(importance, _bounds(ids), seeds=len(parts))

    # Rows of neuron_dynamics -------------------------------------------------------------------------------------

    def at(self, state: _State) -> Iterator[dict]:
        """What one checkpoint tells alone."""
        for name, one in state.populations.items():
            shares = _each(lambda row, one=one: neuron_sets.positive_share(row, one.share, one.choose), one.importance)
            yield self._row(name, "positive_share", None, state, shares, one.seeds)
        if state.halves:
            yield self._row(("all", "micro"), "ceiling", None, state, state.ceiling)

    def between(self, before: _State, after: _State) -> Iterator[dict]:
        """What two consecutive checkpoints tell together."""
        for name in after.populations:
            if name in before.populations:
                yield from self._stability_and_concentration(name, before, after)
        yield from self._given_routing(before, after)
        if before.halves and after.halves:
            yield from self._from_halves(before, after)

    def _stability_and_concentration(self, name: tuple[str, str], before: _State, after: _State) -> Iterator[dict]:
        old, new = before.populations[name], after.populations[name]
        steps = _each(neuron_sets.resolution, old.sets, new.sets)
        yield self._row(
            name, "jaccard", before, after, _each(neuron_sets.jaccard, old.sets, new.sets), new.seeds, steps
        )
        kept = _each(neuron_sets.survival, old.sets, new.sets)
        one = min(1.0, 1 / neuron_sets.size(new.sets[0]))
        yield self._row(name, "survival", before, after, kept, new.seeds, [one] * len(steps))

        def shares(earlier: np.ndarray, later: np.ndarray) -> dict[str, float]:
            return neuron_sets.gain_shares(earlier, later, new.bounds, new.share, new.choose)

        readings = _each(shares, old.importance, new.importance, missing=dict.fromkeys(READINGS, math.nan))
        for metric in READINGS:
            yield self._row(name, metric, before, after, [one[metric] for one in readings], new.seeds)

    def _given_routing(self, before: _State, after: _State) -> Iterator[dict]:
        """J of sets whose members are dealt at random within layers, or within experts (heads), each of which keeps
        as many as it has: what the place of the neurons alone explains."""
        old, new = before.populations["all", "micro"], after.populations["all", "micro"]
        for level, columns in self._levels(after.ids["all"]).items():
            group = after.ids["all"].select(pl.struct(columns).rank("dense")).to_series().to_numpy().astype(np.intp) - 1
            dealt = [_dealt(a, b, group) for a, b in zip(old.sets, new.sets, strict=True)]
            name, expected = ("all", "micro"), [j for j, _, _ in dealt]
            row = self._row(name, f"jaccard_given_{level}", before, after, expected)
            yield row | {"low": dealt[0][1], "high": dealt[0][2]}
            observed = _each(neuron_sets.jaccard, old.sets, new.sets)
            excess = [(j - j0) / (1 - j0) if j0 < 1 else math.nan for j, j0 in zip(observed, expected, strict=True)]
            steps = [neuron_sets.resolution(old.sets[0], new.sets[0]) / (1 - expected[0])] if expected[0] < 1 else [0.0]
            yield self._row(name, f"excess_given_{level}", before, after, excess, steps=steps)

    def _levels(self, ids: pl.DataFrame) -> dict[str, list[str]]:
        levels = {"layer": ["layer"]}
        if self.component == "attn":
            levels["expert"] = ["layer", "head"]
        elif "routed" in ids["kind"]:
            levels["expert"] = ["layer", "kind", "expert"]
        return levels

    def _from_halves(self, before: _State, after: _State) -> Iterator[dict]:
        cross_half = self._agreement(before.halves, after.halves)
        with np.errstate(invalid="ignore", divide="ignore"):
            reliability = cross_half / np.sqrt(before.ceiling * after.ceiling)
        yield self._row(("all", "micro"), "cross_half", before, after, cross_half)
        finite = np.where(np.isfinite(reliability), reliability, math.nan)
        yield self._row(("all", "micro"), "reliability", before, after, finite)
        bounds = after.populations["all", "micro"].bounds
        gains = zip(self._rows_of_splits(after.sums - before.sums), self.splits, after.halves, strict=True)
        by_split = [_crossfitted(gain, split.pairs, halves.signed, bounds) for gain, split, halves in gains]
        for metric in READINGS:
            shares = _mean([one[metric] for one in by_split])
            yield self._row(("all", "micro"), f"{metric}_crossfit", before, after, shares)

    def _rows_of_splits(self, sums: np.ndarray) -> Iterator[list[np.ndarray | None]]:
        """The means of every split's rows, one split after the other in the same memory."""
        memory = np.empty((2 + GROUPS, sums.shape[1]))
        for split in self.splits:
            yield _means(split.weights, sums, memory)

    def _agreement(self, before: list[_Halves], after: list[_Halves]) -> np.ndarray:
        """J of one half at one checkpoint with the other half at another, mean of both directions and of the splits;
        for all subjects, then without each group, [1 + groups]; empty where there are no halves."""
        by_split = []
        for split, (old, _), (new, _) in zip(self.splits if before else (), before, after, strict=True):
            a, b = zip(*split.pairs, strict=True)
            there = _each(neuron_sets.jaccard, [old[i] for i in a], [new[i] for i in b])
            back = there if old is new else _each(neuron_sets.jaccard, [old[i] for i in b], [new[i] for i in a])
            by_split.append(np.add(there, back) / 2)
        return _mean(by_split)

    def _row(
        self,
        population: tuple[str, str],
        metric: str,
        before: _State | None,
        state: _State,
        values: Sequence[float],
        seeds: int = 1,
        steps: Sequence[float] = (),
    ) -> dict:
        """A row from the metric of every row of a population: value, interval, replicates, spread over seeds.

        ``steps``: by how much the metric moves at least, in the same rows; the first of every seed counts.
        """
        by_seed = np.reshape(values, (seeds, -1))
        value, *without = by_seed.mean(axis=0)
        spread = by_seed[:, 0].std(ddof=1) if seeds > 1 else math.nan
        resolution = float(np.linalg.norm(np.reshape(steps, (seeds, -1))[:, 0])) / seeds if len(steps) else math.nan
        low, high = math.nan, math.nan
        if without:
            unseen = np.nansum([spread**2 / seeds, rounding_variance(resolution)])
            low, high = jackknife(value, without, unseen)
            if not metric.startswith(_UNBOUNDED):
                low, high = np.clip([low, high], 0, 1)
        return {
            "component": self.component,
            "population": population[0],
            "average": population[1],
            "metric": metric,
            "step_from": None if before is None else before.step,
            "step": state.step,
            "tokens": state.tokens,
            "value": value,
            "low": low,
            "high": high,
            "spread": spread,
            "resolution": resolution,
            "prompts": self.prompts,
            **{f"without_{g}": one for g, one in enumerate(without)},
        }


def _dealt(a: np.ndarray | None, b: np.ndarray | None, group: np.ndarray) -> tuple[float, float, float]:
    """J of two sets if their members are dealt at random within groups, and where 95% of such deals lie."""
    if a is None or b is None:
        return math.nan, math.nan, math.nan
    mean, variance = neuron_sets.expected_overlap(a, b, group, np.bincount(group))
    reach = _NORMAL * math.sqrt(variance)
    common = mean, max(mean - reach, 0.0), min(mean + reach, float(min(len(a), len(b))))
    return tuple(neuron_sets.jaccard_of_overlap(one, len(a), len(b)) for one in common)


def _half_sets(rows: list[np.ndarray | None], bounds: np.ndarray) -> tuple[list, dict[str, list]]:
    """The top sets of a split's importance: by size, and signed; overwrites it."""
    signed = {"model": _tops(rows), "layer": _tops(rows, bounds)}
    return _tops(_each(lambda one: np.abs(one, out=one), rows, missing=None)), signed


def _crossfitted(
    gain: list[np.ndarray | None], pairs: list[tuple[int, int]], by_importance: dict[str, list], bounds: np.ndarray
) -> dict[str, list[float]]:
    """R ranked on one half and measured on the other, mean of both directions, in all readings; for all subjects, then
    without each group, which is taken out of its half. From the gains of a split's rows and their top sets by
    importance at the later checkpoint."""
    positives = _each(Positives, gain, missing=None)
    gains = {"model": positives, "layer": _each(lambda one: one.within(bounds), positives, missing=None)}
    a, b = zip(*pairs, strict=True)
    shares = {}
    for metric, (rank, scope) in READINGS.items():
        limits = bounds if scope == "layer" else None
        chosen, held = by_importance[scope] if rank == "importance" else _tops(gain, limits), gains[scope]
        there = _each(Positives.share, [held[i] for i in b], [chosen[i] for i in a])
        back = _each(Positives.share, [held[i] for i in a], [chosen[i] for i in b])
        shares[metric] = [(one + other) / 2 for one, other in zip(there, back, strict=True)]
    return shares


def _overlap(component: str, sets: list[tuple[int, bytes, np.ndarray]]) -> pl.DataFrame:
    """All pairs of steps, the earlier first and each step with itself: J, survival, and whether they are identical."""
    steps, digests, chosen = zip(*sets, strict=True)
    stacked = np.stack(chosen)
    size = stacked.shape[1]
    inside = np.zeros(int(stacked.max()) + 1, dtype=bool)
    rows = []
    for later, step in enumerate(steps):
        inside[stacked[later]] = True
        for earlier, common in enumerate(inside[stacked[: later + 1]].sum(axis=1).tolist()):
            identical = earlier < later and digests[earlier] == digests[later]
            j = neuron_sets.jaccard_of_overlap(common, size, size)
            rows.append((component, steps[earlier], step, j, common / size, identical))
        inside[stacked[later]] = False
    frame = pl.DataFrame(rows, schema=tables.SCHEMAS["overlap"].columns, orient="row")
    return tables.check(frame, "overlap")


def _each(function: Callable, *rows: Sequence, missing: object = math.nan) -> list:
    """The function of every row (of the rows side by side), ``missing`` where one of them is None."""
    together = zip(*rows, strict=True)
    return [missing if any(one is None for one in parts) else function(*parts) for parts in together]


def _means(
    weights: list[np.ndarray | None], sums: np.ndarray, memory: np.ndarray | None = None
) -> list[np.ndarray | None]:
    """Importance [neurons] by every row of weights [groups], from sums [groups, neurons]; in ``memory``, if given."""
    held = [one for one in weights if one is not None]
    means = iter(np.matmul(np.reshape(held, (-1, GROUPS)), sums, out=None if memory is None else memory[: len(held)]))
    return [None if one is None else next(means) for one in weights]


def _tops(rows: list[np.ndarray | None], bounds: np.ndarray | None = None) -> list[np.ndarray | None]:
    return _each(lambda one: neuron_sets.top(one, TOP, bounds).astype(np.int32), rows, missing=None)


def _mean(by_split: list) -> np.ndarray:
    """Mean over splits of [splits, 1 + groups]; what a split does not have (NaN) is left out."""
    values = np.array(by_split, dtype=np.float64)
    held = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(held, values, 0.0).sum(axis=0) / held.sum(axis=0)


def _sums(grouped: pl.DataFrame) -> np.ndarray:
    """[groups, neurons] float64."""
    sums = np.empty((GROUPS, len(grouped)))
    for g, column in enumerate(_GROUP_COLUMNS):
        sums[g] = grouped[column].to_numpy()
    return sums


def _column(frame: pl.DataFrame, name: str) -> np.ndarray:
    return frame[name].to_numpy().astype(np.float64)


def _bounds(ids: pl.DataFrame) -> np.ndarray:
    """Where the layers of neurons sorted by layer begin, and the end."""
    return np.append(np.unique(ids["layer"].to_numpy(), return_index=True)[1], len(ids))
