"""J, R, ceilings, nulls and their intervals over series, against naive loops over prompts and planted answers."""

import math
import weakref
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import numpy as np
import polars as pl
import pytest
from scipy import stats

from moescope import dynamics, tables
from moescope.dynamics import Checkpoint, DynamicsError, neuron_dynamics
from moescope.neuron_sets import READINGS
from tests.unit.neuron_tables import Model, prompt_table, random_routing

ALL_SPLITS = 126
DENSE, MIXTURE = Model(), Model(experts=8, width=30, shared=10)


@dataclass(frozen=True)
class HalfDense(Model):
    """A mixture with shared experts, in whose first layer the experts are one dense block: its shared neurons and its
    dense ones both have no expert."""

    @property
    def ffn(self):
        first = pl.col("layer") == 0, pl.col("kind") == "routed"
        return super().ffn.with_columns(
            neuron=pl.when(*first).then(pl.col("neuron") + self.width * pl.col("expert")).otherwise("neuron"),
            kind=pl.when(*first).then(pl.lit("dense")).otherwise("kind"),
            expert=pl.when(*first).then(None).otherwise("expert"),
        )


HALF_DENSE = HalfDense(experts=8, width=60, shared=200)


def row(table, metric, step, population="all", average="micro"):
    """The one row of these keys, as a dict."""
    found = table.filter(population=population, average=average, metric=metric, step=step)
    assert len(found) == 1
    return found.row(0, named=True)


def series(model, steps=(0, 10, 40), prompts=60, groups=10, seed=0, noise=2.0, **more):
    """Prompts, checkpoints, and the LPI [prompts, neurons] of the FFN neurons behind each.

    ``noise``: of a single prompt, in units of what lasts.
    """
    random = np.random.default_rng(seed)
    facts = prompt_table(prompts, groups=groups)
    lasting = random.standard_t(2, (len(model.ffn)))
    checkpoints, scores = [], []
    for step in steps:
        lasting = lasting + 0.5 * random.standard_t(2, len(lasting))
        lpi = 0.01 * (lasting + noise * random.standard_t(3, (prompts, len(lasting))))
        attn = random.standard_t(2, (prompts, len(model.attn)))
        routed = random_routing(random, prompts, model, 2) if model.experts else None
        checkpoints.append(model.checkpoint(step, facts, lpi, attn, routed, **more))
        scores.append((lpi * model.active(routed, prompts)).astype(np.float32).astype(float))
    return facts, checkpoints, scores


# The statistics, computed in the plainest way ------------------------------------------------------------------------


def top(values, share, members=None):
    """What each neuron counts: 1 in the top share, rounded up; with an ``exact`` Fraction the last one in part."""
    members = np.arange(len(values)) if members is None else np.array(members)
    size = math.ceil(round(share * len(members), 9))
    chosen, found = members[np.argsort(-values[members], kind="stable")[:size]], np.zeros(len(values))
    found[chosen] = 1
    if isinstance(share, Fraction):
        found[chosen[-1]] = share * len(members) - (size - 1)
    return found


def overlap(a, b):
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()


def concentration(ranked_by, gain, layers, share):
    shares, gain = [], np.maximum(gain, 0)
    for members in layers:
        if total := gain[members].sum():
            shares.append((top(ranked_by, share, members) * gain).sum() / total)
    return np.mean(shares)


def metrics(before, after, layers, share=0.01):
    gain, everything = after - before, [range(len(after))]
    sets = [top(np.abs(one), share) for one in (before, after)]
    return {
        "jaccard": overlap(*sets),
        "survival": np.minimum(*sets).sum() / sets[0].sum(),
        "gain_share": concentration(gain, gain, everything, share),
        "gain_share_layer": concentration(gain, gain, layers, share),
        "gain_share_by_importance": concentration(after, gain, everything, share),
        "gain_share_by_importance_layer": concentration(after, gain, layers, share),
    }


def layers_of(model):
    layer = model.ffn["layer"].to_numpy()
    return [np.flatnonzero(layer == one).tolist() for one in range(model.layers)]


