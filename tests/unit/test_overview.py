"""Summary tables of a series, against numbers worked out by hand on tables of a few rows."""

import math
import weakref

import numpy as np
import polars as pl
import pytest

from moescope import tables
from moescope.overview import OverviewError, accuracy, layer_importance, top_experts
from moescope.sample import Checkpoint, SampleError
from moescope.statistics import StatisticsError, SubjectBootstrap

#: prompt_id -> relation, category, subject. France occurs in two relations, red is the only prompt of its category.
FACTS = {
    "capital/0": ("capital", "factual", "France"),
    "capital/1": ("capital", "factual", "Chad"),
    "capital/2": ("capital", "factual", "Peru"),
    "language/0": ("language", "factual", "France"),
    "color/0": ("color", "sense", "lemon"),
}


def prompts(facts=FACTS):
    rows = [(prompt, *fact, "object", "{} is", f"{fact[2]} is", 0) for prompt, fact in facts.items()]
    return tables.check(pl.DataFrame(rows, schema=list(tables.SCHEMAS["prompts"].columns), orient="row"), "prompts")


def predictions(ranks, facts=FACTS, log_prob=-1.0, flags=None):
    """Ranks in the order of ``facts``; ``flags``: prompt -> the flags that deviate."""
    rows = []
    for (prompt, (relation, category, subject)), rank in zip(facts.items(), ranks, strict=True):
        usual = {"single_token": True, "leaked": False, "boundary_merge": False, **(flags or {}).get(prompt, {})}
        name = {"prompt_id": prompt, "relation": relation, "category": category, "subject": subject, "object": "o"}
        score = {"rank": rank, "rank_filtered": 1, "log_prob": log_prob, "log_prob_h0": -9.0, "argmax_id": 1}
        rows.append({**name, "target_id": 7, **usual, **score})
    return tables.check(pl.DataFrame(rows), "predictions")


def cell(table, subset="all", scope="all", name=None, average="micro", metric="hit@10", step=None):
    """The one row of these keys, as a dict."""
    chosen = table.filter(
        pl.col("subset") == subset,
        pl.col("scope") == scope,
        pl.col("name").eq_missing(pl.lit(name, dtype=pl.String)),
        pl.col("average") == average,
        pl.col("metric") == metric,
    )
    chosen = chosen if step is None else chosen.filter(pl.col("step") == step)
    assert len(chosen) == 1
    return chosen.row(0, named=True)


RANKS = [1, 10, 11, 4, 2]


