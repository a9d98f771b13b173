"""Scores, the subject bootstrap and the jackknife, against naive loops, hand-made cases and simulated coverage."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from moescope import statistics
from moescope.statistics import (
    DRAWS,
    StatisticsError,
    SubjectBootstrap,
    hits,
    jackknife,
    jackknife_error,
    percentiles,
    reciprocal_ranks,
)


def test_hits_and_reciprocal_ranks_equal_a_loop():
    ranks = np.random.default_rng(0).integers(1, 40, size=200)
    for k in (1, 3, 10):
        assert hits(ranks, k).tolist() == [1.0 if rank <= k else 0.0 for rank in ranks]
    assert reciprocal_ranks(ranks).tolist() == [1 / int(rank) for rank in ranks]
    assert hits([10, 11], 10).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("score", [lambda ranks: hits(ranks, 10), reciprocal_ranks])
def test_a_rank_of_zero_is_refused(score):
    with pytest.raises(StatisticsError, match="ranks count from 1"):
        score([3, 0])


def test_draws_depend_on_the_set_of_subjects_and_the_seed_alone():
    names = [f"subject {i}" for i in range(30)]
    drawn = SubjectBootstrap.draw(names, seed=3)
    assert drawn.counts.shape == (1 + DRAWS, 30)
    assert (drawn.counts[0] == 1).all()
    assert (drawn.counts.sum(axis=1) == 30).all()
    assert list(drawn.subjects) == sorted(names)
    shuffled = SubjectBootstrap.draw([*names[::-1], *names[:7]], seed=3)
    assert (shuffled.counts == drawn.counts).all()
    assert (SubjectBootstrap.draw(names, seed=4).counts != drawn.counts).any()
    assert (SubjectBootstrap.draw([*names[:-1], "another"], seed=3).counts != drawn.counts).any()


def test_draws_are_the_same_in_another_process():
    code = (
        "from moescope.statistics import SubjectBootstrap as B;"
        "print(B.draw(['a','b','c'], 5).counts[:50].astype(int).tolist())"
    )
    library = {**os.environ, "PYTHONPATH": str(Path(statistics.__file__).parents[1]), "PYTHONHASHSEED": "11"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=library).stdout
    assert there.strip() == str(SubjectBootstrap.draw(["c", "b", "a"], 5).counts[:50].astype(int).tolist())


def test_draws_are_with_replacement_and_uniform():
    counts = SubjectBootstrap.draw(map(str, range(20)), draws=20_000).counts[1:]
    assert counts.mean(axis=0) == pytest.approx(np.ones(20), abs=0.04)
    assert counts.var(axis=0) == pytest.approx(np.full(20, 1 - 1 / 20), abs=0.06)
    assert np.cov(counts[:, 0], counts[:, 1])[0, 1] == pytest.approx(-1 / 20, abs=0.03)


def test_no_subjects_and_unknown_subjects_are_named():
    with pytest.raises(StatisticsError, match="no subject"):
        SubjectBootstrap.draw([])
    with pytest.raises(StatisticsError, match="'who'"):
        SubjectBootstrap.draw(["a", "b"]).positions(["a", "who"])


def naive(values, subject, stratum, counts, strata, average):
    """Resample the prompts themselves, draw by draw, and average in the plainest way."""
    means = []
    for drawn in counts:
        rows = [p for p in range(len(values)) for _ in range(int(drawn[subject[p]])) if stratum[p] in strata]
        groups = [rows] if average == "micro" else [[p for p in rows if stratum[p] == s] for s in strata]
        averages = [values[group].mean(axis=0) for group in groups if group]
        means.append(np.mean(averages, axis=0) if averages else np.full(values.shape[1], np.nan))
    return np.array(means)


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("strata", [[0], [1], [0, 1, 2], [1, 2]])
def test_bootstrap_equals_explicit_resampling(average, strata):
    random = np.random.default_rng(1)
    subject = random.integers(0, 17, size=60)
    stratum = random.choice(3, size=60, p=[0.75, 0.2, 0.05])  # the rare one is absent from many draws
    values = random.normal(size=(60, 4)) + subject[:, None] / 5
    bootstrap = SubjectBootstrap.draw([f"{i:02d}" for i in range(17)], seed=2, draws=150)
    estimate = getattr(bootstrap.resample(values, subject, stratum), average)(strata)
    means = naive(values, subject, stratum, bootstrap.counts, strata, average)
    assert estimate.value == pytest.approx(means[0], abs=1e-12)
    assert estimate.low == pytest.approx(np.nanpercentile(means[1:], 2.5, axis=0), abs=1e-12)
    assert estimate.high == pytest.approx(np.nanpercentile(means[1:], 97.5, axis=0), abs=1e-12)


def test_strata_that_a_draw_misses_are_left_out_of_its_macro_mean():
    # subject a: one prompt in relation 0 (value 0); subject b: one prompt in each relation (values 1 and 4)
    counts = np.array([[1, 1], [2, 0], [0, 2]], dtype=float)
    sums = SubjectBootstrap(("a", "b"), counts).resample([[0.0], [1.0], [4.0]], np.array([0, 1, 1]), [0, 0, 1])
    micro = sums.totals.sum(axis=1)[:, 0] / sums.sizes.sum(axis=1)
    assert micro.tolist() == [5 / 3, 0.0, 2.5]
    assert sums.micro().value == pytest.approx([5 / 3])
    assert sums.macro().value == pytest.approx([(0.5 + 4) / 2])
    # draws: all of a gives 0 (relation 1 is missing, so not half of it); all of b gives (1 + 4) / 2
    assert sums.macro().low == pytest.approx([0.025 * 2.5])
    assert sums.macro().high == pytest.approx([0.975 * 2.5])
    assert sums.prompts() == 3
    assert sums.prompts([1]) == 1


def test_two_subjects_span_the_whole_range():
    # a draw is all of one subject with probability 1/2, so both extremes lie inside the central 95%
    bootstrap = SubjectBootstrap.draw(["a", "b"], seed=0)
    estimate = bootstrap.resample([[0.0], [1.0], [1.0]], np.array([0, 1, 1])).micro()
    assert (estimate.value[0], estimate.low[0], estimate.high[0]) == (pytest.approx(2 / 3), 0.0, 1.0)


def test_one_subject_has_no_interval_however_many_prompts():
    bootstrap = SubjectBootstrap.draw(["a", "b", "c"])
    sums = bootstrap.resample([[1.0], [3.0], [5.0]], np.array([0, 0, 2]), [0, 0, 1])
    for estimate in (sums.micro([0]), sums.macro([0])):
        assert estimate.value[0] == 2.0
        assert np.isnan([estimate.low[0], estimate.high[0]]).all()
    assert not np.isnan(sums.micro().low[0])


def test_columns_do_not_touch_one_another():
    random = np.random.default_rng(4)
    values, subject = random.normal(size=(40, 300)), random.integers(0, 12, size=40)
    bootstrap = SubjectBootstrap.draw(map(str, range(12)), draws=200)
    together = bootstrap.resample(values, subject).micro()
    for column in (0, 7, 299):
        alone = bootstrap.resample(values[:, [column]], subject).micro()
        for end in ("value", "low", "high"):
            assert getattr(alone, end)[0] == pytest.approx(getattr(together, end)[column], abs=1e-12)


def test_percentiles_leave_missing_draws_out():
    draws = np.random.default_rng(5).normal(size=(400, 3))
    draws[::3, 1] = np.nan
    draws[:, 2] = np.nan
    low, high = percentiles(draws)
    assert low[:2] == pytest.approx([np.percentile(draws[:, 0], 2.5), np.nanpercentile(draws[:, 1], 2.5)])
    assert high[:2] == pytest.approx([np.percentile(draws[:, 0], 97.5), np.nanpercentile(draws[:, 1], 97.5)])
    assert np.isnan([low[2], high[2]]).all()


def test_intervals_of_clustered_data_cover_what_they_promise():
    """700 studies of 150 subjects with 1 to 5 prompts each; subject and prompt effects have mean 0."""
    random = np.random.default_rng(6)
    studies, subjects = 700, 150
    subject = np.repeat(np.arange(subjects), random.integers(1, 6, size=subjects))
    values = random.normal(size=(subjects, studies))[subject] + 0.5 * random.normal(size=(len(subject), studies))
    estimate = SubjectBootstrap.draw([f"{i:03d}" for i in range(subjects)]).resample(values, subject).micro()
    covered = ((estimate.low <= 0) & (estimate.high >= 0)).mean()
    assert 0.93 <= covered <= 0.97
    # resampling prompts as if they were independent is what the subject bootstrap guards against
    wrong = SubjectBootstrap.draw([f"{i:03d}" for i in range(len(subject))])
    estimate = wrong.resample(values, np.arange(len(subject))).micro()
    assert ((estimate.low <= 0) & (estimate.high >= 0)).mean() < 0.85


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_draws_are_the_means_that_the_interval_is_made_of(average):
    random = np.random.default_rng(7)
    sums = SubjectBootstrap.draw(map(str, range(9)), draws=50).resample(
        random.normal(size=(30, 2)), random.integers(0, 9, size=30), random.integers(0, 3, size=30)
    )
    draws, estimate = sums.draws(average, [0, 2]), getattr(sums, average)([0, 2])
    assert draws.shape == (51, 2)
    assert draws[0] == pytest.approx(estimate.value)
    assert np.nanpercentile(draws[1:], 2.5, axis=0) == pytest.approx(estimate.low)


def test_jackknife_of_a_mean_is_the_interval_of_group_means():
    """For equal groups the jackknife error of a mean is sd / sqrt(G), so the interval is Student's."""
    values = np.random.default_rng(8).normal(size=(10, 7))
    without = [np.delete(values, g, axis=0).mean() for g in range(10)]
    means = values.mean(axis=1)
    expected = stats.t.interval(0.95, 9, means.mean(), means.std(ddof=1) / np.sqrt(10))
    assert jackknife(values.mean(), without) == pytest.approx(expected)