@pytest.mark.parametrize("model", [DENSE, MIXTURE])
def test_values_and_replicates_equal_loops_over_prompts(model):
    facts, checkpoints, scores = series(model)
    table, _ = neuron_dynamics(checkpoints, facts, "ffn", splits=1)
    group, layers = facts["group"].to_numpy(), layers_of(model)
    keeps = [np.ones(len(facts), dtype=bool), *(group != g for g in range(10))]
    before, after = ([scores[i][keep].mean(axis=0) for keep in keeps] for i in (1, 2))
    expected = [metrics(a, b, layers) for a, b in zip(before, after, strict=True)]
    shares = [concentration(b, b, [range(len(b))], 0.01) for b in after]
    old, new = (top(np.abs(one[0]), 0.01) for one in (before, after))
    common, size = np.minimum(old, new).sum(), new.sum()
    fewer = min(common, size - 1)
    steps = {
        "jaccard": (fewer + 1) / (2 * size - fewer - 1) - fewer / (2 * size - fewer),
        "survival": 1 / size,
    }
    for metric in (*expected[0], "positive_share"):
        found = row(table, metric, 40)
        values = shares if metric == "positive_share" else [one[metric] for one in expected]
        assert found["value"] == pytest.approx(values[0], rel=1e-5)
        assert [found[f"without_{g}"] for g in range(10)] == pytest.approx(values[1:], rel=1e-5)
        one = steps.get(metric, 0)  # ten values, each rounded to whole neurons, which the jackknife multiplies by nine
        reach = stats.t.ppf(0.975, 9) * math.sqrt(0.9 * np.var(values[1:]) * 10 + 9 * one**2 / 12)
        ends = [max(0, values[0] - reach), min(1, values[0] + reach)]
        assert [found["low"], found["high"]] == pytest.approx(ends, rel=1e-4)
        assert found["resolution"] == (pytest.approx(one) if one else None)
        assert (found["step_from"], found["tokens"]) == (None if metric == "positive_share" else 10, 40_000)
        assert (found["prompts"], found["left_out"], found["spread"]) == (60, None, None)


def test_macro_averages_are_means_over_relations_without_interval():
    facts, checkpoints, scores = series(DENSE)
    table, _ = neuron_dynamics(checkpoints, facts, "ffn", splits=1)
    relation = facts["relation"].to_numpy()
    before, after = (
        np.mean([scores[i][relation == r].mean(axis=0) for r in sorted(set(relation))], axis=0) for i in (0, 1)
    )
    for metric, value in metrics(before, after, layers_of(DENSE)).items():
        found = row(table, metric, 10, average="macro")
        assert found["value"] == pytest.approx(value, rel=1e-4)
        assert (found["low"], found["high"], found["without_0"]) == (None, None, None)
    assert row(table, "jaccard", 10, average="macro") != row(table, "jaccard", 10)


@pytest.mark.parametrize(
    ("model", "share"), [(MIXTURE, Fraction(70, 250)), (DENSE, Fraction(1)), (Model(width=1036), Fraction(1))]
)
def test_the_matched_fraction_is_exactly_that_of_active_neurons(model, share):
    """2 of 8 experts with 30 neurons and 10 shared: 70 of 250 neurons a layer are active, the top set is 1.4 of 500."""
    facts, checkpoints, scores = series(model)
    table, _ = neuron_dynamics(checkpoints, facts, "ffn", splits=1)
    relation, layers, share = facts["relation"].to_numpy(), layers_of(model), share / 100
    micro = [scores[i].mean(axis=0) for i in (0, 1)]
    macro = [np.mean([scores[i][relation == r].mean(axis=0) for r in sorted(set(relation))], axis=0) for i in (0, 1)]
    for average, (before, after) in {"micro": micro, "macro": macro}.items():
        expected = metrics(before, after, layers, share)
        expected["positive_share"] = concentration(after, after, [range(len(after))], share)
        for metric, value in expected.items():
            assert row(table, metric, 10, "matched", average)["value"] == pytest.approx(value, rel=1e-4), metric
    assert row(table, "jaccard", 10, "matched")["low"] is not None
    assert row(table, "jaccard", 10, "matched", "macro")["low"] is None
    size = float(share * len(model.ffn))
    assert row(table, "survival", 10, "matched")["resolution"] == pytest.approx(1 / size)
    old, new = (top(np.abs(one), share) for one in micro)
    common = min(np.minimum(old, new).sum(), size - 1)
    worth = (common + 1) / (2 * size - common - 1) - common / (2 * size - common)
    assert row(table, "jaccard", 10, "matched")["resolution"] == pytest.approx(worth)
    assert "matched" not in neuron_dynamics(checkpoints, facts, "attn", splits=1)[0]["population"]


