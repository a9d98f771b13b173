"""Gains of a model's layers, against resampling prompt by prompt, hand-made tables, and what adds up by definition."""

import numpy as np
import polars as pl
import pytest

from moescope import tables
from moescope.efficiency import EfficiencyError, Scored, Stage, efficiency, gains, relation_accuracy, stages
from moescope.sample import SampleError
from moescope.statistics import StatisticsError, SubjectBootstrap

#: relation, subject. s0 and s2 occur in two relations; c has a single subject, so that many draws lack it.
FACTS = [("a", "s0"), ("a", "s1"), ("a", "s2"), ("a", "s3"), ("b", "s0"), ("b", "s2"), ("b", "s4"), ("c", "s5")]
RANKS = [1, 2, 4, 20, 5, 30, 10, 11]
ACTIVE = [40, 40, 40, 40, 48, 48, 48, 32]
D = 64
L = 6
SHARES = ("ffn_share", "gain_share", "ffn_gain_share")
QUANTITIES = (
    "hit@10", "mrr", "ffn_gain", "attn_gain", "peak_layer", "peak_depth", "peak_layer_relations", "layer_efficiency",
    *SHARES, "gain_per_active_parameter",
)  # fmt: skip


def ids(facts=FACTS):
    return [f"{relation}/{i}" for i, (relation, _) in enumerate(facts)]


def prompts(facts=FACTS):
    rows = [(name, r, "factual", s, "o", "{} is", f"{s} is", 0) for name, (r, s) in zip(ids(facts), facts, strict=True)]
    return tables.check(pl.DataFrame(rows, schema=list(tables.SCHEMAS["prompts"].columns), orient="row"), "prompts")


def random_increases():
    """[prompts, layers, (attn, ffn)], in steps of 1/64, exact in float32; some negative, totals positive."""
    found = np.random.default_rng(5).integers(-30, 90, (len(FACTS), L, 2)) / 64
    found[::2, 2, 1] += 1  # some prompts peak at layer 2, others anywhere
    return found


def layers_table(increases, facts=FACTS):
    rows = [
        (name, layer, component, float(value))
        for name, of_prompt in zip(ids(facts), increases, strict=True)
        for layer, pair in enumerate(of_prompt)
        for component, value in zip(("attn", "ffn"), pair, strict=True)
    ]
    return tables.check(pl.DataFrame(rows, schema=["prompt_id", "layer", "component", "lpi"], orient="row"), "layers")


def predictions(rise, ranks=RANKS, facts=FACTS):
    """``rise`` is log p_L - log p_0."""
    flags = {"single_token": True, "leaked": False, "boundary_merge": False}
    rows = [
        {"prompt_id": name, "relation": r, "category": "factual", "subject": s, "object": "o", "target_id": 7, **flags,
         "rank": rank, "rank_filtered": 1, "log_prob": -1.0, "log_prob_h0": -1.0 - gained, "argmax_id": 1}
        for name, (r, s), rank, gained in zip(ids(facts), facts, ranks, rise, strict=True)
    ]  # fmt: skip
    return tables.check(pl.DataFrame(rows), "predictions")


def active_sums(active=ACTIVE, facts=FACTS):
    sums = dict.fromkeys(("sum_positive", "sum_negative", "sum_positive_log"), 0.0)
    rows = [
        {"prompt_id": name, "component": component, "active": number, **sums}
        for name, of_prompt in zip(ids(facts), active, strict=True)
        for component, number in (("attn", 1000), ("ffn", of_prompt))
    ]
    return tables.check(pl.DataFrame(rows), "active_sums")


def scored(increases, rise=None, ranks=RANKS, active=ACTIVE, facts=FACTS, step=None, d=D):
    rise = increases.sum(axis=(1, 2)) if rise is None else rise
    return Scored(step, predictions(rise, ranks, facts), layers_table(increases, facts), active_sums(active, facts), d)


def by_quantity(frame):
    return {row["quantity"]: (row["value"], row["low"], row["high"]) for row in frame.iter_rows(named=True)}


def drawn(facts=FACTS, seed=0):
    """The numbers of the prompts in the sample, then in every draw, each as often as its subject is drawn."""
    bootstrap = SubjectBootstrap.draw({subject for _, subject in facts}, seed)
    position = [bootstrap.subjects.index(subject) for _, subject in facts]
    for counts in bootstrap.counts.astype(int):
        yield np.repeat(np.arange(len(facts)), counts[position])


