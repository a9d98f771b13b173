"""Scores from ranks, and their uncertainty by resampling subjects.

The unit that is resampled is the subject, jointly over all relations it occurs in: prompts that share a subject are
not independent. The draws depend on nothing but the set of subjects and the seed, so that two checkpoints, models or
metrics are compared on the same draws. Intervals are 95% percentile intervals (Efron and Tibshirani 1993, section
13.3); they suit means and rates, not set overlaps: those have the delete-a-group jackknife (Kott 2001).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from moescope.errors import MoescopeError

DRAWS = 2000
LEVEL = 0.95
#: Importance below this (in nats) counts as zero for signs and shares.
ZERO = 1e-7


class StatisticsError(MoescopeError):
    """Numbers from which the asked statistic cannot be computed."""


def hits(rank: ArrayLike, k: int) -> np.ndarray:
    """1.0 where the target stands among the k first tokens (rank <= k, ranks from 1), else 0.0; HIT@k is its mean."""
    return (_ranks(rank) <= k).astype(np.float64)


def reciprocal_ranks(rank: ArrayLike) -> np.ndarray:
    """1 / rank, ranks from 1; the mean reciprocal rank (MRR) is its mean."""
    return 1.0 / _ranks(rank)


def _ranks(rank: ArrayLike) -> np.ndarray:
    ranks = np.asarray(rank)
    if ranks.size and ranks.min() < 1:
        raise StatisticsError(f"a rank of {ranks.min()}: ranks count from 1; score the checkpoint again")
    return ranks


@dataclass(frozen=True)
class Estimate:
    """Values of some columns with their intervals, each of shape [columns]; no interval is NaN."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class SubjectBootstrap:
    """How often every subject occurs in the sample (row 0: once) and in each of the draws (the other rows).

    ``subjects`` is sorted; ``counts`` is [1 + draws, subjects], each row summing to the number of subjects.
    """

    subjects: tuple[str, ...]
    counts: np.ndarray

    @classmethod
    def draw(cls, subjects: Iterable[str], seed: int = 0, draws: int = DRAWS) -> SubjectBootstrap:
        """Draw as many subjects as there are, with replacement, ``draws`` times.

        Order and repetition of ``subjects`` change nothing. Raises StatisticsError where there is none.
        """
        names = tuple(sorted(set(subjects)))
        if not names:
            raise StatisticsError("there is no subject to resample: the prompt table is empty")
        digest = hashlib.sha256("\0".join(names).encode()).digest()
        random = np.random.default_rng([seed, *np.frombuffer(digest, dtype="<u4").tolist()])
        drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
        return cls(names, np.vstack([np.ones(len(names)), drawn]))

    def positions(self, subjects: Sequence[str]) -> np.ndarray:
        """Where each subject stands in ``self.subjects``, [prompts]; an unknown one raises StatisticsError."""
        position = {name: i for i, name in enumerate(self.subjects)}
        if unknown := [name for name in subjects if name not in position]:
            raise StatisticsError(f"subject {unknown[0]!r} is not among the subjects that are resampled")
        return np.fromiter((position[name] for name in subjects), dtype=np.int64, count=len(subjects))

    def resample(self, values: ArrayLike, subject: np.ndarray, stratum: ArrayLike | None = None) -> Resamples:
        """Sums of the prompts' values in the sample and in every draw.

        ``values`` is [prompts, columns], ``subject`` [prompts] positions among the subjects, ``stratum`` [prompts]
        non-negative integers (the relation; left out: all prompts are one stratum). Holds (1 + draws) x strata x
        columns float64: 16 kB a stratum and column.
        """
        values = np.asarray(values, dtype=np.float64)
        prompts, columns = values.shape
        stratum = np.zeros(prompts, dtype=np.int64) if stratum is None else np.asarray(stratum, dtype=np.int64)
        strata = int(stratum.max()) + 1 if prompts else 1
        totals = np.zeros((len(self.subjects), strata, columns))
        sizes = np.zeros((len(self.subjects), strata))
        np.add.at(totals, (subject, stratum), values)
        np.add.at(sizes, (subject, stratum), 1.0)
        drawn = self.counts @ totals.reshape(len(self.subjects), -1)
        return Resamples(drawn.reshape(-1, strata, columns), self.counts @ sizes, sizes > 0)


