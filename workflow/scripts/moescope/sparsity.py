"""Is a mixture of experts more stable and more concentrated than sparsity alone makes it?

Neurons that are not routed to score nothing, so overlaps of top sets and shares of sums are partly mechanical. A
mixture and a dense model, scored on the same prompts, are held against each other in five ways:

- ``plain``: as they are, which answers nothing;
- ``N1``: what their overlaps exceed dealing at random within experts (mixture) or layers (dense) by; stability only;
- ``N2``: against the dense model seen through the mixture's routing;
- ``N3``: per prompt, among active neurons alone;
- ``N4``: at the top 1% of the neurons that are active in a prompt, against the dense model's top 1%, both exactly 1%.

In N3 a prompt that changed experts may have no overlap, as lists end: most often one whose overlap is low. Intervals
therefore hold what such prompts could do at worst.

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
    deviations were the same at every step; N3 by the same draws of subjects. The values of N3 are means over the
    prompts that have one; its intervals are worst-case bounds: low ends are those of means in which the prompts that
    are left out count 0, high ends of means in which they count 1; of the difference the lower end has them at 0 in the
    mixture and at 1 in the dense model, the upper end the other way round. ``pairs``: how many were averaged, the fewer
    of both series. ``exceeds``: the interval lies above 0. The verdict is null where N2, N3 or N4 is not available.
    """
    steps = _Steps.of(moe.neurons, dense.neurons, window)
    of_prompts = {one.name: _prompt_courses(one.prompts, prompts, seed) for one in (moe, dense)}
    rows, left_out = [], {}
    for claim, (metric, within) in CLAIMS.items():
        tests = {
            "plain": (("all", metric), ("all", metric)),
            "N2": (("all", metric), ("masked", metric)),
            "N4": (("matched", metric), ("matched", metric)),
        }
        if claim == "stability":
            tests["N1"] = (("all", "excess_given_expert"), ("all", "excess_given_layer"))
        results = {
            test: _by_groups(_course(moe.neurons, *left), _course(dense.neurons, *right), steps, mask_seeds)
            for test, (left, right) in tests.items()
        }
        courses = (of_prompts[one.name].get(within, {}) for one in (moe, dense))
        results["N3"], left_out[claim] = _by_draws(*courses, steps)
        rows += [(moe.name, dense.name, claim, test, *_flat(result)) for test, result in results.items()]
    frame = pl.DataFrame(rows, schema=tables.SCHEMAS["sparsity"].columns, orient="row")
    frame = tables.check(frame.with_columns(pl.selectors.float().fill_nan(None)), "sparsity")
    return frame, _verdict(frame, left_out, steps)


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
    """Value, low and high of the mixture, of the dense model and of their difference; NaN: not available. And the
    number of pairs of checkpoints averaged."""

    moe: tuple
    dense: tuple
    difference: tuple
    pairs: int


_NOTHING = _Result(*[(np.nan,) * 3] * 3, 0)


class _PromptCourse(NamedTuple):
    """A mean over prompts at one step: of those that have a value (NaN: none has); in every draw of subjects with the
    others at 0, and at 1; how many these are, and how many there are in all."""

    value: float
    least: np.ndarray
    most: np.ndarray
    left_out: int
    prompts: int


def _flat(result: _Result) -> list:
    low = float(result.difference[1])
    ends = (float(end) for ends in result[:-1] for end in ends)
    return [*ends, result.pairs, None if np.isnan(low) else low > 0]


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
    return _Result(*((one[0], *jackknife(*one)) for one in sides), min(map(len, chosen)))


def _prompt_courses(
    frame: pl.DataFrame | None, prompts: pl.DataFrame, seed: int
) -> dict[str, dict[int, _PromptCourse]]:
    """By metric and step; without what no prompt has at any step."""
    courses: dict[str, dict[int, _PromptCourse]] = {}
    if frame is not None:
        rows = frame.filter(component="ffn")
        ways = (prompt_dynamics.means(rows, prompts, seed, missing) for missing in (None, 0.0, 1.0))
        for known, least, most in zip(*ways, strict=True):
            value = np.nan if known.sums is None else known.sums.draws()[0, 0]
            ends = (one.sums.draws()[1:, 0] for one in (least, most))
            counts = known.left_out, known.prompts + known.left_out
            courses.setdefault(known.metric, {})[known.step] = _PromptCourse(value, *ends, *counts)
    return {m: held for m, held in courses.items() if not all(np.isnan(one.value) for one in held.values())}