def brute_force(increases, rise, chosen, facts=FACTS):
    """Every quantity from the prompts that were drawn, one after the other."""
    attn = np.mean([sum(increases[i, :, 0]) for i in chosen])
    ffn = np.mean([sum(increases[i, :, 1]) for i in chosen])
    gained = np.mean([rise[i] for i in chosen])
    peak = np.mean([max(range(L), key=lambda layer: increases[i, layer, 1]) for i in chosen])
    of_relations = []
    for relation in "abc":
        inside = [i for i in chosen if facts[i][0] == relation]
        if inside:
            profile = [np.mean([increases[i, layer, 1] for i in inside]) for layer in range(L)]
            of_relations.append(min(layer for layer in range(L) if profile[layer] > max(profile) - 1e-9))
    millions = np.mean([ACTIVE[i] * (D + D + D) for i in chosen]) / 1e6
    return {
        "hit@10": np.mean([RANKS[i] <= 10 for i in chosen]),
        "mrr": np.mean([1 / RANKS[i] for i in chosen]),
        "ffn_gain": ffn,
        "attn_gain": attn,
        "peak_layer": peak,
        "peak_depth": peak / L,
        "peak_layer_relations": np.mean(of_relations),
        "layer_efficiency": ffn / L,
        "ffn_share": ffn / (ffn + attn),
        "gain_share": (ffn + attn) / gained,
        "ffn_gain_share": ffn / gained,
        "gain_per_active_parameter": ffn / millions,
    }


@pytest.mark.parametrize("seed", [0, 3])
def test_efficiency_is_what_resampling_prompt_by_prompt_gives(seed):
    increases = random_increases()
    # a model for which the gains do not add up: the parallel residual of some families
    rise = increases.sum(axis=(1, 2)) * np.linspace(0.5, 1.5, len(FACTS))
    table = efficiency("tiny", scored(increases, rise, step=700), prompts(), seed)
    draws = [brute_force(increases, rise, chosen) for chosen in drawn(seed=seed)]
    found = by_quantity(table)
    assert set(found) == set(QUANTITIES)
    for quantity, (value, low, high) in found.items():
        course = [draw[quantity] for draw in draws]
        assert value == pytest.approx(course[0], rel=1e-6)
        assert [low, high] == pytest.approx(np.percentile(course[1:], [2.5, 97.5]), rel=1e-6)
        assert low < high
    assert set(table.select("series", "step", "published", "note").rows()) == {("tiny", 700, None, None)}


def test_efficiency_by_hand():
    """Two prompts of one relation, FFN increases 1, 5, 2 and 6, 1, 0; attention 1 and 2 in all."""
    facts = [("a", "s0"), ("a", "s1")]
    increases = np.array([[[0.5, 1], [0.5, 5], [0, 2]], [[0, 6], [0, 1], [2, 0]]], dtype=float)
    one = scored(increases, [9.0, 9.0], [1, 100], [1000, 3000], facts, d=10)
    found = {name: value for name, (value, _, _) in by_quantity(efficiency("s", one, prompts(facts))).items()}
    assert found == {
        "hit@10": 0.5,
        "mrr": pytest.approx((1 + 1 / 100) / 2),
        "ffn_gain": 7.5,
        "attn_gain": 1.5,
        "peak_layer": 0.5,
        "peak_depth": pytest.approx(0.5 / 3),
        "peak_layer_relations": 0.0,  # means 3.5, 3, 1
        "layer_efficiency": 2.5,
        "ffn_share": pytest.approx(7.5 / 9),
        "gain_share": 1.0,
        "ffn_gain_share": pytest.approx(7.5 / 9),
        "gain_per_active_parameter": pytest.approx(7.5 / 0.06),  # 2,000 neurons x 3 x 10
    }


def test_what_adds_up_has_a_share_of_one_in_every_draw():
    found = by_quantity(efficiency("s", scored(random_increases()), prompts()))
    assert found["gain_share"] == pytest.approx((1, 1, 1), abs=1e-6)
    assert found["ffn_gain_share"] == pytest.approx(found["ffn_share"], abs=1e-6)
    assert found["ffn_share"][1] < found["ffn_share"][2]