def test_halves_equal_loops_over_all_splits():
    model = Model(width=900)  # 18 neurons: sets of which halves and steps share some
    facts, checkpoints, scores = series(model, prompts=40, noise=6.0)
    table, _ = neuron_dynamics(checkpoints, facts, "ffn", splits=ALL_SPLITS)
    group, layers = facts["group"].to_numpy(), layers_of(model)

    def of(i, groups):
        return scores[i][np.isin(group, groups)].mean(axis=0)

    def sets(i, groups):
        return top(np.abs(of(i, groups)), 0.01)

    for removed in (None, 3):
        results = {name: [] for name in ("ceiling", "cross_half", *READINGS)}
        ceilings_before = []
        for half in combinations(range(10), 5):  # every split from both sides: both directions
            a = [g for g in half if g != removed]
            b = [g for g in range(10) if g not in half and g != removed]
            results["ceiling"].append(overlap(sets(2, a), sets(2, b)))
            ceilings_before.append(overlap(sets(1, a), sets(1, b)))
            results["cross_half"].append(overlap(sets(1, a), sets(2, b)))
            ranked_on, measured_on = ({"gain": of(2, x) - of(1, x), "importance": of(2, x)} for x in (a, b))
            for name, (rank, scope) in READINGS.items():
                within = layers if scope == "layer" else [range(len(layers[0]) * 2)]
                results[name].append(concentration(ranked_on[rank], measured_on["gain"], within, 0.01))
        means = {name: np.mean(values) for name, values in results.items()}
        before = np.mean(ceilings_before)
        assert all(0.2 < j < 0.9 for j in (means["ceiling"], means["cross_half"], before))
        assert abs(before / means["ceiling"] - 1) > 0.01
        reliability = means["cross_half"] / math.sqrt(means["ceiling"] * before)
        names = {name: f"{name}_crossfit" if name in READINGS else name for name in means}
        for name, value in [*((names[n], v) for n, v in means.items()), ("reliability", reliability)]:
            column = "value" if removed is None else f"without_{removed}"
            assert row(table, name, 40)[column] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("model", [MIXTURE, HALF_DENSE])
def test_expected_overlap_given_layers_and_experts(model):
    facts, checkpoints, scores = series(model, noise=8.0)
    table, _ = neuron_dynamics(checkpoints, facts, "ffn", splits=1)
    group = facts["group"].to_numpy()
    keeps = {"value": group >= 0, "without_2": group != 2, "without_7": group != 7}

    def dealt(columns, sets):
        """J where the members of both sets are dealt at random within cells."""
        cells = model.ffn.select(columns).rows()
        inside = [[cells[i] for i in np.flatnonzero(one)] for one in sets]
        mean = sum(inside[0].count(c) * inside[1].count(c) / cells.count(c) for c in set(inside[0]))
        return mean / (2 * len(inside[0]) - mean)

    chances = set()
    for level, columns in {"layer": ["layer"], "expert": ["layer", "kind", "expert"]}.items():
        expected, excess = row(table, f"jaccard_given_{level}", 10), row(table, f"excess_given_{level}", 10)
        for column, keep in keeps.items():
            sets = [top(np.abs(scores[i][keep].mean(axis=0)), 0.01) for i in (0, 1)]
            chance = dealt(columns, sets)
            assert expected[column] == pytest.approx(chance)
            assert excess[column] == pytest.approx((overlap(*sets) - chance) / (1 - chance))
            chances.add(round(chance, 9))
        assert expected["low"] < expected["value"] < expected["high"]
        assert excess["low"] <= excess["value"] <= excess["high"]
    assert len(chances) > 2  # leaving out a group changes what is expected
    if model is HALF_DENSE:
        sets = [top(np.abs(scores[i].mean(axis=0)), 0.01) for i in (0, 1)]
        assert dealt(["layer", "expert"], sets) != pytest.approx(row(table, "jaccard_given_expert", 10)["value"])


