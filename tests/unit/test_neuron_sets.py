"""Sets of neurons and their shares, against sorting, sets of Python, loops and permutation."""

import math
from fractions import Fraction

import numpy as np
import pytest

from moescope import neuron_sets
from moescope.neuron_sets import (
    READINGS,
    Part,
    Positives,
    count,
    exact_top,
    expected_overlap,
    gain_shares,
    jaccard,
    jaccard_of_overlap,
    largest,
    leading,
    positive_share,
    survival,
    top,
)
from moescope.statistics import jackknife


@pytest.mark.parametrize(
    ("share", "n", "expected"),
    [(0.01, 4096, 41), (0.01, 100, 1), (0.01, 101, 2), (0.07, 100, 7), (0.01, 1, 1), (0.01, 0, 0), (0.3, 10, 3)],
)
def test_count_is_exact(share, n, expected):
    """0.07 x 100 is 7.000000000000001 in binary, whose ceiling is 8."""
    assert count(share, n) == expected


def test_count_of_a_fraction():
    assert count(neuron_sets.TOP * Fraction(512, 4096), 4096) == 6  # 5.12
    assert count(neuron_sets.TOP * Fraction(131072, 1048576), 1048576) == 1311  # 1310.72


@pytest.mark.parametrize("k", [0, 1, 7, 20, 39, 40, 50])
def test_largest_equals_a_stable_sort(k):
    random = np.random.default_rng(k)
    for values in (random.normal(size=40), random.integers(0, 4, size=40).astype(float), np.zeros(40)):
        expected = sorted(sorted(range(40), key=lambda i, v=values: (-v[i], i))[:k])
        assert largest(values, k).tolist() == expected


@pytest.mark.parametrize(("a", "b"), [([1, 2, 3], [2, 3, 4]), ([1, 2], [3, 4]), ([5, 6], [5, 6])])
def test_resolution_is_what_one_common_neuron_is_worth(a, b):
    """Swap one neuron of a for one of b (of equal sets: one for a stranger) and see what J does."""
    swapped = sorted({*a} - {a[0]} | {next(iter({*b} - {*a}), 99)})
    found = neuron_sets.resolution(np.array(a), np.array(b))
    change = abs(len({*swapped} & {*b}) / len({*swapped} | {*b}) - len({*a} & {*b}) / len({*a} | {*b}))
    assert found == pytest.approx(change)


def weights(part, n):
    """What each of n neurons counts in a part."""
    found = np.zeros(n)
    found[part.chosen] = part.weight
    return found


@pytest.mark.parametrize("x", ["0", "1/4", "1", "128/25", "20", "399/10", "40"])
def test_the_last_of_the_leading_counts_in_part(x):
    random = np.random.default_rng(1)
    for values in (random.normal(size=40), random.integers(0, 4, size=40).astype(float), np.zeros(40)):
        left, expected = Fraction(x), np.zeros(40)
        for i in sorted(range(40), key=lambda i, v=values: (-v[i], i)):
            expected[i] = min(left, 1)
            left -= min(left, 1)
        found = leading(values, Fraction(x))
        assert weights(found, 40) == pytest.approx(expected)
        assert neuron_sets.size(found) == pytest.approx(float(Fraction(x)))
        assert (np.diff(found.chosen) > 0).all()


def test_exact_tops_are_exact_in_every_layer():
    values = np.array([5.0, 4.0, 3.0, 9.0, 8.0, 7.0, 6.0])
    found = exact_top(values, 0.4, np.array([0, 3, 7]))  # 1.2 of 3, 1.6 of 4
    assert weights(found, 7) == pytest.approx([1, 0.2, 0, 1, 0.6, 0, 0])
    assert weights(exact_top(values, 0.4), 7) == pytest.approx([0, 0, 0, 1, 1, 0.8, 0])
    gains = Positives(values, np.array([0, 3, 7]))
    assert gains.share(found) == pytest.approx(((5 + 0.2 * 4) / 12 + (9 + 0.6 * 8) / 30) / 2)
    before, bounds = np.zeros(7), np.array([0, 3, 7])
    assert gain_shares(before, values, bounds, 0.4, exact_top)["gain_share_layer"] == pytest.approx(gains.share(found))
    assert positive_share(values, 0.4, exact_top) == pytest.approx((9 + 8 + 0.8 * 7) / 42)