def test_ties_of_the_peak_go_to_the_earlier_layer():
    """Prompts tie at layers 1 and 3; the means of relation a tie at 0 and 4, though no prompt peaks in both."""
    facts = [("a", "s0"), ("a", "s1"), ("b", "s2"), ("b", "s3"), ("b", "s4")]
    ffn = np.zeros((5, L))
    ffn[:2] = [[0.7, 0, 0, 0, 0.1, 0], [0.1, 0, 0, 0, 0.7, 0]]
    ffn[2:, [1, 3]] = [[0.1], [0.2], [0.7]]
    increases = np.stack([np.zeros_like(ffn), ffn], axis=2)
    found = by_quantity(efficiency("s", scored(increases, None, [1] * 5, [1] * 5, facts), prompts(facts)))
    assert found["peak_layer"][0] == pytest.approx((0 + 4 + 1 + 1 + 1) / 5)
    assert found["peak_layer_relations"][0] == pytest.approx((0 + 1) / 2)


def test_the_peak_of_layers_that_all_lose_is_where_they_lose_least():
    increases = np.full((len(FACTS), L, 2), -1.0)
    increases[:, 4, 1] = -0.25
    increases[:, 1, 0] = 3.0  # of attention, which has no part in it
    found = by_quantity(efficiency("s", scored(increases), prompts()))
    for quantity in ("peak_layer", "peak_layer_relations"):
        assert found[quantity] == (4, 4, 4)  # also where a draw lacks a relation: it does not count as layer 0
    assert found["ffn_gain"] == pytest.approx((-5.25,) * 3)
    assert found["layer_efficiency"][0] == pytest.approx(-5.25 / L)
    assert found["gain_per_active_parameter"][0] < 0


def test_no_share_of_a_total_that_is_not_positive():
    increases = np.zeros((len(FACTS), L, 2))
    increases[:, 0, 0], increases[:, 3, 1] = -1.0, 3.0
    found = by_quantity(efficiency("s", scored(increases), prompts()))
    assert found["ffn_share"] == (None,) * 3  # attention loses
    assert found["gain_share"] == pytest.approx((1, 1, 1))
    assert found["ffn_gain_share"] == pytest.approx((1.5, 1.5, 1.5))
    for attn, ffn in ((-3.0, 1.0), (-1.0, 1.0), (1e-8, 1e-8), (0.0, 0.0)):  # 1e-8 nats count as nothing
        increases[:, 0, 0], increases[:, 3, 1] = attn, ffn
        found = by_quantity(efficiency("s", scored(increases), prompts()))
        for share in SHARES:
            assert found[share] == (None,) * 3
        assert found["attn_gain"][0] == pytest.approx(attn)
    assert found["gain_per_active_parameter"] == (0, 0, 0)


def test_no_interval_of_a_share_whose_total_may_be_nothing():
    """The total is positive in the sample, and negative in many draws: those with a value would look certain."""
    increases = np.zeros((len(FACTS), L, 2))
    increases[:, 0, 1] = 2 / 16
    increases[:, 1, 0] = np.array([-8, 9, -8, 9, -8, 9, -8, -3]) / 16
    found = by_quantity(efficiency("s", scored(increases), prompts()))
    total = increases.sum(axis=(1, 2))
    draws = [total[chosen].mean() for chosen in drawn()]
    assert draws[0] > 0 > np.percentile(draws[1:], 2.5)
    assert found["gain_share"] == (pytest.approx(1), None, None)
    assert found["ffn_gain_share"] == (pytest.approx(2 / 16 / draws[0]), None, None)
    assert found["ffn_share"] == (None,) * 3
    assert None not in found["ffn_gain"] + found["attn_gain"]
    increases[..., 1] += increases[..., 0]  # the same total, all of the FFN
    curves = gains(None, layers_table(increases), prompts()).filter(component="ffn")
    for quantity, column in (("share", "layer"), ("stage_share", "stage")):
        ends = curves.filter(quantity=quantity).select("value", "low", "high")
        assert len(ends) == curves[column].n_unique() - 1
        assert not ends["value"].is_null().any()
        assert ends.select(pl.col("low", "high").is_null().all()).row(0) == (True, True)