def test_heads_are_the_experts_of_attention_and_a_dense_ffn_has_none():
    facts, checkpoints, _ = series(DENSE)
    dense, attn = (neuron_dynamics(checkpoints, facts, c, splits=1)[0] for c in ("ffn", "attn"))
    assert "jaccard_given_expert" not in dense["metric"]
    assert row(attn, "jaccard_given_expert", 10)["value"] >= 0


def test_cross_fitting_and_the_ceiling_tell_noise_from_change():
    """Gains of pure noise look concentrated where they are ranked and measured on the same prompts, and sets look
    unstable; halves of the subjects say that there was nothing to agree on."""
    random, facts = np.random.default_rng(1), prompt_table(100)
    model = Model(width=2000)
    checkpoints = [model.checkpoint(s, facts, random.normal(size=(100, 4000))) for s in (0, 1)]
    table, _ = neuron_dynamics(checkpoints, facts, "ffn")
    assert row(table, "gain_share", 1)["value"] > 0.05
    for reading in READINGS:
        assert row(table, f"{reading}_crossfit", 1)["value"] == pytest.approx(0.01, abs=0.004)
    assert row(table, "ceiling", 1)["value"] < 0.015
    # the same scores twice, with fresh noise: J is low, yet as high as it can be
    lasting = random.standard_t(4, 4000)
    noisy = [model.checkpoint(s, facts, lasting + 10 * random.normal(size=(100, 4000))) for s in (0, 1)]
    table, _ = neuron_dynamics(noisy, facts, "ffn")
    assert row(table, "jaccard", 1)["value"] < 0.7
    assert row(table, "reliability", 1)["value"] == pytest.approx(1.0, abs=0.1)


# Series --------------------------------------------------------------------------------------------------------------


def test_identical_checkpoints_overlap_whole_and_are_flagged():
    facts, (one, other, _), _ = series(MIXTURE)
    table, overlaps = neuron_dynamics([one, one._replace(step=5), other, one._replace(step=20)], facts, "ffn")
    same = row(table, "jaccard", 5)
    assert (same["value"], same["high"]) == (1.0, 1.0)
    assert same["low"] < 1  # of so few neurons another might have been one of them
    assert row(table, "excess_given_expert", 5)["value"] == 1.0
    for reading in READINGS:  # nothing was gained: there is nothing to hold a share of
        assert (row(table, reading, 5)["value"], row(table, reading, 5)["low"]) == (None, None)
        assert row(table, f"{reading}_crossfit", 5)["value"] is None
    flagged = overlaps.filter("identical").select("step_from", "step").rows()
    assert flagged == [(0, 5), (0, 20), (5, 20)]
    assert set(overlaps.filter("identical")["jaccard"]) == {1.0}


def test_overlaps_of_all_pairs_equal_those_of_sets():
    facts, checkpoints, scores = series(DENSE, steps=(0, 1, 2, 3, 4))
    table, overlaps = neuron_dynamics(checkpoints, facts, "ffn", splits=1)
    sets = [top(np.abs(one.mean(axis=0)), 0.01) for one in scores]
    assert len(overlaps) == 15
    for _, a, b, j, survived, identical in overlaps.iter_rows():
        kept = np.minimum(sets[a], sets[b]).sum() / sets[a].sum()
        assert (j, survived) == pytest.approx((overlap(sets[a], sets[b]), kept))
        assert not identical
    consecutive = overlaps.filter(pl.col("step") == pl.col("step_from") + 1)["jaccard"]
    assert consecutive.to_list() == [row(table, "jaccard", step)["value"] for step in (1, 2, 3, 4)]


def test_one_checkpoint_has_the_metrics_of_one():
    facts, checkpoints, _ = series(MIXTURE, steps=(7,))
    table, overlaps = neuron_dynamics(checkpoints, facts, "ffn")
    assert set(table["metric"]) == {"positive_share", "ceiling"}
    assert table["step_from"].is_null().all()
    assert overlaps.rows() == [("ffn", 7, 7, 1.0, 1.0, False)]


