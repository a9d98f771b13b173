"""Sets of the most important neurons: which they are, how they overlap, and what share of a sum they hold.

A set is an ascending array of indices, or a ``Part``, whose members need not count whole: a top share is either rounded
up to whole neurons (``top``) or exact (``exact_top``). Importance is a mean log-probability increase in nats. Where a
component is taken layer by layer, its neurons stand layer after layer and ``bounds`` [layers + 1] are the places where
layers begin and the last one ends; ``whole`` makes one layer of all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from moescope.statistics import ZERO

#: The share that the study is about: "the top 1%".
TOP = Fraction(1, 100)


def count(share: Fraction | float, n: int) -> int:
    """ceil(share x n), exactly: 0.07 is seven hundredths, not the binary number nearest to it."""
    return math.ceil(Fraction(str(share)) * n)


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of values [n], ascending; ties go to the lower index. k beyond n takes all."""
    if k >= len(values):
        return np.arange(len(values))
    if k == 0:
        return np.empty(0, dtype=np.intp)
    least = np.partition(values, len(values) - k)[-k]
    chosen = np.flatnonzero(values >= least)
    if surplus := len(chosen) - k:
        ties = np.flatnonzero(values[chosen] == least)
        chosen = np.delete(chosen, ties[-surplus:])
    return chosen


def top(importance: np.ndarray, share: Fraction | float = TOP, bounds: np.ndarray | None = None) -> np.ndarray:
    """The top share of values [n], ceil(share x n) of them; with ``bounds`` that of every layer."""
    bounds = whole(importance) if bounds is None else bounds
    return np.concatenate([at + largest(importance[at:end], count(share, end - at)) for at, end in _layers(bounds)])


class Part(NamedTuple):
    """A set of which the member ``chosen`` [members], ascending indices, counts ``weight`` [members], from 0 to 1."""

    chosen: np.ndarray
    weight: np.ndarray


Members = np.ndarray | Part


def leading(values: np.ndarray, x: Fraction) -> Part:
    """The x largest of values [n]: as many as are whole, and the next one with the weight x - floor(x)."""
    chosen = largest(values, math.ceil(x))
    weight = np.ones(len(chosen))
    if len(chosen):
        last = len(chosen) - 1 - np.argmin(values[chosen][::-1])  # of equal ones, that of the highest index
        weight[last] = 1 - float(math.ceil(x) - x)
    return Part(chosen, weight)


def exact_top(importance: np.ndarray, share: Fraction | float = TOP, bounds: np.ndarray | None = None) -> Part:
    """The top share of values [n], exactly share x n of them (of every layer): the last one counts in part.

    For comparisons between different n, which ceil(share x n) would make at different shares.
    """
    bounds, share = whole(importance) if bounds is None else bounds, Fraction(str(share))
    layers = [(at, leading(importance[at:end], share * (end - at))) for at, end in _layers(bounds)]
    return Part(
        np.concatenate([at + layer.chosen for at, layer in layers]),
        np.concatenate([layer.weight for _, layer in layers]),
    )


def whole(importance: np.ndarray) -> np.ndarray:
    """The bounds that make one layer of all neurons."""
    return np.array([0, len(importance)])