@dataclass(frozen=True)
class Resamples:
    """Sums over prompts: ``totals`` [1 + draws, strata, columns], ``sizes`` [1 + draws, strata] numbers of prompts.

    Row 0 is the sample itself. ``present`` [subjects, strata] tells where a subject occurs.
    """

    totals: np.ndarray
    sizes: np.ndarray
    present: np.ndarray

    def micro(self, strata: Sequence[int] | None = None) -> Estimate:
        """Mean over all prompts of these strata (all strata by default): a ratio of sums in every draw."""
        return self._estimate(self.draws("micro", strata), self._chosen(strata))

    def macro(self, strata: Sequence[int] | None = None) -> Estimate:
        """Mean over these strata of their prompts' means; a stratum without prompts in a draw is left out of it."""
        return self._estimate(self.draws("macro", strata), self._chosen(strata))

    def draws(self, average: str = "micro", strata: Sequence[int] | None = None) -> np.ndarray:
        """The ``micro`` or ``macro`` mean in the sample (row 0) and in every draw, [1 + draws, columns].

        NaN where a draw holds no prompt of these strata. What is computed from several means (differences, ratios) has
        its interval in the percentiles of the same thing computed in every row.
        """
        chosen = self._chosen(strata)
        with np.errstate(invalid="ignore"):
            if average == "micro":
                return self.totals[:, chosen].sum(axis=1) / self.sizes[:, chosen].sum(axis=1)[:, None]
            totals, sizes = self.totals[:, chosen], self.sizes[:, chosen, None]
            means = np.divide(totals, sizes, out=np.zeros(totals.shape), where=sizes > 0)
            return means.sum(axis=1) / (sizes > 0).sum(axis=1)

    def subjects(self, strata: Sequence[int] | None = None) -> int:
        """Number of subjects with prompts of these strata; fewer than two give no interval."""
        return int(self.present[:, self._chosen(strata)].any(axis=1).sum())

    def prompts(self, strata: Sequence[int] | None = None) -> int:
        """Number of prompts of these strata in the sample."""
        return round(float(self.sizes[0, self._chosen(strata)].sum()))

    def _chosen(self, strata: Sequence[int] | None) -> np.ndarray:
        return np.arange(self.sizes.shape[1]) if strata is None else np.asarray(strata, dtype=np.int64)

    def _estimate(self, means: np.ndarray, strata: np.ndarray) -> Estimate:
        value = means[0]
        if self.subjects(strata) < 2:
            return Estimate(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
        return Estimate(value, *percentiles(means[1:]))


def percentiles(draws: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the central interval of every column of [draws, columns]; draws that are NaN (no prompt) do not count."""
    tails = [50 * (1 - level), 50 * (1 + level)]
    ends = np.full((2, draws.shape[1]), np.nan)
    gaps = np.isnan(draws)
    whole, some = ~gaps.any(axis=0), gaps.any(axis=0) & ~gaps.all(axis=0)
    ends[:, whole] = np.percentile(draws[:, whole], tails, axis=0)
    ends[:, some] = np.nanpercentile(draws[:, some], tails, axis=0)
    return ends[0], ends[1]


def jackknife(value: ArrayLike, without: ArrayLike, variance: ArrayLike = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95% interval value -+ t(G - 1) x delete-a-group jackknife standard error, both of value's shape.

    ``value`` [...] is the statistic of all subjects, ``without`` [..., groups] the same without each of the groups,
    NaN (or null) where a group has no prompts: it does not count among the G. ``variance`` [...] of an independent
    source (seeds) is added. NaN where the value is, or where fewer than two groups are left.
    """
    value = np.asarray(value, dtype=np.float64)
    error, groups = jackknife_error(without)
    quantile = stdtrit(np.maximum(groups - 1, 1), 0.5 + LEVEL / 2)
    reach = quantile * np.sqrt(error**2 + np.asarray(variance, dtype=np.float64))
    return value - reach, value + reach


def rounding_variance(resolution: ArrayLike, groups: int = 10) -> np.ndarray:
    """The variance that the jackknife cannot see in a statistic that moves by steps of ``resolution``.

    Each of the G values without a group is rounded to a whole step, which leaves resolution^2 / 12; the jackknife
    multiplies the spread of these values by G - 1. Without it a small set whose members no group changes would have an
    interval of no width.
    """
    return (groups - 1) / 12 * np.asarray(resolution, dtype=np.float64) ** 2


def jackknife_error(without: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Standard error and number of groups G of a statistic, from its values without each group, [..., groups].

    SE^2 = (G - 1) / G x sum over groups of (theta_(g) - mean of theta_(g))^2 (after Kott 2001, J. Off. Stat. 17, 521);
    NaN values are groups without prompts; fewer than two groups have no error (NaN).
    """
    without = np.asarray(without, dtype=np.float64)
    held = ~np.isnan(without)
    groups = held.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(held, without, 0.0).sum(axis=-1) / groups
        squares = np.where(held, without - mean[..., None], 0.0) ** 2
        error = np.sqrt((groups - 1) / groups * squares.sum(axis=-1))
    return np.where(groups > 1, error, np.nan), groups