def test_without_group_tables_there_are_values_alone():
    facts, checkpoints, _ = series(MIXTURE)
    whole, overlaps = neuron_dynamics(checkpoints, facts, "ffn", splits=1)
    facts, checkpoints, _ = series(MIXTURE, without=("ffn_groups", "attn_groups"))
    bare, same = neuron_dynamics(checkpoints, facts, "ffn", splits=1)
    keys = ["population", "average", "metric", "step"]
    joined = bare.join(whole, on=keys, suffix="_whole", maintain_order="left")
    assert len(joined) == len(bare)
    known = joined.filter(~pl.col("metric").str.contains("given"))
    assert known["value"].to_list() == pytest.approx(known["value_whole"].to_list(), rel=1e-5)
    assert known.select("low", "high", "without_0").null_count().row(0) == (len(known),) * 3
    assert not set(bare["metric"]) & {"ceiling", "cross_half", "reliability", "gain_share_crossfit"}
    assert overlaps.equals(same)


def test_groups_without_prompts_have_no_replicate_and_do_not_count():
    facts, checkpoints, _ = series(DENSE, groups=7)
    found = row(neuron_dynamics(checkpoints, facts, "ffn")[0], "gain_share", 10)
    without = [found[f"without_{g}"] for g in range(10)]
    assert without[7:] == [None] * 3
    reach = stats.t.ppf(0.975, 6) * math.sqrt(6 / 7 * np.var(without[:7]) * 7)
    assert found["high"] - found["value"] == pytest.approx(reach)
    facts, checkpoints, _ = series(DENSE, groups=1)
    table = neuron_dynamics(checkpoints, facts, "ffn")[0]
    assert row(table, "gain_share", 10)["value"] is not None
    assert row(table, "gain_share", 10)["low"] is None
    assert row(table, "ceiling", 10)["value"] is None


