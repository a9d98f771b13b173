"""Layer profiles over training, against scipy, loops over pairs, and courses worked out by hand."""

from itertools import combinations, pairwise

import numpy as np
import polars as pl
import pytest
from scipy.stats import pearsonr, spearmanr
from scipy.stats import variation as scipy_variation

from moescope import tables
from moescope.layer_dynamics import (
    LayerDynamicsError,
    consistency,
    consolidation,
    correlation,
    layer_dynamics,
    variation,
    within,
)
from moescope.sample import Checkpoint
from moescope.statistics import SubjectBootstrap

STEPS = (0, 10, 20, 40, 80)


def prompt_table(count=12, subjects=6):
    rows = [(f"r/{p:03d}", "r", "c", f"s{p % subjects}", "o", "{} is", f"s{p % subjects} is", 0) for p in range(count)]
    return tables.check(pl.DataFrame(rows, schema=list(tables.SCHEMAS["prompts"].columns), orient="row"), "prompts")


def layer_table(increase):
    """``layers`` of [prompts, layers, components] (attention first)."""
    rows = [
        (f"r/{p:03d}", layer, component, increase[p, layer, c])
        for p in range(increase.shape[0])
        for layer in range(increase.shape[1])
        for c, component in enumerate(("attn", "ffn"))
    ]
    return tables.check(pl.DataFrame(rows, schema=["prompt_id", "layer", "component", "lpi"], orient="row"), "layers")


def checkpoints(increases, steps=STEPS):
    return [
        Checkpoint(step, None if step is None else step * 7, layer_table(one))
        for step, one in zip(steps, increases, strict=True)
    ]


def noisy(steps=5, prompts=12, layers=5, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(steps, 1, layers, 2)) + 0.5 * random.normal(size=(steps, prompts, layers, 2))


def metrics(table, component="ffn", window="all"):
    rows = table.filter(pl.col("component") == component, pl.col("window") == window)
    return {row["metric"]: (row["value"], row["low"], row["high"]) for row in rows.iter_rows(named=True)}


def by_scipy(profiles, steps):
    """Every metric by window of [checkpoints, layers], written down from the definitions."""
    pairs = list(pairwise(profiles))
    cv = scipy_variation(profiles, axis=0)
    found = {
        "consistency": np.mean([pearsonr(x, y)[0] for x, y in pairs]),
        "consistency_all_pairs": np.mean([pearsonr(x, y)[0] for x, y in combinations(profiles, 2)]),
        "consistency_spearman": np.mean([spearmanr(x, y)[0] for x, y in pairs]),
        "consistency_without_last": np.mean([pearsonr(x[:-1], y[:-1])[0] for x, y in pairs]),
        "cv": cv.mean(),
        "cv_median": np.median(cv),
        "cv_abs": abs(cv).mean(),
    }
    for threshold in (0.9, 0.95, 0.99):
        settled = [
            step
            for i, step in enumerate(steps[:-1])
            if all(pearsonr(later, profiles[-1])[0] >= threshold for later in profiles[i:-1])
        ]
        found[f"consolidation_{threshold}"] = settled[0] if settled else None
    return found


@pytest.mark.parametrize(("scale", "window", "chosen"), [(1.0, "all", slice(None)), (0.05, "10-40", slice(1, 4))])
def test_every_metric_equals_scipy(scale, window, chosen):
    """With noise of full size nothing settles; with little the profile has its final shape early."""
    increases = noisy(seed=3)
    increases = increases[-1:] + scale * increases
    table, _ = layer_dynamics(checkpoints(increases), prompt_table(), [(10, 40)])
    for c, component in enumerate(("attn", "ffn")):
        profiles = increases[..., c].astype(np.float32).astype(np.float64).mean(axis=1)[chosen]
        found = {metric: value for metric, (value, _, _) in metrics(table, component, window).items()}
        assert found == pytest.approx(by_scipy(profiles, STEPS[chosen]), abs=1e-9)