def test_overlaps_of_parts_are_of_weights():
    random = np.random.default_rng(7)
    values = random.normal(size=60)
    a, b = (leading(values + random.normal(size=60), Fraction("14.3")) for _ in "ab")
    in_a, in_b = weights(a, 60), weights(b, 60)
    common = np.minimum(in_a, in_b).sum()
    assert 0.01 < common % 1 < 0.99  # the last ones count
    assert neuron_sets.overlap(a, b) == pytest.approx(common)
    assert jaccard(a, b) == pytest.approx(common / np.maximum(in_a, in_b).sum())
    assert survival(a, b) == pytest.approx(common / 14.3)
    assert jaccard(a, a) == survival(a, a) == 1.0
    # a whole neuron of a for a whole one of b
    less, more = np.flatnonzero((in_a == 1) & (in_b == 0))[0], np.flatnonzero((in_b == 1) & (in_a == 0))[0]
    in_a[[less, more]] = 0, 1
    change = np.minimum(in_a, in_b).sum() / np.maximum(in_a, in_b).sum() - jaccard(a, b)
    assert neuron_sets.resolution(a, b) == pytest.approx(change)
    tiny = Part(np.array([3]), np.array([0.25]))
    assert neuron_sets.resolution(tiny, tiny) == 1.0  # one or none


def test_models_of_different_size_hold_the_same_share_of_the_same_distribution():
    """Exponential importance: the top share p holds p (1 - log p). 1% of 512 and of 4144 neurons are not whole."""

    def lorenz(p):
        return p * (1 - np.log(np.where(p > 0, p, 1.0)))

    few, many = (np.diff(lorenz(np.arange(n + 1) / n)) for n in (512, 4144))
    sparse = np.append(few, np.zeros(7 * 512))
    exact = positive_share(sparse, neuron_sets.TOP / 8, exact_top), positive_share(many, neuron_sets.TOP, exact_top)
    assert exact == pytest.approx([lorenz(0.01)] * 2, rel=0.002)
    rounded = positive_share(sparse, neuron_sets.TOP / 8), positive_share(many, neuron_sets.TOP)
    assert rounded[0] > 1.1 * rounded[1]  # 6 of 512 against 42 of 4144


def test_top_by_layer_takes_its_share_of_every_layer():
    values = np.array([5.0, 4.0, 3.0, 9.0, 8.0, 7.0, 6.0])
    assert top(values, 0.34, np.array([0, 3, 7])).tolist() == [0, 1, 3, 4]  # 2 of 3, 2 of 4
    assert top(values, 0.34).tolist() == [3, 4, 5]


def test_overlaps_equal_those_of_sets():
    random = np.random.default_rng(0)
    a, b = (np.sort(random.choice(50, size, replace=False)) for size in (10, 14))
    common, either = set(a.tolist()) & set(b.tolist()), set(a.tolist()) | set(b.tolist())
    assert jaccard(a, b) == len(common) / len(either)
    assert survival(a, b) == len(common) / 10
    assert survival(b, a) == len(common) / 14
    assert jaccard(a, a) == survival(a, a) == 1.0
    nothing = np.empty(0, dtype=int)
    assert jaccard(a, nothing) == 0.0
    assert math.isnan(jaccard(nothing, nothing))
    assert math.isnan(survival(nothing, a))


