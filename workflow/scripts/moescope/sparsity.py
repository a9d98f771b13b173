"""Is a mixture of experts more stable and more concentrated than sparsity alone makes it?

Neurons that are not routed to score nothing, so overlaps of top sets and shares of sums are partly mechanical. A
mixture and a dense model, scored on the same prompts, are held against each other in five ways:

- ``plain``: as they are, which answers nothing;
- ``N1``: what their overlaps exceed dealing at random within experts (mixture) or layers (dense) by; stability only;
- ``N2``: against the dense model seen through the mixture's routing;
- ``N3``: per prompt, among active neurons alone;
- ``N4``: at the top 1% of the neurons that are active in a prompt, against the dense model's top 1%.

Only what exceeds under N2, N3 and N4, intervals included, is called more than sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from moescope import prompt_dynamics, tables
from moescope.relations import GROUPS
from moescope.statistics import jackknife, percentiles, rounding_variance

#: What is claimed of a mixture: the metric of all neurons, and the metric within prompts.
CLAIMS = {
    "stability": ("jaccard", "jaccard"),
    "gain": ("gain_share", "positive_share"),
    "importance": ("positive_share", "positive_share"),
}
#: The tests that a claim must pass, and against what.
TESTS = {
    "N2": "the dense model under the same routing (N2)",
    "N3": "the dense model among a prompt's active neurons (N3)",
    "N4": "the dense model at the matched fraction (N4)",
}
_WITHOUT = [f"without_{g}" for g in range(GROUPS)]


class SeriesTables(NamedTuple):
    """A series' name, its table ``neuron_dynamics`` and its table ``prompt_dynamics`` (None: there is none)."""

    name: str
    neurons: pl.DataFrame
    prompts: pl.DataFrame | None