def test_accuracy_by_hand():
    table = accuracy([Checkpoint(700, 1000, predictions(RANKS))], prompts())
    everything = cell(table)
    assert (everything["step"], everything["tokens"], everything["prompts"]) == (700, 1000, 5)
    assert everything["value"] == pytest.approx(4 / 5)
    assert cell(table, metric="hit@1")["value"] == pytest.approx(1 / 5)
    assert cell(table, metric="mrr")["value"] == pytest.approx((1 + 1 / 10 + 1 / 11 + 1 / 4 + 1 / 2) / 5)
    assert cell(table, metric="log_prob")["value"] == pytest.approx(-1.0)
    # macro: the relations' means are 2/3, 1, 1
    assert cell(table, average="macro")["value"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    factual = cell(table, scope="category", name="factual")
    assert (factual["value"], factual["prompts"]) == (pytest.approx(3 / 4), 4)
    assert cell(table, scope="category", name="factual", average="macro")["value"] == pytest.approx((2 / 3 + 1) / 2)
    capital = cell(table, scope="relation", name="capital")
    assert (capital["value"], capital["prompts"]) == (pytest.approx(2 / 3), 3)


def test_rows_of_accuracy():
    table = accuracy([Checkpoint(0, None, predictions(RANKS))], prompts())
    assert set(table["subset"]) == {"all", "unflagged"}
    assert set(table.filter(pl.col("scope") == "relation")["average"]) == {"micro"}
    assert set(table["metric"]) == {"hit@1", "hit@10", "mrr", "log_prob"}
    assert table["tokens"].is_null().all()
    # (all, 2 categories) x 2 averages + 3 relations, 4 metrics, 2 subsets
    assert len(table) == (3 * 2 + 3) * 4 * 2


def test_intervals_of_accuracy_are_those_of_all_subjects_of_the_prompt_table():
    table = accuracy([Checkpoint(0, None, predictions(RANKS))], prompts(), seed=3)
    bootstrap = SubjectBootstrap.draw(["Chad", "France", "Peru", "lemon"], seed=3)
    counts = dict(zip(bootstrap.subjects, bootstrap.counts[1:].T, strict=True))
    hits = {"Chad": 1, "Peru": 0, "France": 1}
    drawn = sum(counts[name] * hit for name, hit in hits.items())
    with np.errstate(invalid="ignore"):
        means = drawn / sum(counts[name] for name in hits)
    capital = cell(table, scope="relation", name="capital")
    assert [capital["low"], capital["high"]] == pytest.approx(np.nanpercentile(means, [2.5, 97.5]).tolist())
    micro = (drawn + counts["France"] + counts["lemon"]) / (
        counts["Chad"] + counts["Peru"] + 2 * counts["France"] + counts["lemon"]
    )
    everything = cell(table)
    assert [everything["low"], everything["high"]] == pytest.approx(np.percentile(micro, [2.5, 97.5]).tolist())


def test_one_subject_has_a_value_and_no_interval():
    table = accuracy([Checkpoint(0, None, predictions(RANKS))], prompts())
    color = cell(table, scope="relation", name="color")
    assert (color["value"], color["low"], color["high"]) == (1.0, None, None)


def test_flags_part_the_prompts():
    flags = {"capital/0": {"leaked": True}, "capital/2": {"boundary_merge": True}, "color/0": {"single_token": False}}
    table = accuracy([Checkpoint(0, None, predictions(RANKS, flags=flags))], prompts())
    flagged, rest = cell(table, subset="flagged", metric="mrr"), cell(table, subset="unflagged", metric="mrr")
    assert (flagged["prompts"], rest["prompts"]) == (3, 2)
    assert flagged["value"] == pytest.approx((1 + 1 / 11 + 1 / 2) / 3)
    assert rest["value"] == pytest.approx((1 / 10 + 1 / 4) / 2)
    assert cell(table)["prompts"] == 5


def test_equal_checkpoints_have_equal_intervals_and_the_order_of_rows_does_not_matter():
    frame = predictions(RANKS)
    table = accuracy([Checkpoint(10, 1, frame), Checkpoint(20, 2, frame.reverse())], prompts().reverse())
    first, second = (table.filter(pl.col("step") == step).drop("step", "tokens") for step in (10, 20))
    assert first.equals(second)


def many(count):
    return {f"r/{i}": ("r", "user", f"s{i}") for i in range(count)}


def test_seen_held_out_and_exposure_quarters():
    facts = many(10)
    # two of ten are held out; the eight seen ones fall into quarters of two, those of equal exposure together
    exposures = [1, 2, 5, 5, 9, 9, 30, 40, 1000, 1000]
    exposure = pl.DataFrame({"prompt_id": list(facts), "exposures": exposures, "held_out": [False] * 8 + [True] * 2})
    ranks = [20, 20, 20, 1, 1, 20, 1, 1, 1, 20]
    table = accuracy([Checkpoint(5, 5, predictions(ranks, facts))], prompts(facts), exposure.reverse())
    values = {s: (cell(table, subset=s)["value"], cell(table, subset=s)["prompts"]) for s in set(table["subset"])}
    assert values == {
        "all": (pytest.approx(5 / 10), 10),
        "unflagged": (pytest.approx(5 / 10), 10),
        "seen": (pytest.approx(4 / 8), 8),
        "held_out": (pytest.approx(1 / 2), 2),
        "exposure_1": (0.0, 2),
        "exposure_2": (0.5, 2),
        "exposure_3": (0.5, 2),
        "exposure_4": (1.0, 2),
    }


def test_facts_met_equally_often_share_a_quarter():
    facts = many(8)
    exposure = pl.DataFrame({"prompt_id": list(facts), "exposures": [1, 1, 1, 1, 1, 1, 7, 8], "held_out": [False] * 8})
    table = accuracy([Checkpoint(5, 5, predictions([1] * 8, facts))], prompts(facts), exposure)
    sizes = {s: cell(table, subset=s)["prompts"] for s in set(table["subset"]) if s.startswith("exposure")}
    assert sizes == {"exposure_2": 6, "exposure_4": 2}


def test_tables_that_do_not_fit_are_named():
    fitting = prompts()
    with pytest.raises(SampleError, match=r"step 30: prompt language/0 is not in prompts\.parquet"):
        accuracy([Checkpoint(30, 1, predictions(RANKS))], fitting.filter(pl.col("prompt_id") != "language/0"))
    exposure = pl.DataFrame({"prompt_id": ["capital/0"], "exposures": [1], "held_out": [False]})
    with pytest.raises(OverviewError, match=r"prompt capital/1 is not in exposure\.parquet"):
        accuracy([Checkpoint(30, 1, predictions(RANKS))], fitting, exposure)
    with pytest.raises(OverviewError, match="no checkpoint"):
        accuracy([], fitting)
    with pytest.raises(StatisticsError, match="no subject"):
        accuracy([], fitting.clear())
    torn = fitting.with_columns(
        category=pl.when(pl.col("prompt_id") == "capital/0").then(pl.lit("user")).otherwise("category")
    )
    with pytest.raises(SampleError, match="relation capital stands in two categories"):
        accuracy([Checkpoint(30, 1, predictions(RANKS))], torn)


@pytest.mark.parametrize("summarise", [accuracy, layer_importance])
def test_checkpoints_are_streamed(summarise):
    frames, most = [], 0

    def stream():
        nonlocal most
        for step in range(1, 30):
            frame = predictions(RANKS) if summarise is accuracy else layers(INCREASES)
            frames.append(weakref.ref(frame))
            yield Checkpoint(step, step, frame)
            del frame
            most = max(most, sum(frame() is not None for frame in frames))

    assert summarise(stream(), prompts())["step"].n_unique() == 29
    assert most <= 2


#: prompt -> increases of two layers, attention and FFN (nats)
INCREASES = {
    "capital/0": [[1.0, 2.0], [3.0, 4.0]],
    "capital/1": [[0.0, 0.0], [0.0, 0.0]],
    "capital/2": [[-1.0, 0.5], [2.0, 1.0]],
    "language/0": [[2.0, 0.0], [1.0, 8.0]],
    "color/0": [[0.5, 0.0], [0.0, -1.0]],
}


def layers(increases):
    rows = [
        (prompt, layer, component, value)
        for prompt, of_layers in increases.items()
        for layer, pair in enumerate(of_layers)
        for component, value in zip(("attn", "ffn"), pair, strict=True)
    ]
    return tables.check(pl.DataFrame(rows, schema=["prompt_id", "layer", "component", "lpi"], orient="row"), "layers")


def test_layer_importance_by_hand():
    table = layer_importance([Checkpoint(700, 9, layers(INCREASES))], prompts())
    assert len(table) == (2 + 1 + 1) * 2
    values = {
        (a, layer, c): value for a, layer, c, value in table.select("aggregate", "layer", "component", "value").rows()
    }
    means = np.mean(list(INCREASES.values()), axis=0)
    for layer in (0, 1):
        for i, component in enumerate(("attn", "ffn")):
            assert values["layer", layer, component] == pytest.approx(means[layer, i])
    for i, component in enumerate(("attn", "ffn")):
        assert values["mean", None, component] == pytest.approx(means[:, i].mean())
        assert values["total", None, component] == pytest.approx(means[:, i].sum())


def test_intervals_of_totals_keep_the_layers_of_a_prompt_together():
    # layer 1 takes back what layer 0 gave: the total is certain, though each layer is not
    taking = {prompt: [[x, 0.0], [5 - x, 0.0]] for prompt, x in zip(FACTS, [0.0, 1, 2, 3, 4], strict=True)}
    table = layer_importance([Checkpoint(1, 1, layers(taking))], prompts()).filter(pl.col("component") == "attn")
    width = {row["aggregate"]: row["high"] - row["low"] for row in table.iter_rows(named=True)}
    assert width["layer"] > 1
    assert width["total"] == pytest.approx(0, abs=1e-12)
    assert width["mean"] == pytest.approx(0, abs=1e-12)


def test_a_prompt_that_lacks_a_layer_is_refused():
    frame = layers(INCREASES).filter(~((pl.col("prompt_id") == "color/0") & (pl.col("layer") == 1)))
    with pytest.raises(SampleError, match="step main: a prompt lacks layers"):
        layer_importance([Checkpoint(None, None, frame)], prompts())


def routing(chosen, experts=3):
    """prompt -> {(layer, expert): lpi} of the routed experts; all others of two layers are listed as unrouted."""
    rows = []
    for prompt, routed in chosen.items():
        for layer in range(2):
            for expert in range(experts):
                lpi = routed.get((layer, expert))
                rows.append((prompt, layer, expert, None if lpi is None else 0, 0.5, 0.5, lpi or 0.0))
    schema = ["prompt_id", "layer", "expert", "slot", "weight", "probability", "lpi"]
    return tables.check(pl.DataFrame(rows, schema=schema, orient="row"), "routing")


ROUTED = {
    "capital/0": {(0, 0): 3.0, (0, 2): 0.5, (1, 1): 0.75},
    "capital/1": {(0, 0): 1.0, (0, 2): 1.0, (1, 2): -0.75},
    "capital/2": {(0, 0): 2.0, (0, 2): 0.0, (1, 1): 0.75},
    "language/0": {(0, 0): 0.5, (1, 1): 0.25},
    "color/0": {(0, 1): 1.0, (0, 0): -0.5},
}


def test_top_experts_by_hand():
    table = top_experts(routing(ROUTED), prompts(), step=700)
    assert set(table["step"]) == {700}
    capital = table.filter(pl.col("relation") == "capital").sort("rank")
    listed = [tuple(row) for row in capital.select("rank", "layer", "expert").rows()]
    # (0, 2) and (1, 1) tie at 0.5: the earlier layer first; (0, 1), (1, 0): never routed to
    assert listed == [(1, 0, 0), (2, 0, 2), (3, 1, 1), (4, 1, 2)]
    assert capital["value"].to_list() == pytest.approx([2.0, 0.5, 0.5, -0.25])
    assert capital["routed"].to_list() == pytest.approx([1, 1, 2 / 3, 1 / 3])
    assert capital["elsewhere"].to_list() == pytest.approx([0.0, 0.0, 0.125, 0.0])
    color = table.filter(pl.col("relation") == "color")
    assert color.select("rank", "layer", "expert", "value", "low").rows() == [
        (1, 0, 1, 1.0, None),
        (2, 0, 0, -0.5, None),
    ]
    assert color["elsewhere"].to_list() == pytest.approx([0.0, 6.5 / 4])


def test_intervals_of_experts_are_those_of_the_relation():
    table = top_experts(routing(ROUTED), prompts(), step=None, seed=2)
    bootstrap = SubjectBootstrap.draw(["Chad", "France", "Peru", "lemon"], seed=2)
    counts = dict(zip(bootstrap.subjects, bootstrap.counts[1:].T, strict=True))
    with np.errstate(invalid="ignore"):
        means = (3 * counts["France"] + counts["Chad"] + 2 * counts["Peru"]) / (
            counts["France"] + counts["Chad"] + counts["Peru"]
        )
    best = table.filter(pl.col("relation") == "capital", pl.col("rank") == 1).row(0, named=True)
    assert [best["low"], best["high"]] == pytest.approx(np.nanpercentile(means, [2.5, 97.5]).tolist())


def test_no_more_than_five_experts_and_no_elsewhere_with_one_relation():
    facts = many(3)
    everywhere = {(layer, expert): 1.0 + layer + expert / 10 for layer in range(2) for expert in range(4)}
    table = top_experts(routing(dict.fromkeys(facts, everywhere), experts=4), prompts(facts), step=1)
    assert table.select("rank", "layer", "expert").rows() == [(1, 1, 3), (2, 1, 2), (3, 1, 1), (4, 1, 0), (5, 0, 3)]
    assert table["elsewhere"].is_null().all()
    assert all(math.isclose(low, value) for low, value in table.select("low", "value").rows())


def test_listing_unrouted_experts_changes_nothing():
    frame = routing(ROUTED)
    only_routed = frame.filter(pl.col("slot").is_not_null()).sample(fraction=1, shuffle=True, seed=1)
    assert top_experts(frame, prompts(), 1).equals(top_experts(only_routed, prompts(), 1))