def test_a_few_draws_without_a_total_are_left_out():
    """The total is at or below zero in less than 2.5% of the draws: the interval is that of the others."""
    facts = [("a", f"s{i}") for i in range(8)]
    increases = np.zeros((8, L, 2))
    increases[:, 0, 1] = 1.0
    increases[:5, 1, 0] = 1.0
    increases[5:, 1, 0] = -1.4  # not positive where 7 or 8 of 8 draws are of these
    one = scored(increases, None, [1] * 8, [1] * 8, facts)
    found = by_quantity(efficiency("s", one, prompts(facts)))
    total = np.array([increases[chosen].sum(axis=(1, 2)).mean() for chosen in drawn(facts)])
    kept = total[1:][total[1:] > 1e-7]
    assert 0.975 < len(kept) / len(total[1:]) < 1
    ends = np.percentile(1 / kept, [2.5, 97.5])
    assert found["ffn_gain_share"] == pytest.approx((1 / total[0], *ends))


def test_one_subject_has_values_and_no_intervals():
    facts = [("a", "s0"), ("b", "s0")]
    increases = np.ones((2, L, 2))
    table = efficiency("s", scored(increases, None, [1, 20], [5, 5], facts), prompts(facts))
    assert table["low"].is_null().all()
    assert table["high"].is_null().all()
    assert not table["value"].is_null().any()
    curves = gains(3, layers_table(increases, facts), prompts(facts))
    assert curves["low"].is_null().all()
    assert not curves["value"].is_null().any()
    accuracy = relation_accuracy("s", 3, predictions([1, 1], [1, 20], facts), prompts(facts))
    assert accuracy["low"].is_null().all()
    assert not accuracy["value"].is_null().any()


def test_a_width_that_is_unknown_leaves_only_the_parameters_out():
    found = by_quantity(efficiency("s", scored(random_increases(), d=None), prompts()))
    assert {name for name, (value, _, _) in found.items() if value is None} == {"gain_per_active_parameter"}


def test_the_order_of_rows_does_not_matter():
    increases = random_increases()
    one = scored(increases)
    shuffled = one._replace(
        **{
            name: getattr(one, name).sample(fraction=1, shuffle=True, seed=1)
            for name in ("predictions", "layers", "active_sums")
        }
    )
    assert efficiency("s", one, prompts()).equals(efficiency("s", shuffled, prompts().reverse()))
    assert gains(1, one.layers, prompts()).equals(gains(1, shuffled.layers, prompts().reverse()))
    facts = [("ab"[i % 2], f"s{i % 10}") for i in range(200)]
    many = predictions([1.0] * 200, np.random.default_rng(0).integers(1, 99, 200), facts)
    shuffled = many.sample(fraction=1, shuffle=True, seed=1)
    accuracies = [relation_accuracy("s", 1, frame, prompts(facts)) for frame in (many, shuffled)]
    assert accuracies[0].equals(accuracies[1])


def test_tables_that_do_not_fit_are_named():
    one = scored(random_increases(), step=30)
    without = pl.col("prompt_id") != "b/5"
    for name in ("predictions", "active_sums"):
        torn = one._replace(**{name: getattr(one, name).filter(without)})
        with pytest.raises(EfficiencyError, match=rf"step 30: {name}\.parquet and layers\.parquet are of different"):
            efficiency("s", torn, prompts())
    with pytest.raises(EfficiencyError, match=r"step 30: predictions\.parquet"):
        efficiency("s", one._replace(layers=one.layers.filter(without)), prompts())
    with pytest.raises(SampleError, match="step 30: prompt b/5 is not in prompts"):
        efficiency("s", one, prompts().filter(without))
    with pytest.raises(SampleError, match=r"step main: prompt b/5 is not in prompts"):
        relation_accuracy("s", None, one.predictions, prompts().filter(without))
    with pytest.raises(SampleError, match="step main: a prompt lacks layers"):
        gains(None, one.layers.filter((pl.col("layer") != 3) | without), prompts())
    for torn in (one.layers.filter(pl.col("layer") != 3), one.layers.clear()):
        with pytest.raises(EfficiencyError, match=r"step main: layers\.parquet lacks a layer"):
            gains(None, torn, prompts())
        with pytest.raises(EfficiencyError, match=r"step 30: layers\.parquet lacks a layer"):
            efficiency("s", one._replace(layers=torn), prompts())
    with pytest.raises(EfficiencyError, match=r"step 30: predictions\.parquet holds no prompts"):
        relation_accuracy("s", 30, one.predictions.clear(), prompts())
    with pytest.raises(StatisticsError, match="no subject"):
        efficiency("s", one, prompts().clear())


