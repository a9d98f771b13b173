"""Which heads and neurons are taken away, and which stand in for them as controls. Tables in, sets out; no torch.

A set is tested where it was selected (``fold`` null, all prompts: optimistic, as published) and where it was not (fold
0 or 1: selected on the subject groups of the other fold). Random controls are of equal size; matched controls are of
equal size, layer, kind and deciles of activity and strength, and of these the nearest in strength. A selection lies in
the tail of its decile, where there are no others: it stays the stronger one, and by how much is reported.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import polars as pl

from moescope import neuron_sets
from moescope.errors import MoescopeError

logger = logging.getLogger(__name__)

SITES = ("head", "ffn_neuron")
#: Sizes by site: a number of units, or a share of all.
SIZES = {"head": ("1", "10", "1%"), "ffn_neuron": ("0.1%", "0.3%", "1%", "3%")}
CONTROLS = ("none", "random", "matched")
RANKINGS = ("signed", "abs", "per_relation")
#: Groups of subjects whose prompts are tested in a fold; the other fold's select.
FOLDS = {0: range(5), 1: range(5, 10)}
DECILES = 10

_NEURON = ("layer", "kind", "expert", "neuron")


class SelectionError(MoescopeError):
    """Tables from which nothing can be selected."""


@dataclass(frozen=True)
class Intervention:
    """A set of units and the prompts it is tested on.

    ``units``: ascending rows of the site's index; ``prompts``: ascending rows of the prompts table. The other fields
    are those of ``ablations``. Of a ``per_relation`` ranking there is one intervention per relation, all with one name.
    """

    site: str
    size: str
    ranking: str | None
    control: str
    fold: int | None
    seed: int | None
    units: np.ndarray
    prompts: np.ndarray


@dataclass
class Plan:
    """Interventions on a checkpoint.

    ``index``: per site what its units are (``layer head``; ``layer kind expert neuron``), a row each. ``matched``: per
    matched control of neurons ``share``, how many of them have exactly the layer, kind and deciles asked for, and
    ``magnitude_ratio``, the mean |coefficient| |value| of the selection over that of the control (None where a control
    never writes). ``left_out``: what could not be had, and why.
    """

    index: dict[str, pl.DataFrame]
    interventions: list[Intervention] = field(default_factory=list)
    matched: list[dict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, what: str) -> None:
        """Note, once, that something is not available."""
        if what not in self.left_out:
            logger.info("left out: %s", what)
            self.left_out.append(what)


def plan(
    frames: Mapping[str, pl.DataFrame],
    prompts: pl.DataFrame,
    rankings: Sequence[str] = ("signed",),
    seeds: int = 5,
    seed: int = 0,
) -> Plan:
    """Everything that is taken away from one checkpoint.

    ``frames``: ``ffn_neurons``, ``heads`` and, for cross-fitted neurons, ``ffn_groups``, as ``attribution.attribute``
    gives them for these ``prompts``. ``seeds``: how many random and matched controls of each. Random sets depend on
    ``seed``, the site, the size, the fold and the number of the control alone, not on the checkpoint. Raises
    SelectionError where tables do not belong together or a ranking is unknown.
    """
    if unknown := [r for r in rankings if r not in RANKINGS]:
        raise SelectionError(f"ranking {unknown[0]!r} is unknown; known are {', '.join(RANKINGS)}")
    if missing := [name for name in ("heads", "ffn_neurons") if name not in frames]:
        raise SelectionError(f"table {missing[0]} is missing; score the checkpoint first")
    sites = _Heads(frames["heads"], prompts), _Neurons(frames["ffn_neurons"], frames.get("ffn_groups"), prompts)
    found = Plan({site.name: site.index for site in sites})
    for site in sites:
        for size in SIZES[site.name]:
            count = size_of(size, len(site.index))
            if count >= len(site.index):
                found.leave_out(f"{site.name} {size}: there are {len(site.index)} in all")
                continue
            found.interventions += _random(site, size, count, prompts, seeds, seed)
            for ranking in rankings:
                _select(found, site, size, count, ranking, prompts, seeds, seed)
    return found


def size_of(size: str, total: int) -> int:
    """How many units a size is: itself, or the ceil(x N) of x per cent of ``total``."""
    return neuron_sets.count(Fraction(size[:-1]) / 100, total) if size.endswith("%") else int(size)


def deciles(values: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Decile (0-9) of every value among those of equal ``within``: by the share of strictly smaller ones, so that equal
    values share one."""
    found = np.empty(len(values), dtype=np.int64)
    for one in np.unique(within):
        members = np.flatnonzero(within == one)
        smaller = np.searchsorted(np.sort(values[members]), values[members])
        found[members] = DECILES * smaller // len(members)
    return found


