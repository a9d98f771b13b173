"""Which heads and experts go together: how much a head adds on a prompt, and how far a router turns to an expert.

Pearson's r over prompts between the log-probability increase (LPI) of a head and the probability of an expert of the
same layer or a later one, both centred within relation: relations differ in everything, and what only tells them apart
associates no head with no expert. Among hundreds of thousands of pairs the largest |r| is large by chance (some 0.8 on
24 prompts), so p compares it with the largest |r| of all pairs at once, when the prompts of each relation are permuted
(Westfall and Young 1993, single step). The prompts of a subject move together: nearly half of all share their subject
with one of another relation, and permuted apart, as if independent, they make too narrow a null. An r that was searched
for stays optimistic; that on the other fold of subjects is not. Permutations depend on the prompts and the seed alone,
so that models are compared on the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from moescope import tables
from moescope.errors import MoescopeError
from moescope.sample import Prompts
from moescope.selection import FOLDS
from moescope.statistics import percentiles

#: What stands for an expert's part in a prompt: its probability before the top-k, or the weight that was used.
BY = ("probability", "weight")
PERMUTATIONS = 1000
#: Leading heads and leading experts of a relation that are held against each other.
LEADING = 3
#: With fewer prompts there is no search.
FEWEST = 4
#: Columns that vary less than this share of their size are constant: float32 tells no more of them.
CONSTANT = 1e-6
#: Values of |r| that differ by less are equal; permuted ones are float32 products.
ROUNDING = 1e-5


class AssociationError(MoescopeError):
    """Tables in which heads and experts cannot be held against each other."""


class Correlation(NamedTuple):
    """Pearson's r with its 95% interval over subjects and its two-sided p; None where there is none."""

    r: float | None
    low: float | None
    high: float | None
    p: float | None


def associate(
    heads: pl.DataFrame,
    routing: pl.DataFrame,
    importance: pl.DataFrame,
    prompts: pl.DataFrame,
    by: str = "probability",
    method: str = "top_neuron_frequency",
    permutations: int = PERMUTATIONS,
    strongest: int = 10,
    seed: int = 0,
) -> pl.DataFrame:
    """The table ``associations`` of one checkpoint, from its ``heads``, ``routing`` and ``expert_importance``.

    Without a relation: the ``strongest`` pairs of largest |r| among all causal ones (the head's layer is not behind the
    expert's), found on all prompts (``fold`` null) and on the prompts outside a fold, then tested on it. With a
    relation: the causal pairs of its three heads of largest mean LPI and its first three experts by ``method``, on its
    prompts. ``r``, ``p``, ``null_median``, ``null_95`` (of the largest |r| of a permutation), ``pairs`` (searched) and
    ``prompts`` are those of the search; p = (1 + permutations that reach |r|) / (1 + permutations). ``p_tested`` is
    that of the pair alone, two-sided.
    A head or an expert that is constant within relations has no r and is not searched (tested: null); prompts alone in
    their relation tell nothing and do not count; fewer than 4 prompts give no rows (tested: null). Equal |r| go by
    head_layer, head, layer, expert. Raises AssociationError where tables do not belong together, lack the ``method``,
    or, ``by`` probability, where the family tells none.
    """
    laid = _Laid.over(prompts, heads, routing, by)
    everything = np.ones(len(laid.stratum), dtype=bool)
    rows = _rows(None, None, _search(laid, everything, strongest, permutations, seed))
    for fold, groups in FOLDS.items():
        inside = np.isin(laid.group, groups)
        found = _search(laid, ~inside, strongest, permutations, seed)
        rows += _rows(None, fold, found, laid.tested(found, inside, permutations, seed))
    leading = importance.filter(pl.col("method") == method, pl.col("fold").is_null(), pl.col("rank") <= LEADING)
    if leading.is_empty():
        raise AssociationError(f"expert_importance.parquet lists no experts by {method}; delete the file and run again")
    for number, relation in enumerate(laid.relations):
        inside = laid.stratum == number
        experts = leading.filter(pl.col("relation") == relation).select("layer", "expert").sort("layer", "expert")
        chosen = laid.chosen(laid.leading_heads(inside), laid.experts.places(experts.rows()))
        rows += _rows(relation, None, _search(chosen, inside, LEADING**2, permutations, seed))
    return tables.of_rows(rows, "associations")