@pytest.mark.parametrize(
    ("layers", "edges", "labels"),
    [
        (24, None, ["layers 0-12", "layers 13-18", "layers 19-23"]),  # the paper's of Qwen1.5-MoE, there from 1
        (32, None, ["layers 0-16", "layers 17-24", "layers 25-31"]),
        (16, None, ["layers 0-7", "layers 8-11", "layers 12-15"]),
        (16, (9, 12), ["layers 0-8", "layers 9-11", "layers 12-15"]),
        (3, (1, 2), ["layer 0", "layer 1", "layer 2"]),
        (3, None, ["layer 0", "layer 1", "layer 2"]),
    ],
)
def test_stages(layers, edges, labels):
    found = stages(layers, edges)
    assert [stage.name for stage in found] == ["early", "mid", "late"]
    assert [stage.label for stage in found] == labels


def test_stages_cover_every_layer_once_however_few_there_are():
    for layers in range(1, 100):
        assert [layer for stage in stages(layers) for layer in range(stage.first, stage.end)] == list(range(layers))
    assert stages(2) == [Stage("early", 0, 1), Stage("late", 1, 2)]
    assert stages(1) == [Stage("late", 0, 1)]


@pytest.mark.parametrize("edges", [(0, 3), (3, 3), (4, 2), (-1, 3), (2, 6), (2, 9)])
def test_edges_that_are_none_are_refused(edges):
    with pytest.raises(EfficiencyError, match=rf"6 layers cannot have the edges {edges[0]} and {edges[1]}; give two"):
        stages(6, edges)
    with pytest.raises(EfficiencyError, match="or none for the default"):
        gains(None, layers_table(random_increases()), prompts(), edges=edges)


def test_gains_are_what_resampling_prompt_by_prompt_gives():
    increases, edges = random_increases(), (2, 3)
    table = gains(None, layers_table(increases), prompts(), edges=edges)
    spans = {"early": (0, 2), "mid": (2, 3), "late": (3, L)}
    assert len(table) == 2 * (3 * L + 3 * len(spans))
    assert table["step"].is_null().all()
    profiles = np.array([increases[chosen].mean(axis=0) for chosen in drawn()])
    for row in table.iter_rows(named=True):
        profile = profiles[..., ("attn", "ffn").index(row["component"])]
        first, end = spans[row["stage"]] if row["stage"] else (0, row["layer"] + 1)
        summed, total = profile[:, first:end].sum(axis=1), profile.sum(axis=1)
        course = {
            "layer": profile[:, end - 1],
            "cumulative": summed,
            "share": summed / total,
            "stage_gain": summed,
            "stage_share": summed / total,
            "stage_gain_per_layer": profile[:, first:end].mean(axis=1),
        }[row["quantity"]]
        assert row["value"] == pytest.approx(course[0])
        assert [row["low"], row["high"]] == pytest.approx(np.percentile(course[1:], [2.5, 97.5]))
        assert row["quantity"].startswith("stage") == (row["stage"] is not None) == (row["layer"] is None)


def of(table, component, quantity):
    return table.filter(component=component, quantity=quantity).sort("layer", "stage")


def test_gains_add_up():
    table = gains(10, layers_table(random_increases()), prompts())
    totals = by_quantity(efficiency("s", scored(random_increases()), prompts()))
    for component in ("attn", "ffn"):
        of_layers, cumulative, share = (of(table, component, q) for q in ("layer", "cumulative", "share"))
        assert of_layers["layer"].to_list() == list(range(L))
        assert cumulative["value"].to_numpy() == pytest.approx(of_layers["value"].to_numpy().cumsum())
        total = cumulative.select("value", "low", "high").row(-1)
        assert total == pytest.approx(totals[f"{component}_gain"])
        assert share["value"].to_numpy() == pytest.approx(cumulative["value"].to_numpy() / total[0])
        assert share.select("value", "low", "high").row(-1) == pytest.approx((1, 1, 1))
        assert of(table, component, "stage_share")["value"].sum() == pytest.approx(1)
        assert of(table, component, "stage_gain")["value"].sum() == pytest.approx(total[0])
        per_layer = of(table, component, "stage_gain_per_layer")
        assert dict(per_layer.select("stage", "value").rows()) == pytest.approx(
            {s.name: of_layers["value"][s.first : s.end].mean() for s in stages(L)}
        )