def test_groups_without_prompts_do_not_count():
    value, without = 0.5, [0.4, None, 0.6, np.nan, 0.55]
    assert jackknife(value, without) == pytest.approx(jackknife(value, [0.4, 0.6, 0.55]))
    assert jackknife_error(without)[1] == 3
    half = stats.t.ppf(0.975, 2) * np.sqrt(2 / 3 * np.var([0.4, 0.6, 0.55]) * 3)
    assert jackknife(value, without) == pytest.approx((0.5 - half, 0.5 + half))
    for few in ([0.4, np.nan], [np.nan, np.nan]):
        assert np.isnan(jackknife(value, few)).all()
    assert np.isnan(jackknife(np.nan, [0.4, 0.6])).all()


def test_jackknife_of_many_columns_and_an_independent_variance():
    random = np.random.default_rng(9)
    value, without = random.normal(size=(2, 3)), random.normal(size=(2, 3, 10))
    low, high = jackknife(value, without, 0.25)
    assert low.shape == high.shape == (2, 3)
    reach = stats.t.ppf(0.975, 9) * np.sqrt(jackknife_error(without[1, 2])[0] ** 2 + 0.25)
    assert (low[1, 2], high[1, 2]) == pytest.approx((value[1, 2] - reach, value[1, 2] + reach))


def test_jackknife_intervals_of_grouped_means_cover_what_they_promise():
    """2,000 studies of 83 subjects with 1 to 5 prompts, dealt to ten groups: group sizes are unequal."""
    random = np.random.default_rng(10)
    prompts = random.integers(1, 6, size=83)
    group = np.repeat(np.arange(83) % 10, prompts)
    effects = random.exponential(size=(83, 2000)) - 1
    values = np.repeat(effects, prompts, axis=0) + random.normal(size=(len(group), 2000))
    without = np.stack([values[group != g].mean(axis=0) for g in range(10)], axis=-1)
    low, high = jackknife(values.mean(axis=0), without)
    assert 0.93 <= ((low <= 0) & (high >= 0)).mean() <= 0.97