def correlation_of(
    heads: pl.DataFrame,
    routing: pl.DataFrame,
    prompts: pl.DataFrame,
    pairs: Sequence[tuple[int, int, int, int]],
    by: str = "probability",
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[Correlation]:
    """Correlation, over all prompts and centred within relation, of named pairs (head_layer, head, layer, expert).

    Pairs may be acausal. ``p`` is that of a pair alone, which was not searched for. Raises AssociationError where there
    is no such head or expert.
    """
    laid = _Laid.over(prompts, heads, routing, by)
    return _correlations(*laid.of_pairs(pairs), prompts, permutations, seed)


def expert_correlation(
    routing: pl.DataFrame,
    prompts: pl.DataFrame,
    first: tuple[int, int],
    second: tuple[int, int],
    by: str = "probability",
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Correlation:
    """The same of two experts (layer, expert): one published head is printed as an expert."""
    experts = _experts(routing, prompts, by)
    x, y = (experts.values[:, experts.places([one])] for one in (first, second))
    return _correlations(x, y, prompts, permutations, seed)[0]


def permutations_within(stratum: np.ndarray, subject: np.ndarray, number: int, seed: int) -> Iterator[np.ndarray]:
    """``number`` random orders of rows, each [rows], that move subjects as a whole and leave every stratum its rows.

    A subject changes places with one that has as many rows in the same strata, row for row; one without its like stays.
    Where every subject has one row, these are the permutations within strata. ``stratum`` and ``subject`` are [rows].
    """
    random = np.random.default_rng(seed)
    rows = np.lexsort((stratum, subject))
    _, start, of_row = np.unique(subject[rows], return_index=True, return_inverse=True)
    strata = [tuple(one.tolist()) for one in np.split(stratum[rows], start[1:])]
    kinds = {one: kind for kind, one in enumerate(sorted(set(strata)))}
    alike = np.array([kinds[one] for one in strata])
    members = np.argsort(alike, kind="stable")
    within = np.arange(len(rows)) - start[of_row]
    for _ in range(number):
        place = np.empty(len(start), dtype=np.int64)
        place[members] = np.lexsort((random.random(len(start)), alike))
        order = np.empty(len(rows), dtype=np.int64)
        order[rows] = rows[start[place[of_row]] + within]
        yield order


class _Units(NamedTuple):
    """Heads or experts: layer and number of each, [units, 2] ascending, and their values [prompts, units]."""

    unit: str
    index: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, frame: pl.DataFrame, unit: str, column: str, prompts: pl.DataFrame) -> _Units:
        """The column of a table with a row per prompt, layer and unit, prompts ascending by prompt_id."""
        frame = frame.sort("prompt_id", "layer", unit)
        index = frame.select("layer", unit).unique().sort("layer", unit).to_numpy()
        known = prompts["prompt_id"].sort()
        if len(frame) != len(known) * len(index) or not frame["prompt_id"].unique().sort().equals(known):
            table = "heads" if unit == "head" else "routing"
            what = f"{table}.parquet does not hold every {unit} on every prompt"
            raise AssociationError(f"{what}; delete the file and run again")
        return cls(unit, index, frame[column].to_numpy().astype(np.float64).reshape(len(known), len(index)))

    def places(self, asked: Sequence[tuple[int, int]]) -> list[int]:
        """Where these (layer, number) stand."""
        place = {unit: i for i, unit in enumerate(map(tuple, self.index.tolist()))}
        if unknown := [one for one in asked if tuple(one) not in place]:
            layer, number = unknown[0]
            raise AssociationError(f"layer {layer} has no {self.unit} {number}; name one that the model has")
        return [place[tuple(one)] for one in asked]

    def on(self, rows: np.ndarray, stratum: np.ndarray) -> _Units:
        """Those that vary, on these prompts, as columns of mean 0 within strata and length 1."""
        columns, varies = _standardised(self.values[rows], stratum[rows])
        return _Units(self.unit, self.index[varies], columns[:, varies])


class _Laid(NamedTuple):
    """Heads and experts over the same prompts, with the relation, the subject and its group of each prompt."""

    relations: list[str]
    stratum: np.ndarray
    subject: np.ndarray
    group: np.ndarray
    heads: _Units
    experts: _Units

    @classmethod
    def over(cls, prompts: pl.DataFrame, heads: pl.DataFrame, routing: pl.DataFrame, by: str) -> _Laid:
        units = _Units.of(heads, "head", "lpi", prompts), _experts(routing, prompts, by)
        prompts = prompts.sort("prompt_id")
        relations = prompts["relation"].unique().sort().to_list()
        stratum, subject = (prompts[one].rank("dense").cast(pl.Int64).to_numpy() - 1 for one in ("relation", "subject"))
        return cls(relations, stratum, subject, prompts["group"].to_numpy(), *units)

    def chosen(self, heads: Sequence[int], experts: Sequence[int]) -> _Laid:
        """The same of these heads and experts alone."""
        kept = ((self.heads, heads), (self.experts, experts))
        units = (_Units(one.unit, one.index[places], one.values[:, places]) for one, places in kept)
        return self._replace(**{f"{one.unit}s": one for one in units})

    def leading_heads(self, inside: np.ndarray) -> np.ndarray:
        """The heads of largest mean LPI on these prompts, ascending; ties go to the earlier one."""
        return np.sort(np.argsort(-self.heads.values[inside].mean(axis=0), kind="stable")[:LEADING])

    def of_pairs(self, pairs: Sequence[tuple[int, int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """What the head and the expert of each pair have on every prompt, both [prompts, pairs]."""
        heads = self.heads.places([pair[:2] for pair in pairs])
        experts = self.experts.places([pair[2:] for pair in pairs])
        return self.heads.values[:, heads], self.experts.values[:, experts]

    def orders(self, rows: np.ndarray, permutations: int, seed: int) -> Iterator[np.ndarray]:
        """Permutations of these prompts."""
        return permutations_within(self.stratum[rows], self.subject[rows], permutations, seed)

    def tested(
        self, found: _Found | None, inside: np.ndarray, permutations: int, seed: int
    ) -> list[tuple[float | None, float | None]]:
        """r of the pairs found on these prompts, and p of each alone."""
        if found is None:
            return []
        rows = _telling(self.stratum, inside)
        if rows is None:
            return [(None, None)] * len(found.pairs)
        x, y = (side[rows] for side in self.of_pairs(found.pairs))
        r, p = _each(x, y, self.stratum[rows], self.orders(rows, permutations, seed))
        return list(zip(map(tables.number, r), map(tables.number, p), strict=True))


class _Found(NamedTuple):
    """The strongest pairs of a search, r and p of each, and what the search was."""

    pairs: list[tuple[int, int, int, int]]
    r: np.ndarray
    p: np.ndarray
    null_median: float
    null_95: float
    searched: int
    prompts: int


def _rows(relation: str | None, fold: int | None, found: _Found | None, tested: Sequence[tuple] = ()) -> list[tuple]:
    """Rows of the table ``associations``."""
    if found is None:
        return []
    search = found.null_median, found.null_95
    each = zip(found.pairs, found.r, found.p, tested or [(None, None)] * len(found.pairs), strict=True)
    return [(relation, fold, *pair, r, p, *test, *search, found.searched, found.prompts) for pair, r, p, test in each]


def _search(laid: _Laid, inside: np.ndarray, strongest: int, permutations: int, seed: int) -> _Found | None:
    """The causal pairs of largest |r| on these prompts; None where there are too few prompts, or no pairs."""
    rows = _telling(laid.stratum, inside)
    if rows is None:
        return None
    heads, experts = laid.heads.on(rows, laid.stratum), laid.experts.on(rows, laid.stratum)
    causal = heads.index[:, :1] <= experts.index[:, 0]
    searched = int(causal.sum())
    if not searched:
        return None
    # rounded, so that equal columns tie wherever in the matrix they stand
    size = np.where(causal, np.abs(heads.values.T @ experts.values).round(9), -1.0)
    first = np.argsort(-size, axis=None, kind="stable")[: min(strongest, searched)]
    i, j = np.unravel_index(first, size.shape)
    r = (heads.values[:, i] * experts.values[:, j]).sum(axis=0)
    largest = _largest(heads, experts, laid.orders(rows, permutations, seed))
    pairs = list(map(tuple, np.hstack([heads.index[i], experts.index[j]]).tolist()))
    null = np.median(largest), np.percentile(largest, 95)
    return _Found(pairs, r, _p(r, largest[:, None]), *map(float, null), searched, len(rows))


def _largest(heads: _Units, experts: _Units, orders: Iterator[np.ndarray]) -> np.ndarray:
    """The largest |r| of all causal pairs under every order of the prompts, [orders].

    One product of matrices per order and layer of experts, with the heads up to that layer: half the work and, above
    all, no acausal pair.
    """
    layers, starts = np.unique(experts.index[:, 0], return_index=True)
    blocks = np.split(experts.values.astype(np.float32), starts[1:], axis=1)
    ends = np.searchsorted(heads.index[:, 0], layers, side="right")
    before = [(end, block) for end, block in zip(ends, blocks, strict=True) if end]
    values = heads.values.astype(np.float32)
    largest = []
    for order in orders:
        permuted = values[order]
        products = (permuted[:, :end].T @ block for end, block in before)
        largest.append(max(max(r.max(), -r.min()) for r in products))
    return np.array(largest, dtype=np.float64).round(6)  # what float32 is sure of, on one thread or many


def _each(
    x: np.ndarray, y: np.ndarray, stratum: np.ndarray, orders: Iterator[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """r of each column of x with that of y, [prompts, pairs], and p of each pair alone; NaN where one is constant."""
    (x, x_varies), (y, y_varies) = _standardised(x, stratum), _standardised(y, stratum)
    r = (x * y).sum(axis=0)
    null = np.array([np.abs((x[order] * y).sum(axis=0)) for order in orders])
    has_r = x_varies & y_varies
    return np.where(has_r, r, np.nan), np.where(has_r, _p(r, null), np.nan)


def _p(r: np.ndarray, null: np.ndarray) -> np.ndarray:
    """(1 + permutations whose |r| in ``null`` [permutations, pairs] reaches that of r [pairs]) / (1 + permutations)."""
    return (1 + (null >= np.abs(r) - ROUNDING).sum(axis=0)) / (1 + len(null))


def _correlations(
    x: np.ndarray, y: np.ndarray, prompts: pl.DataFrame, permutations: int, seed: int
) -> list[Correlation]:
    """Of columns [prompts, pairs], prompts ascending: r, interval and p of each pair."""
    known = Prompts(prompts, seed)
    placed = known.place(prompts.select("prompt_id").sort("prompt_id"), None)
    stratum, subject = placed["_stratum"].to_numpy(), placed["_subject"].to_numpy()
    rows = _telling(stratum, np.ones(len(stratum), dtype=bool))
    if rows is None:
        return [Correlation(None, None, None, None)] * x.shape[1]
    x, y, stratum, subject = x[rows], y[rows], stratum[rows], subject[rows]
    r, p = _each(x, y, stratum, permutations_within(stratum, subject, permutations, seed))
    (x, _), (y, _) = _standardised(x, stratum), _standardised(y, stratum)
    sums = known.bootstrap.resample(np.hstack([x, y, x * x, y * y, x * y]), subject, stratum)
    low, high = percentiles(_resampled(sums.totals, sums.sizes))
    if sums.subjects() < 2:
        low, high = np.full((2, len(r)), np.nan)
    return [Correlation(*map(tables.number, numbers)) for numbers in zip(r, low, high, p, strict=True)]


def _resampled(totals: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """r in every draw, [draws, pairs], from sums of x, y, x^2, y^2 and x y, [1 + draws, strata, 5 pairs].

    Each draw is centred within relation anew. NaN where a side is constant in a draw.
    """
    x, y, xx, yy, xy = np.split(totals[1:], 5, axis=2)
    held = np.maximum(sizes[1:, :, None], 1)  # a relation without prompts in a draw adds 0 to every sum
    covariance, of_x, of_y = ((s - a * b / held).sum(axis=1) for s, a, b in ((xy, x, y), (xx, x, x), (yy, y, y)))
    varies = np.minimum(of_x, of_y) > CONSTANT**2
    return np.where(varies, covariance / np.sqrt(np.where(varies, of_x * of_y, 1.0)), np.nan)


def _experts(routing: pl.DataFrame, prompts: pl.DataFrame, by: str) -> _Units:
    if by not in BY:
        raise AssociationError(f"experts by {by!r} are unknown; set collaboration.association to {' or '.join(BY)}")
    if routing[by].null_count():
        layer = routing.filter(pl.col(by).is_null())["layer"].min()
        raise AssociationError(
            f"layer {layer}: the routers of this family tell no probability; set collaboration.association to weight"
        )
    return _Units.of(routing, "expert", by, prompts)


def _telling(stratum: np.ndarray, inside: np.ndarray) -> np.ndarray | None:
    """Rows inside that are not alone in their stratum; None where they are too few."""
    sizes = np.bincount(stratum[inside], minlength=stratum.max(initial=0) + 1)
    rows = np.flatnonzero(inside & (sizes[stratum] > 1))
    return rows if len(rows) >= FEWEST else None


def _standardised(values: np.ndarray, stratum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of mean 0 within strata and length 1, and which of them vary; those that do not are 0."""
    centred = values.copy()
    for one in np.unique(stratum):
        centred[stratum == one] -= values[stratum == one].mean(axis=0)
    length = np.sqrt((centred**2).sum(axis=0))
    varies = length > CONSTANT * np.sqrt((values**2).sum(axis=0))
    return np.divide(centred, length, out=np.zeros_like(centred), where=varies), varies