def test_intervals_are_those_of_resampled_profiles():
    """Each draw: the profiles of that many copies of the subjects' prompts, all steps on the same draw."""
    increases = noisy(seed=1)
    table, similarity = layer_dynamics(checkpoints(increases), prompt_table(), seed=5)
    bootstrap = SubjectBootstrap.draw([f"s{i}" for i in range(6)], seed=5)
    weights = bootstrap.counts[1:][:, [p % 6 for p in range(12)]]
    drawn = np.einsum("dp,tpl->dtl", weights, increases[..., 1]) / weights.sum(axis=1)[:, None, None]
    values = [by_scipy(one, STEPS) for one in drawn[:200]]
    assert consistency(drawn[:200]) == pytest.approx([one["consistency"] for one in values])
    for metric, of in {
        "consistency": consistency(drawn),
        "consistency_all_pairs": consistency(drawn, "all"),
        "cv_abs": variation(drawn)["cv_abs"],
    }.items():
        assert metrics(table)[metric][1:] == pytest.approx(np.percentile(of, [2.5, 97.5]), rel=1e-4)
    row = similarity.filter(metric="to_previous", component="ffn", step=20).row(0, named=True)
    course = correlation(drawn[:, 2], drawn[:, 1])
    assert [row["low"], row["high"]] == pytest.approx(np.percentile(course, [2.5, 97.5]), abs=1e-5)


def test_similarity_by_step_equals_scipy():
    increases = noisy(seed=2)
    _, table = layer_dynamics(reversed(checkpoints(increases)), prompt_table())
    profiles = increases[..., 0].mean(axis=1)
    for metric, steps, expected in (
        ("to_final", STEPS[:-1], [pearsonr(x, profiles[-1])[0] for x in profiles[:-1]]),
        ("to_previous", STEPS[1:], [pearsonr(*pair)[0] for pair in pairwise(profiles)]),
        (
            "to_previous_spearman",
            STEPS[1:],
            [spearmanr(*pair)[0] for pair in pairwise(profiles)],
        ),
    ):
        rows = table.filter(pl.col("metric") == metric, pl.col("component") == "attn")
        assert rows["step"].to_list() == list(steps)
        assert rows["tokens"].to_list() == [7 * step for step in steps]
        assert rows["value"].to_list() == pytest.approx(expected, abs=1e-6)


def test_cross_step_variation_by_hand():
    # layer 0: 1, 3 (mean 2, population sd 1); layer 1: -1, -3; layer 2: 4, 4
    found = variation(np.array([[1.0, -1, 4], [3, -3, 4]]))
    assert found == {"cv": 0.0, "cv_median": 0.0, "cv_abs": pytest.approx((0.5 + 0.5 + 0) / 3)}
    assert np.isnan(variation(np.zeros((2, 1)))["cv"])


@pytest.mark.parametrize(
    ("similarity", "position"),
    [
        ([0.96, 0.2, 0.97, 0.96, 1], 2),  # being near once is not staying
        ([0.99, 0.98, 0.97, 0.96, 1], 0),
        ([0.99, 0.99, 0.99, 0.94, 1], 4),  # the final one alone: not before the end
        ([0.99, np.nan, 0.95, 0.95, 1], 2),
        ([np.nan] * 5, 5),
    ],
)
def test_consolidation_is_the_first_position_that_stays(similarity, position):
    assert consolidation(np.array(similarity), 0.95) == position


def test_a_series_that_settles_late_has_no_step_and_one_that_stands_still_the_first():
    random = np.random.default_rng(0)
    fixed = np.repeat(random.normal(size=(1, 5, 2)), 12, axis=0)
    still, _ = layer_dynamics(checkpoints([fixed] * 5), prompt_table())
    for component in ("attn", "ffn"):
        found = metrics(still, component)
        assert found["consistency"] == pytest.approx((1, 1, 1))
        assert found["cv_abs"] == pytest.approx((0, 0, 0), abs=1e-6)
        assert found["consolidation_0.99"] == (0, 0, 0)
    moving, _ = layer_dynamics(checkpoints([fixed, -fixed, fixed, -fixed, fixed]), prompt_table())
    assert metrics(moving)["consolidation_0.9"] == (None, None, None)
    assert metrics(moving)["consistency"] == pytest.approx((-1, -1, -1))
    assert metrics(moving)["consistency_all_pairs"][0] == pytest.approx((4 - 6) / 10)