def matched_units(
    units: np.ndarray, stratum: np.ndarray, cells: np.ndarray, magnitude: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, float] | None:
    """As many units outside a set, each of the same stratum and, as far as there are any, of the same cell.

    ``stratum`` [N] is never left; ``cells`` [N, 2] are deciles. The n that stand for n of a cell are drawn at random
    among the 2n whose ``magnitude`` [N] is nearest to the mean of those n. What a cell lacks comes from the nearest
    ones, by the sum of the two differences of deciles, drawn likewise among equals. Returns the units, ascending, and
    the share that is exactly matched; None where a stratum has too few others.
    """
    taken = np.zeros(len(stratum), dtype=bool)
    taken[units] = True
    inside, outside = (np.bincount(stratum[these], minlength=stratum.max() + 1) for these in (taken, ~taken))
    if (inside > outside).any():
        return None
    cell = (stratum * DECILES + cells[:, 0]) * DECILES + cells[:, 1]
    needed = np.bincount(cell[units], minlength=cell.max() + 1)
    mean = np.bincount(cell[units], weights=magnitude[units], minlength=len(needed)) / np.maximum(needed, 1)
    alike = np.flatnonzero(~taken & (needed[cell] > 0))
    alike = alike[np.argsort(cell[alike], kind="stable")]
    where, found, exact = cell[alike], [], 0
    for one in np.flatnonzero(needed):
        others = alike[slice(*np.searchsorted(where, [one, one + 1]))]
        found.append(nearest(others, np.abs(magnitude[others] - mean[one]), needed[one], random))
        taken[found[-1]] = True
        needed[one] -= len(found[-1])
        exact += len(found[-1])
    for one in np.flatnonzero(needed):
        others = np.flatnonzero(~taken & (stratum == one // DECILES**2))
        apart = np.abs(cells[others] - (one // DECILES % DECILES, one % DECILES)).sum(1)
        farthest = np.sort(apart)[needed[one] - 1]
        found.append(others[apart < farthest])
        last = others[apart == farthest]
        off = np.abs(magnitude[last] - mean[one])
        found.append(nearest(last, off, needed[one] - len(found[-1]), random))
        taken[np.concatenate(found[-2:])] = True
    return np.sort(np.concatenate(found)), exact / len(units)


def nearest(others: np.ndarray, off: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """``number`` at random of the twice as many ``others`` that are least ``off`` (equals: at random); all if fewer."""
    order = np.lexsort((random.random(len(others)), off))
    return random.permutation(others[order[: 2 * number]])[:number]


def sample(neurons: pl.DataFrame, count: int, seed: int = 0) -> pl.DataFrame:
    """Rows of ``ffn_neurons``, at most ``count``, equally many of each layer, kind and decile of |importance|.

    Neurons that are active in no prompt are left out. Where a stratum has too few, the others give more; what cannot be
    shared out equally goes to strata drawn at random.
    """
    active = neurons.filter(pl.col("active") > 0).sort(_NEURON, nulls_last=True)
    within = active.select(pl.struct("layer", "kind").rank("dense")).to_series().cast(pl.Int64).to_numpy()
    stratum = within * DECILES + deciles(np.abs(active["importance"].to_numpy()), within)
    random = np.random.default_rng([seed, count])
    turn = random.permutation(stratum.max() + 1)[stratum] if len(active) else stratum
    order = np.lexsort((random.random(len(active)), stratum))
    place = np.empty(len(active), dtype=np.int64)
    place[order] = np.arange(len(active)) - np.searchsorted(stratum[order], stratum[order])
    return active[np.sort(np.lexsort((turn, place))[:count])]


class _Heads:
    """Mean LPI [N] of the heads: over all prompts, those of a relation, those of some groups."""

    name = "head"

    def __init__(self, heads: pl.DataFrame, prompts: pl.DataFrame):
        heads = heads.sort("layer", "head", "prompt_id")
        self.index = heads.select("layer", "head").unique(maintain_order=True)
        self.stratum = self.index["layer"].to_numpy()
        # nothing but the layer is matched
        self.cells, self.magnitude = np.zeros((len(self.index), 2), dtype=np.int64), np.zeros(len(self.index))
        self.prompts = prompts.sort("prompt_id")
        known = heads["prompt_id"].unique().sort()
        if len(heads) and not known.equals(self.prompts["prompt_id"], check_names=False):
            raise SelectionError("heads: these are not the scores of these prompts; score the checkpoint again")
        self.lpi = heads["lpi"].cast(pl.Float64).to_numpy().reshape(len(self.index), len(self.prompts))

    def in_sample(self) -> np.ndarray:
        return self.lpi.mean(1)

    def of_relation(self, relation: str) -> np.ndarray:
        return self.lpi[:, (self.prompts["relation"] == relation).to_numpy()].mean(1)

    def of_groups(self, groups: Sequence[int]) -> np.ndarray:
        return self.lpi[:, self.prompts["group"].is_in(list(groups)).to_numpy()].mean(1)


class _Neurons:
    """Mean LPI [N] of the neurons: over all prompts, those of a relation, those of some groups (None: unknown)."""

    name = "ffn_neuron"

    def __init__(self, neurons: pl.DataFrame, groups: pl.DataFrame | None, prompts: pl.DataFrame):
        self.table = neurons.sort(_NEURON, nulls_last=True)
        self.index = self.table.select(_NEURON)
        self.groups = None if groups is None else groups.sort(_NEURON, nulls_last=True)
        self.prompts = prompts
        if groups is not None and not self.groups.select(_NEURON).equals(self.index):
            raise SelectionError("ffn_groups: these are not the neurons of ffn_neurons; score the checkpoint again")
        kind = self.index["kind"].rank("dense").cast(pl.Int64).to_numpy() - 1
        self.stratum = self.index["layer"].to_numpy().astype(np.int64) * (kind.max() + 1) + kind
        active, self.magnitude = (self.table[name].cast(pl.Float64).to_numpy() for name in ("active", "magnitude"))
        self.cells = np.stack([deciles(values, self.stratum) for values in (active, self.magnitude)], 1)

    def in_sample(self) -> np.ndarray:
        return self.table["importance"].to_numpy()

    def of_relation(self, relation: str) -> np.ndarray:
        return self.table[f"importance_{relation}"].to_numpy()

    def of_groups(self, groups: Sequence[int]) -> np.ndarray | None:
        if self.groups is None:
            return None
        sums = self.groups.select(pl.sum_horizontal(pl.col(f"group_{g}").cast(pl.Float64) for g in groups))
        return sums.to_series().to_numpy() / self.prompts["group"].is_in(list(groups)).sum()


def _generator(
    seed: int, site: _Heads | _Neurons, count: int, control: str, fold: int | None, number: int
) -> np.random.Generator:
    # by count, not by name: sizes that are equal in number then share their controls
    where = SITES.index(site.name), count, CONTROLS.index(control), len(FOLDS) if fold is None else fold
    return np.random.default_rng([seed, *where, number])


def _random(
    site: _Heads | _Neurons, size: str, count: int, prompts: pl.DataFrame, seeds: int, seed: int
) -> Iterator[Intervention]:
    everyone = np.arange(len(prompts))
    for k in range(seeds):
        units = np.sort(_generator(seed, site, count, "random", None, k).choice(len(site.index), count, replace=False))
        yield Intervention(site.name, size, None, "random", None, k, units, everyone)


def _select(
    found: Plan,
    site: _Heads | _Neurons,
    size: str,
    count: int,
    ranking: str,
    prompts: pl.DataFrame,
    seeds: int,
    seed: int,
) -> None:
    """The selections of one ranking, and matched controls of those that count (the cross-fitted, where there are)."""
    selections = [
        (fold, neuron_sets.largest(scores, count), tested)
        for fold, scores, tested in _scores(found, site, ranking, prompts)
    ]
    none = ((fold, None, units, tested) for fold, units, tested in selections)
    found.interventions += (Intervention(site.name, size, ranking, "none", *rest) for rest in none)
    crossfitted = [s for s in selections if s[0] is not None]
    controls, matched = [], []
    for (fold, units, tested), k in itertools.product(crossfitted or selections, range(seeds)):
        random = _generator(seed, site, count, "matched", fold, k)
        control = matched_units(units, site.stratum, site.cells, site.magnitude, random)
        if control is None:  # all or nothing: a control of some prompts compares with no selection
            found.leave_out(f"{site.name} {size}, {ranking}, matched control: too few others in a layer")
            return
        controls.append(Intervention(site.name, size, ranking, "matched", fold, k, control[0], tested))
        ours, theirs = (site.magnitude[these].mean() for these in (units, control[0]))
        how = {"share": control[1], "magnitude_ratio": float(ours / theirs) if theirs else None}
        matched.append({"size": size, "ranking": ranking, "fold": fold, "seed": k, **how})
    found.interventions += controls
    found.matched += matched if site.name == "ffn_neuron" else []


def _scores(
    found: Plan, site: _Heads | _Neurons, ranking: str, prompts: pl.DataFrame
) -> Iterator[tuple[int | None, np.ndarray, np.ndarray]]:
    """(fold, scores [N] to select by, rows of the prompts to test on)."""
    if ranking == "per_relation":
        for relation in prompts["relation"].unique().sort():
            yield None, site.of_relation(relation), np.flatnonzero(prompts["relation"] == relation)
        return
    sign = np.abs if ranking == "abs" else np.asarray
    yield None, sign(site.in_sample()), np.arange(len(prompts))
    fold_of = {fold: np.flatnonzero(prompts["group"].is_in(list(groups))) for fold, groups in FOLDS.items()}
    if not all(map(len, fold_of.values())):
        found.leave_out(f"{site.name}, {ranking}, cross-fit: all subjects are in one fold")
        return
    for fold, tested in fold_of.items():
        (other,) = set(FOLDS) - {fold}
        scores = site.of_groups(FOLDS[other])
        if scores is None:
            found.leave_out(f"{site.name}, {ranking}, cross-fit: there are no group sums (uncertainty: none)")
            return
        yield fold, sign(scores), tested