def _layers(bounds: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def size(a: Members) -> float:
    """Number of members, each as much as it counts."""
    return float(a.weight.sum()) if isinstance(a, Part) else len(a)


def overlap(a: Members, b: Members) -> float:
    """Number of neurons in both sets, of two sets or two parts; of a neuron the lesser of its weights."""
    if not isinstance(a, Part):
        return len(np.intersect1d(a, b, assume_unique=True))
    _, in_a, in_b = np.intersect1d(a.chosen, b.chosen, assume_unique=True, return_indices=True)
    return float(np.minimum(a.weight[in_a], b.weight[in_b]).sum())


def jaccard(a: Members, b: Members) -> float:
    """J = |a and b| / |a or b|; random sets of a share p of many neurons have p / (2 - p), 0.00503 for 1%.

    Of parts the weighted J, sum min(w_a, w_b) / sum max(w_a, w_b) (Ruzicka).
    """
    return jaccard_of_overlap(overlap(a, b), size(a), size(b))


def jaccard_of_overlap(common: float, a: float, b: float) -> float:
    """J of two sets with a and b members of which so many are common; NaN for two empty ones."""
    return common / (a + b - common) if a + b else math.nan


def resolution(a: Members, b: Members) -> float:
    """What one neuron more in both of two sets of one size adds to their J (one set: what one less would take)."""
    n = size(a)
    one = min(1.0, n)
    common = min(overlap(a, b), n - one)
    return jaccard_of_overlap(common + one, n, size(b)) - jaccard_of_overlap(common, n, size(b))


def survival(a: Members, b: Members) -> float:
    """The share of a's neurons that are in b too; NaN where a is empty."""
    return overlap(a, b) / size(a) if size(a) else math.nan


def positive(values: np.ndarray) -> np.ndarray:
    """max(value, 0), where what is not above 1e-7 nats is nothing."""
    return np.where(values > ZERO, values, 0.0)


class Positives:
    """The positive parts of values [n], of which sets of neurons hold shares; by layer the mean of the layers' shares.

    A layer without positive values has no share and is left out; where no layer has any, the share is NaN.
    """

    def __init__(self, values: np.ndarray, bounds: np.ndarray | None = None) -> None:
        self._parts = positive(values)
        self._limit(whole(values) if bounds is None else bounds)

    def _limit(self, bounds: np.ndarray) -> None:
        self.bounds = bounds
        self._totals = np.add.reduceat(self._parts, bounds[:-1])

    def within(self, bounds: np.ndarray) -> Positives:
        """The same, layer by layer."""
        other = copy.copy(self)
        other._limit(bounds)
        return other

    def share(self, members: Members) -> float:
        """What the members hold."""
        chosen, weight = members if isinstance(members, Part) else (members, 1.0)
        ends = np.searchsorted(chosen, self.bounds)
        held = np.diff(np.concatenate([[0.0], np.cumsum(self._parts[chosen] * weight)])[ends])
        some = self._totals > 0
        return float((held[some] / self._totals[some]).mean()) if some.any() else math.nan


def positive_share(
    importance: np.ndarray, share: Fraction | float = TOP, choose: Callable[..., Members] = top
) -> float:
    """The share of all positive importance that the top share of neurons by signed importance holds.

    ``choose``: what makes the top share, ``top`` or ``exact_top``.
    """
    return Positives(importance).share(choose(importance, share))


#: The readings of positive-gain concentration: what ranks the neurons, and within what.
READINGS = {
    "gain_share": ("gain", "model"),
    "gain_share_layer": ("gain", "layer"),
    "gain_share_by_importance": ("importance", "model"),
    "gain_share_by_importance_layer": ("importance", "layer"),
}


def gain_shares(
    before: np.ndarray,
    after: np.ndarray,
    bounds: np.ndarray,
    share: Fraction | float = TOP,
    choose: Callable[..., Members] = top,
) -> dict[str, float]:
    """Positive-gain concentration R from importance [n] at two checkpoints, in the four readings of ``READINGS``.

    R = sum over T of dI+ / sum over all of dI+, dI+ = max(after - before, 0); T is the top share of neurons by dI or
    by (signed) importance at the later checkpoint, of the whole model or of each layer (then R is the layers' mean).
    ``choose``: what makes T, ``top`` or ``exact_top``.
    """
    gain = after - before
    ranked_by = {"gain": gain, "importance": after}
    positives = Positives(gain)
    gains = {"model": positives, "layer": positives.within(bounds)}
    return {
        name: gains[scope].share(choose(ranked_by[rank], share, gains[scope].bounds))
        for name, (rank, scope) in READINGS.items()
    }


def expected_overlap(a: np.ndarray, b: np.ndarray, group: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Mean and variance of |a and b| if the members of both were dealt at random within groups.

    ``group`` [n] is each neuron's group, ``sizes`` [groups] how many neurons a group has. With a_g, b_g members in
    group g of n_g neurons the overlap is hypergeometric: mean sum a_g b_g / n_g, variance
    sum a_g b_g (n_g - a_g)(n_g - b_g) / (n_g^2 (n_g - 1)).
    """
    in_a, in_b = (np.bincount(group[one], minlength=len(sizes)).astype(np.float64) for one in (a, b))
    mean = in_a * in_b / sizes
    variance = mean * (sizes - in_a) * (sizes - in_b) / (sizes * np.maximum(sizes - 1.0, 1.0))
    return float(mean.sum()), float(variance.sum())
