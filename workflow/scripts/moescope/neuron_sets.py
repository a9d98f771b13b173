"""Sets of the most important neurons: which they are, how they overlap, and what share of a sum they hold.

A set is an ascending array of indices. Importance is a mean log-probability increase in nats. Where a component is
taken layer by layer, its neurons stand layer after layer and ``bounds`` [layers + 1] are the places where layers begin
and the last one ends; ``whole`` makes one layer of all.
"""

from __future__ import annotations

import copy
import math
from fractions import Fraction

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


def whole(importance: np.ndarray) -> np.ndarray:
    """The bounds that make one layer of all neurons."""
    return np.array([0, len(importance)])


def _layers(bounds: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def overlap(a: np.ndarray, b: np.ndarray) -> int:
    """Number of neurons in both sets."""
    return len(np.intersect1d(a, b, assume_unique=True))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """J = |a and b| / |a or b|; random sets of a share p of many neurons have p / (2 - p), 0.00503 for 1%."""
    return jaccard_of_overlap(overlap(a, b), len(a), len(b))


def jaccard_of_overlap(common: float, a: int, b: int) -> float:
    """J of two sets with a and b members of which so many are common; NaN for two empty ones."""
    return common / (a + b - common) if a + b else math.nan


def resolution(a: np.ndarray, b: np.ndarray) -> float:
    """What one neuron more in both of two sets of one size adds to their J (one set: what one less would take)."""
    common = min(overlap(a, b), len(a) - 1)
    return jaccard_of_overlap(common + 1, len(a), len(b)) - jaccard_of_overlap(common, len(a), len(b))


def survival(a: np.ndarray, b: np.ndarray) -> float:
    """The share of a's neurons that are in b too; NaN where a is empty."""
    return overlap(a, b) / len(a) if len(a) else math.nan


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

    def share(self, chosen: np.ndarray) -> float:
        """What the chosen neurons hold."""
        ends = np.searchsorted(chosen, self.bounds)
        held = np.diff(np.concatenate([[0.0], np.cumsum(self._parts[chosen])])[ends])
        some = self._totals > 0
        return float((held[some] / self._totals[some]).mean()) if some.any() else math.nan


def positive_share(importance: np.ndarray, share: Fraction | float = TOP) -> float:
    """The share of all positive importance that the top share of neurons by signed importance holds."""
    return Positives(importance).share(top(importance, share))


#: The readings of positive-gain concentration: what ranks the neurons, and within what.
READINGS = {
    "gain_share": ("gain", "model"),
    "gain_share_layer": ("gain", "layer"),
    "gain_share_by_importance": ("importance", "model"),
    "gain_share_by_importance_layer": ("importance", "layer"),
}


def gain_shares(
    before: np.ndarray, after: np.ndarray, bounds: np.ndarray, share: Fraction | float = TOP
) -> dict[str, float]:
    """Positive-gain concentration R from importance [n] at two checkpoints, in the four readings of ``READINGS``.

    R = sum over T of dI+ / sum over all of dI+, dI+ = max(after - before, 0); T is the top share of neurons by dI or
    by (signed) importance at the later checkpoint, of the whole model or of each layer (then R is the layers' mean).
    """
    gain = after - before
    ranked_by = {"gain": gain, "importance": after}
    positives = Positives(gain)
    gains = {"model": positives, "layer": positives.within(bounds)}
    return {
        name: gains[scope].share(top(ranked_by[rank], share, gains[scope].bounds))
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