def test_an_unsettled_share_of_the_draws_leaves_the_upper_end_open():
    """One subject in six carries another profile at step 40: in the draws that hold it often, nothing is settled."""
    increases = np.repeat(np.array([1.0, 2, 3, 4, 5])[None, None, :, None], 5, axis=0) * np.ones((5, 12, 1, 2))
    increases[3, [0, 6]] = np.array([25.0, 2, 3, 4, 5])[:, None] * 0.2
    value, low, high = metrics(layer_dynamics(checkpoints(increases), prompt_table())[0])["consolidation_0.95"]
    assert (value, low, high) == (0, 0, None)


def test_a_profile_without_shape_has_no_correlation():
    flat = np.full((12, 5, 2), 0.1) * (1 + np.arange(12) / 7)[:, None, None]
    increases = noisy()
    increases[2] = flat
    table, similarity = layer_dynamics(checkpoints(increases), prompt_table())
    found = metrics(table)
    assert all(found[metric] == (None, None, None) for metric in found if metric.startswith("consistency"))
    assert found["cv"][0] is not None
    gone = similarity.filter(pl.col("value").is_null())
    assert set(gone.select("metric", "step").iter_rows()) == {
        ("to_final", 20), *((metric, step) for metric in ("to_previous", "to_previous_spearman") for step in (20, 40)),
    }  # fmt: skip
    one_layer, _ = layer_dynamics(checkpoints(noisy(layers=1)), prompt_table())
    assert {metric for metric, ends in metrics(one_layer).items() if ends[0] is not None} == {
        "cv",
        "cv_abs",
        "cv_median",
    }


def test_windows():
    steps = [0, 10_000, 40_000, 70_000, 557_000]
    assert within(
        steps, [(10_000, 70_000), (100_000, 600_000), (10_000, 1_200_000), (10_000, 600_000), (0, 557_000)]
    ) == {
        "all": [0, 1, 2, 3, 4],
        "10000-70000": [1, 2, 3],
        "10000-600000": [1, 2, 3, 4],
        "0-557000": [0, 1, 2, 3, 4],
    }
    table, _ = layer_dynamics(checkpoints(noisy()), prompt_table(), [(0, 20), (21, 79), (41, 79)])
    assert dict(table.select("window", "checkpoints").unique().iter_rows()) == {"all": 5, "0-20": 3}


def test_one_checkpoint_and_one_subject():
    for table in layer_dynamics(checkpoints(noisy(steps=1), steps=[None]), prompt_table()):
        assert table.is_empty()
    table, similarity = layer_dynamics(checkpoints(noisy()), prompt_table(subjects=1))
    assert table["low"].is_null().all()
    assert similarity["high"].is_null().all()
    assert table.filter(metric="consistency")["value"].is_not_null().all()


def test_another_model_in_the_series_is_refused():
    mixed = [*checkpoints(noisy(steps=1), steps=[0]), *checkpoints(noisy(steps=1, layers=6), steps=[10])]
    with pytest.raises(LayerDynamicsError, match="step 10 has 6 layers, step 0 has 5"):
        layer_dynamics(mixed, prompt_table())


def test_intervals_cover_the_true_consistency():
    """120 studies of 150 subjects whose prompts scatter around two known profiles: r of the profiles is covered."""
    random = np.random.default_rng(8)
    profiles = np.array([[0.1, 0.3, 0.2, 0.9, 0.6, 0.4], [0.2, 0.2, 0.4, 0.7, 0.8, 0.1]])
    truth, covered, prompts = pearsonr(*profiles)[0], 0, prompt_table(150, 150)
    for _ in range(60):
        increases = profiles[:, None, :, None] + random.normal(size=(2, 150, 6, 2)) * 0.8
        table, _ = layer_dynamics(checkpoints(increases, steps=(0, 1)), prompts)
        for component in ("attn", "ffn"):
            _, low, high = metrics(table, component)["consistency"]
            covered += low <= truth <= high
    assert covered / 120 >= 0.9