def test_layers_that_lose():
    """FFN: 3, -1, -1, 1 and so beyond the total in between; attention loses in all: no shares, but gains."""
    increases = np.zeros((len(FACTS), 4, 2))
    increases[..., 1] = [3, -1, -1, 1]
    increases[..., 0] = [1, -2, 0, -3]
    table = gains(10, layers_table(increases), prompts(), edges=(1, 3))
    assert of(table, "ffn", "share")["value"].to_list() == pytest.approx([1.5, 1, 0.5, 1])
    stage_share = dict(of(table, "ffn", "stage_share").select("stage", "value").rows())
    assert stage_share == pytest.approx({"early": 1.5, "mid": -1.0, "late": 0.5})
    lost = table.filter(pl.col("component") == "attn", pl.col("quantity").is_in(["share", "stage_share"]))
    assert len(lost) == 4 + 3
    assert lost.select(pl.col("value", "low", "high").is_null().all()).row(0) == (True, True, True)
    assert of(table, "attn", "cumulative")["value"].to_list() == pytest.approx([1, -1, -1, -4])
    stage_gain = dict(of(table, "attn", "stage_gain").select("stage", "value").rows())
    assert stage_gain == pytest.approx({"early": 1, "mid": -2, "late": -3})


def test_a_stage_without_layers_has_no_rows():
    table = gains(10, layers_table(random_increases()[:, :2]), prompts())
    assert set(table["stage"].drop_nulls()) == {"early", "late"}
    assert of(table, "ffn", "stage_share")["value"].sum() == pytest.approx(1)


def test_relation_accuracy_by_hand_and_by_resampling():
    table = relation_accuracy("tiny", None, predictions([1.0] * len(FACTS)), prompts(), seed=2)
    assert set(table.select("series", "step").rows()) == {("tiny", None)}
    assert len(table) == (3 + 2) * 2
    rows = {(row["relation"], row["metric"]): row for row in table.iter_rows(named=True)}
    assert {name: row["prompts"] for (name, _), row in rows.items()} == {"a": 4, "b": 3, "c": 1, "all": 8, "macro": 8}
    assert rows["a", "hit@10"]["value"] == pytest.approx(3 / 4)
    assert rows["b", "mrr"]["value"] == pytest.approx((1 / 5 + 1 / 30 + 1 / 10) / 3)
    assert (rows["c", "mrr"]["value"], rows["c", "mrr"]["low"]) == (pytest.approx(1 / 11), None)
    for metric, by_prompt in (("hit@10", np.array(RANKS) <= 10), ("mrr", 1 / np.array(RANKS))):
        courses = {"all": [], "macro": [], "a": [], "b": []}
        for chosen in drawn(seed=2):
            means = {}
            for relation in "abc":
                inside = [by_prompt[i] for i in chosen if FACTS[i][0] == relation]
                if inside:
                    means[relation] = np.mean(inside)
            courses["all"].append(by_prompt[chosen].mean())
            courses["macro"].append(np.mean(list(means.values())))
            for relation in "ab":
                courses[relation].append(means.get(relation, np.nan))
        for relation, course in courses.items():
            found = rows[relation, metric]
            assert found["value"] == pytest.approx(course[0])
            assert [found["low"], found["high"]] == pytest.approx(np.nanpercentile(course[1:], [2.5, 97.5]))


def test_relations_that_were_not_scored_have_no_rows():
    facts = [*FACTS, ("d", "s9")]
    table = relation_accuracy("s", 1, predictions([1.0] * len(FACTS)), prompts(facts))
    assert set(table["relation"]) == {"a", "b", "c", "all", "macro"}
    increases = random_increases()
    found = by_quantity(efficiency("s", scored(increases), prompts(facts)))
    expected = brute_force(increases, increases.sum(axis=(1, 2)), range(len(FACTS)))
    assert found["peak_layer_relations"][0] == pytest.approx(expected["peak_layer_relations"])