def sparsity(
    moe: SeriesTables,
    dense: SeriesTables,
    prompts: pl.DataFrame,
    window: tuple[int, int] | None = None,
    mask_seeds: int = 5,
    seed: int = 0,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The FFN neurons of a mixture and of a dense model, as the tables ``sparsity`` and ``verdict``.

    Every figure is a mean over the pairs of consecutive checkpoints that both series have, within ``window`` (steps,
    both ends included; the whole series by default), shares of one checkpoint over the later ones of these pairs; where
    the series have no pair in common, over each one's own between the latest first and the earliest last step. A pair
    that either of them has no value for is left out of both. Differences are mixture minus dense: by the jackknife over
    the same ten groups of subjects, the seeds of the masks (``mask_seeds`` of them) added for N2 as if their
    deviations were the same at every step; N3 by the same draws of subjects. ``exceeds``: the interval lies above 0.
    The verdict is null where N2, N3 or N4 is not available.
    """
    steps = _Steps.of(moe.neurons, dense.neurons, window)
    of_prompts = {one.name: _prompt_courses(one.prompts, prompts, seed) for one in (moe, dense)}
    rows = []
    for claim, (metric, within) in CLAIMS.items():
        tests = {
            "plain": (("all", metric), ("all", metric)),
            "N2": (("all", metric), ("masked", metric)),
            "N4": (("matched", metric), ("all", metric)),
        }
        if claim == "stability":
            tests["N1"] = (("all", "excess_given_expert"), ("all", "excess_given_layer"))
        results = {
            test: _by_groups(_course(moe.neurons, *left), _course(dense.neurons, *right), steps, mask_seeds)
            for test, (left, right) in tests.items()
        }
        results["N3"] = _by_draws(*(of_prompts[one.name].get(within, {}) for one in (moe, dense)), steps)
        rows += [(moe.name, dense.name, claim, test, *_flat(result)) for test, result in results.items()]
    frame = pl.DataFrame(rows, schema=tables.SCHEMAS["sparsity"].columns, orient="row")
    frame = tables.check(frame.with_columns(pl.selectors.float().fill_nan(None)), "sparsity")
    return frame, _verdict(frame, steps)


@dataclass(frozen=True)
class _Steps:
    """The steps that end the pairs which are averaged: of the mixture, of the dense model; equal if ``common``."""

    moe: tuple[int, ...]
    dense: tuple[int, ...]
    common: bool

    @classmethod
    def of(cls, moe: pl.DataFrame, dense: pl.DataFrame, window: tuple[int, int] | None) -> _Steps:
        pairs = []
        for frame in (moe, dense):
            rows = frame.filter(component="ffn", population="all", average="micro", metric="jaccard")
            found = rows.select("step_from", "step").rows()
            pairs.append([(a, b) for a, b in found if window is None or (window[0] <= a and b <= window[1])])
        if common := sorted(set(pairs[0]) & set(pairs[1])):
            ends = tuple(b for _, b in common)
            return cls(ends, ends, True)
        if not all(pairs):
            return cls((), (), True)
        first = max(min(a for a, _ in one) for one in pairs)
        last = min(max(b for _, b in one) for one in pairs)
        return cls(*(tuple(b for a, b in one if first <= a and b <= last) for one in pairs), False)

    def both(self, moe: dict, dense: dict) -> tuple[list[int], list[int]]:
        """The steps of either that have something; only those of both where they go together."""
        left, right = ([s for s in steps if s in held] for steps, held in ((self.moe, moe), (self.dense, dense)))
        if self.common:
            left = right = [s for s in left if s in right]
        return left, right


class _Result(NamedTuple):
    """Value, low and high of the mixture, of the dense model and of their difference; NaN: not available."""

    moe: tuple
    dense: tuple
    difference: tuple


_NOTHING = _Result(*[(np.nan,) * 3] * 3)


def _flat(result: _Result) -> list:
    low = float(result.difference[1])
    return [*(float(end) for ends in result for end in ends), None if np.isnan(low) else low > 0]


def _course(frame: pl.DataFrame, population: str, metric: str) -> dict[int, np.ndarray]:
    """By step: the value, the values without each group, spread over seeds and resolution (0: there is none)."""
    rows = frame.filter(component="ffn", population=population, average="micro", metric=metric).drop_nulls("value")
    unseen = pl.col("spread", "resolution").fill_null(0.0)
    columns = rows.select("value", *_WITHOUT, unseen).to_numpy().astype(np.float64)
    return dict(zip(rows["step"].to_list(), columns, strict=True))


def _by_groups(moe: dict, dense: dict, steps: _Steps, mask_seeds: int) -> _Result:
    chosen = steps.both(moe, dense)
    if not all(chosen):
        return _NOTHING
    sides = []
    for held, own in zip((moe, dense), chosen, strict=True):
        course = np.array([held[s] for s in own])
        value, *without, spread, _ = course.mean(axis=0)
        rounded = rounding_variance(course[:, -1]).sum() / len(course) ** 2
        sides.append((value, np.array(without), spread**2 / mask_seeds + rounded))
    (value, without, variance), (other, other_without, other_variance) = sides
    sides.append((value - other, without - other_without, variance + other_variance))
    return _Result(*((one[0], *jackknife(*one)) for one in sides))


def _prompt_courses(frame: pl.DataFrame | None, prompts: pl.DataFrame, seed: int) -> dict[str, dict[int, np.ndarray]]:
    """By metric and step: the mean over prompts in the sample and in every draw of subjects."""
    courses: dict[str, dict[int, np.ndarray]] = {}
    if frame is not None:
        for mean in prompt_dynamics.means(frame.filter(component="ffn"), prompts, seed):
            if mean.sums is not None:
                courses.setdefault(mean.metric, {})[mean.step] = mean.sums.draws()[:, 0]
    return courses


def _by_draws(moe: dict, dense: dict, steps: _Steps) -> _Result:
    chosen = steps.both(moe, dense)
    if not all(chosen):
        return _NOTHING
    means = [np.mean([held[s] for s in own], axis=0) for held, own in zip((moe, dense), chosen, strict=True)]
    means.append(means[0] - means[1])
    low, high = percentiles(np.stack(means, axis=1)[1:])
    return _Result(*((mean[0], low[i], high[i]) for i, mean in enumerate(means)))


def _verdict(frame: pl.DataFrame, steps: _Steps) -> pl.DataFrame:
    rows = []
    for (moe, dense, claim), tests in frame.group_by(["moe", "dense", "claim"], maintain_order=True):
        exceeds = dict(tests.filter(pl.col("test").is_in(list(TESTS))).select("test", "exceeds").iter_rows())
        beyond = None if None in exceeds.values() else all(exceeds.values())
        rows.append((moe, dense, claim, beyond, _because(exceeds, steps)))
    return tables.check(pl.DataFrame(rows, schema=tables.SCHEMAS["verdict"].columns, orient="row"), "verdict")


def _because(exceeds: dict[str, bool | None], steps: _Steps) -> str:
    """One sentence: which tests are passed, which failed, which were not available."""
    parts = []
    for outcome, words, last in (
        (True, "exceeds", "and"),
        (False, "does not exceed", "or"),
        (None, "could not be held against", "or"),
    ):
        if named := [TESTS[test] for test in TESTS if exceeds[test] is outcome]:
            parts.append(f"{words} {_listing(named, last)}")
    apart = "" if steps.common else " (averaged over each series' own steps, as they have no pair in common)"
    return f"The mixture of experts {_listing(parts, 'and')}{apart}."


def _listing(words: list[str], last: str) -> str:
    """a, b and c."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