def test_random_sets_have_the_known_overlap():
    """J of two random 1% of many neurons: E|a and b| = k^2 / N, J = p / (2 - p) = 0.00503."""
    random = np.random.default_rng(1)
    sets = [top(random.random(200_000)) for _ in range(40)]
    overlaps = [jaccard(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    assert np.mean(overlaps) == pytest.approx(0.01 / 1.99, rel=0.02)
    assert round(0.01 / 1.99, 5) == 0.00503
    assert np.mean([survival(sets[0], b) for b in sets[1:]]) == pytest.approx(0.01, rel=0.05)


def test_uniform_gains_have_a_concentration_of_one_percent():
    before, bounds = np.random.default_rng(2).normal(size=4000), np.array([0, 1000, 3000, 4000])
    shares = gain_shares(before, before + 1.0, bounds)
    assert shares == pytest.approx(dict.fromkeys(READINGS, 0.01))


def test_gain_shares_equal_a_loop():
    random = np.random.default_rng(3)
    before, after = random.normal(size=230), random.normal(size=230)
    bounds = np.array([0, 40, 230])
    gain = [max(b - a, 0.0) for a, b in zip(before, after, strict=True)]

    def share(members, ranked_by):
        chosen = sorted(members, key=lambda i: (-ranked_by[i], i))[: math.ceil(len(members) / 10)]
        return sum(gain[i] for i in chosen) / sum(gain[i] for i in members)

    layers = [range(40), range(40, 230)]
    expected = {
        "gain_share": share(range(230), after - before),
        "gain_share_by_importance": share(range(230), after),
        "gain_share_layer": np.mean([share(layer, after - before) for layer in layers]),
        "gain_share_by_importance_layer": np.mean([share(layer, after) for layer in layers]),
    }
    assert gain_shares(before, after, bounds, 0.1) == pytest.approx(expected)
    assert len(set(expected.values())) == 4


def test_shares_by_hand():
    importance = np.array([4.0, -9.0, 1.0, 3.0])
    assert positive_share(importance, 0.25) == pytest.approx(4 / 8)
    assert positive_share(importance, 0.5) == pytest.approx(7 / 8)
    # ranked by signed importance: the neuron of -9 is nowhere near the top
    assert Positives(importance).share(np.array([1])) == 0.0


def test_a_layer_without_gain_is_left_out_and_nothing_gained_is_no_share():
    values = np.array([1.0, 3.0, -1.0, -2.0])
    assert Positives(values, np.array([0, 2, 4])).share(np.array([1, 2])) == pytest.approx(3 / 4)
    assert math.isnan(Positives(-np.ones(4)).share(np.array([0])))
    assert all(map(math.isnan, gain_shares(values, values, np.array([0, 2, 4])).values()))


def test_what_is_below_a_ten_millionth_is_nothing():
    assert neuron_sets.positive(np.array([1e-7, 2e-7, -1.0])).tolist() == [0.0, 2e-7, 0.0]
    # a million neurons of rounding noise would otherwise outweigh the one that counts
    assert positive_share(np.array([1e-4] + [5e-8] * 9999), 0.0001) == 1.0


def test_expected_overlap_equals_permutation_within_groups():
    random = np.random.default_rng(4)
    sizes = np.array([1, 6, 30, 13])
    group = random.permutation(np.repeat(np.arange(4), sizes))
    a, b = (np.sort(random.choice(50, 18, replace=False)) for _ in "ab")
    in_a, in_b = np.zeros(50, dtype=int), np.zeros(50, dtype=int)
    in_a[a], in_b[b] = 1, 1
    overlaps = np.zeros(40_000)
    for members in (np.flatnonzero(group == g) for g in range(4)):
        dealt = random.permuted(np.tile(in_b[members], (len(overlaps), 1)), axis=1)
        overlaps += dealt @ in_a[members]
    mean, variance = expected_overlap(a, b, group, sizes)
    assert mean == pytest.approx(overlaps.mean(), abs=4 * overlaps.std() / 200)
    assert variance == pytest.approx(overlaps.var(), rel=0.04)


def test_expected_overlap_of_one_group_is_that_of_random_sets():
    a, b = np.arange(100), np.arange(50, 150)
    mean, variance = expected_overlap(a, b, np.zeros(10_000, dtype=int), np.array([10_000]))
    assert jaccard_of_overlap(mean, 100, 100) == pytest.approx(0.01 / 1.99)
    assert variance == pytest.approx(100 * 0.01 * 0.99 * (9900 / 9999))
    # groups of one neuron leave nothing to chance
    mean, variance = expected_overlap(a, b, np.arange(10_000), np.ones(10_000, dtype=int))
    assert (mean, variance) == (50.0, 0.0)


@pytest.mark.parametrize("metric", ["jaccard", "gain_share"])
def test_jackknife_of_set_metrics_covers_the_mean_estimate_and_holds_its_own(metric):
    """300 samples of ten groups of subjects of two checkpoints of a model with 3,000 neurons of heavy-tailed scores.

    What is covered is what samples of this size have on average: fewer subjects would have more noise and a lower J
    (against that stands the noise ceiling).
    """
    random = np.random.default_rng(5)
    first = random.standard_t(2, 3000)
    lasting = np.stack([first, first + 0.5 * random.standard_t(2, 3000)])
    bounds = np.array([0, 3000])

    def estimate(scores):
        if metric == "jaccard":
            return jaccard(*(top(np.abs(one)) for one in scores))
        return gain_shares(*scores, bounds)["gain_share"]

    values, ends = [], []
    for _ in range(300):
        # subjects differ in which neurons serve them, alike at both checkpoints
        groups = lasting[:, None] * (1 + random.normal(size=(10, 3000))) + random.normal(size=(2, 10, 3000))
        total = groups.sum(axis=1)
        values.append(estimate(total / 10))
        ends.append(jackknife(values[-1], [estimate((total - groups[:, g]) / 9) for g in range(10)]))
    low, high = np.transpose(ends)
    assert ((low <= np.mean(values)) & (np.mean(values) <= high)).mean() >= 0.93
    assert ((low <= values) & (values <= high)).all()