def _by_draws(
    moe: dict[int, _PromptCourse], dense: dict[int, _PromptCourse], steps: _Steps
) -> tuple[_Result, list[tuple[int, int]]]:
    """The result; and of the mixture and the dense model how many prompts were left out, of how many, pair by pair."""
    known = [{step: one.value for step, one in held.items() if not np.isnan(one.value)} for held in (moe, dense)]
    if not all(chosen := steps.both(*known)):
        return _NOTHING, []
    values = [np.mean([held[step] for step in own]) for held, own in zip(known, chosen, strict=True)]
    chosen = steps.both(moe, dense)
    sides = [[held[step] for step in own] for held, own in zip((moe, dense), chosen, strict=True)]
    least = [np.mean([one.least for one in side], axis=0) for side in sides]
    most = [np.mean([one.most for one in side], axis=0) for side in sides]
    low, _ = percentiles(np.transpose([*least, least[0] - most[1]]))
    _, high = percentiles(np.transpose([*most, most[0] - least[1]]))
    result = _Result(*zip([*values, values[0] - values[1]], low, high, strict=True), min(map(len, chosen)))
    return result, [(sum(one.left_out for one in side), sum(one.prompts for one in side)) for side in sides]


def _verdict(frame: pl.DataFrame, left_out: dict[str, list[tuple[int, int]]], steps: _Steps) -> pl.DataFrame:
    rows = []
    for (moe, dense, claim), tests in frame.group_by(["moe", "dense", "claim"], maintain_order=True):
        asked = tests.filter(pl.col("test").is_in(list(TESTS)))
        exceeds = dict(asked.select("test", "exceeds").iter_rows())
        beyond = None if None in exceeds.values() else all(exceeds.values())
        pairs = asked.filter(pl.col("pairs") > 0)["pairs"].unique().sort().to_list()
        because = " ".join([_outcomes(exceeds, pairs, steps), *_remarks(claim, exceeds["N3"], left_out[claim])])
        rows.append((moe, dense, claim, beyond, because))
    return tables.of_rows(rows, "verdict")


def _outcomes(exceeds: dict[str, bool | None], pairs: list[int], steps: _Steps) -> str:
    """One sentence: which tests are passed, which failed, which were not available, and over how many pairs."""
    parts = {}
    for outcome, words, last in (
        (True, "exceeds", "and"),
        (False, "does not exceed", "or"),
        (None, "could not be held against", "or"),
    ):
        if named := [TESTS[test] for test in TESTS if exceeds[test] is outcome]:
            parts[outcome] = f"{words} {_listing(named, last)}"
    passed, others = parts.pop(True, ""), ", and ".join(parts.values())
    outcome = ", but ".join(filter(None, [passed, others]))
    if not pairs:
        return f"The mixture of experts {outcome}."
    number = " to ".join(str(n) for n in dict.fromkeys((pairs[0], pairs[-1])))
    apart = "" if steps.common else " (each series' own, as they have none in common)"
    return (
        f"Averaged over {number} pair{'s' * (pairs[-1] > 1)} of checkpoints{apart}, the mixture of experts {outcome}."
    )


def _remarks(claim: str, exceeds: bool | None, left_out: list[tuple[int, int]]) -> list[str]:
    """What N3 is made of, sentence by sentence, where it is available."""
    if exceeds is None:
        return []
    said = []
    if claim == "gain":
        said.append("N3 is the share of positive LPI: within a prompt no gain is defined.")
    (moe, of_moe), (dense, of_dense) = left_out
    if moe or dense:
        said.append(
            f"In N3 left-out prompts are counted against it: {moe:,} of {of_moe:,} of the mixture and {dense:,} of "
            f"{of_dense:,} of the dense model, all pairs together."
        )
    return said


def _listing(words: list[str], last: str) -> str:
    """a, b and c."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