def masked(planted, rest=(0.0, 0.0, 0.0)):
    """``masked_groups`` of a dense model with 200 neurons in 2 layers: seed -> its two neurons of importance; and what
    the others have, by seed."""
    rows = []
    for seed, neurons in planted.items():
        for i in range(200):
            sums = {f"group_{g}": 1.0 + i / 1000 + g / 100 if i in neurons else rest[seed] for g in range(10)}
            rows.append({"layer": i // 100, "neuron": i % 100, "seed": seed, "active": 1, "importance": 0.0, **sums})
    return tables.check(pl.DataFrame(rows), "masked_groups")


def test_masked_blocks_have_the_planted_answer():
    """Seed 0 keeps both of its top neurons, seed 1 one of two, seed 2 none: J is 1, 1/3 and 0."""
    facts, checkpoints, _ = series(DENSE, steps=(0, 10))
    frames = [masked({0: {3, 150}, 1: {3, 150}, 2: {3, 150}}), masked({0: {3, 150}, 1: {3, 151}, 2: {4, 151}})]
    seen = [
        Checkpoint(one.step, None, lambda name, columns, one=one, frame=frame: (
            frame.select(columns) if name == "masked_groups" else one.table(name, columns)
        ))
        for one, frame in zip(checkpoints, frames, strict=True)
    ]  # fmt: skip
    table, _ = neuron_dynamics(seen, facts, "ffn", splits=1)
    found = row(table, "jaccard", 10, "masked")
    assert found["value"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    spread = np.std([1, 1 / 3, 0], ddof=1)
    assert found["spread"] == pytest.approx(spread)
    # no group of subjects changes any set: what is uncertain are the blocks
    assert [found[f"without_{g}"] for g in range(10)] == pytest.approx([found["value"]] * 10)
    # and whether one neuron more would be in both sets: worth 2/3, 2/3 and 1/3 of J, so 1/3 of the mean
    assert found["resolution"] == pytest.approx(1 / 3)
    reach = stats.t.ppf(0.975, 9) * math.sqrt(spread**2 / 3 + 9 * (1 / 3) ** 2 / 12)
    assert [found["low"], found["high"]] == pytest.approx([max(0, 4 / 9 - reach), min(1, 4 / 9 + reach)])
    assert row(table, "survival", 10, "masked")["value"] == pytest.approx(0.5)
    # all that is gained belongs to two of 200 neurons (in seed 0 nothing is gained: not available for the mean)
    assert row(table, "gain_share", 10, "masked")["value"] is None
    assert row(table, "positive_share", 10, "masked")["value"] == pytest.approx(1.0)
    assert "masked" not in neuron_dynamics(seen, facts, "attn", splits=1)[0]["population"]
    torn = [
        seen[0]._replace(table=lambda n, c: frames[0][:-1].select(c) if n == "masked_groups" else seen[0].table(n, c))
    ]
    with pytest.raises(DynamicsError, match="step 0: a seed of masked_groups lacks neurons"):
        neuron_dynamics(torn, facts, "ffn")


def test_the_spread_between_seeds_is_of_their_mean():
    """The two top neurons hold about 0.50, 0.56 and 0.63: the interval is far from 0 and 1."""
    facts, (checkpoint, *_), _ = series(DENSE)
    frame = masked(dict.fromkeys(range(3), (3, 150)), rest=(0.011, 0.0085, 0.0065))
    seen = checkpoint._replace(table=lambda n, c: frame.select(c) if n == "masked_groups" else checkpoint.table(n, c))
    found = row(neuron_dynamics([seen], facts, "ffn", splits=1)[0], "positive_share", 0, "masked")
    sums = frame.sort("seed", "layer", "neuron").select(pl.col("^group_.*$").cast(pl.Float64))
    sums = sums.sum_horizontal().to_numpy().reshape(3, 200)
    shares = sums[:, [3, 150]].sum(axis=1) / sums.sum(axis=1)
    assert found["value"] == pytest.approx(shares.mean())
    assert found["spread"] == pytest.approx(shares.std(ddof=1))
    without = [found[f"without_{g}"] for g in range(10)]
    reach = stats.t.ppf(0.975, 9) * math.sqrt(9 * np.var(without) + shares.var(ddof=1) / 3)
    assert [found["low"], found["high"]] == pytest.approx([shares.mean() - reach, shares.mean() + reach])
    assert 0 < found["low"] < found["high"] < 1


@pytest.mark.parametrize("other", [Model(width=101), Model(layers=1, width=200), MIXTURE])
def test_other_neurons_are_another_series(other):
    facts, (first, *_), _ = series(DENSE)
    _, (_, second, _), _ = series(other)
    with pytest.raises(DynamicsError, match="steps 0 and 10: not the same ffn neurons"):
        neuron_dynamics([first, second], facts, "ffn")


def test_steps_ascend():
    facts, (first, second, _), _ = series(DENSE)
    with pytest.raises(DynamicsError, match="step 0 follows step 10; list"):
        neuron_dynamics([second, first], facts, "ffn")
    with pytest.raises(DynamicsError, match="no checkpoint"):
        neuron_dynamics([], facts, "ffn")


def test_checkpoints_are_read_one_at_a_time():
    facts, checkpoints, _ = series(DENSE, steps=(0, 1, 2, 3))
    alive = []

    def watched():
        for step, tokens, table in checkpoints:
            assert not any(frame() for frame in alive)

            def read(name, columns, table=table):
                frame = table(name, columns)
                if frame is not None:
                    alive.append(weakref.ref(frame))
                return frame

            yield Checkpoint(step, tokens, read)

    neuron_dynamics(watched(), facts, "ffn", splits=1)
    assert alive


def test_the_splits_depend_on_the_seed_alone():
    facts, checkpoints, _ = series(DENSE)
    first, again = (neuron_dynamics(checkpoints, facts, "ffn", seed=3)[0] for _ in range(2))
    assert first.equals(again)
    other = neuron_dynamics(checkpoints, facts, "ffn", seed=4)[0]
    assert row(first, "gain_share_crossfit", 10)["value"] != row(other, "gain_share_crossfit", 10)["value"]
    assert row(first, "jaccard", 10) == row(other, "jaccard", 10)
    splits = dynamics._Series("ffn", facts, 3, 20).splits
    assert len({tuple(split.weights[0] > 0) for split in splits}) == 20
