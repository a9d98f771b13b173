"""The paper's numbers of study collaboration: as printed, beside the same quantity of the same model, only there."""

import csv
import functools
import itertools
from collections import Counter

import polars as pl
import pytest

from moescope import collaboration_published, published, tables
from moescope.association import Correlation
from moescope.collaboration_published import EXPERT_PAIR, HEAD_PAIR, MODELS, Ours, beside_published, efficiency
from moescope.published import PublishedError
from tests.examples import ROOT

FILE = ROOT / "resources" / "published" / "figures.csv"
FIGURES = published.read(FILE)
REPOS = {
    "qwen": "Qwen/Qwen1.5-MoE-A2.7B",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "qwen-dense": "Qwen/Qwen1.5-7B",
    "llama": "huggyllama/llama-7b",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "mine": None,
    "other": "someone/OLMoE-1B-7B-0924",
}
#: Table 1 as printed: HIT@10, MRR, FFN gain, attention gain, peak layer, its per cent of the depth, layer efficiency.
QUANTITIES = ("hit@10", "mrr", "ffn_gain", "attn_gain", "peak_layer", "peak_depth", "layer_efficiency")
TABLE_1 = {
    "llama": (0.90, 0.70, 5.16, 4.03, 24.82, 77.6, 0.161),
    "qwen-dense": (0.79, 0.62, 6.49, 4.14, 27.08, 90.2, 0.203),
    "mistral": (0.88, 0.71, 6.74, 2.96, 26.64, 83.2, 0.211),
    "qwen": (0.85, 0.63, 7.36, 3.18, 20.36, 84.8, 0.307),
    "olmoe": (0.83, 0.64, 4.98, 4.40, 13.53, 84.6, 0.311),
    "mixtral": (0.90, 0.73, 6.79, 3.03, 26.66, 83.3, 0.212),
}


def frame(name: str, rows: list[dict]) -> pl.DataFrame:
    """A checked table from rows that name only what is not null."""
    schema = tables.SCHEMAS[name].columns
    return tables.check(pl.DataFrame([{c: row.get(c) for c in schema} for row in rows], schema=schema), name)


def interval(value: float) -> dict:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def numbered(rows: list[dict], *, start: float = 0.0, column: str = "value") -> list[dict]:
    """The rows, each with another value, so that a wrong one cannot be taken for the right one."""
    return [row | interval(start + 0.001 * i) | {column: start + 0.001 * i} for i, row in enumerate(rows)]


def crossed(**values: list) -> list[dict]:
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


# Table 1 --------------------------------------------------------------------------------------------------------------


def efficiencies(*steps: int | None) -> pl.DataFrame:
    """All series at the steps, with quantities of table 1 and one that it does not have."""
    return frame(
        "efficiency", numbered(crossed(series=list(REPOS), step=list(steps), quantity=[*QUANTITIES, "gain_share"]))
    )


def test_table_1_stands_beside_the_same_quantity_of_the_same_model_at_main_alone():
    before = efficiencies(None, 1_220_000)
    table = efficiency(before, REPOS, FIGURES)
    found = {row[:2]: row[2] for row in table.drop_nulls("published").select("series", "quantity", "published").rows()}
    assert found == {
        (series, quantity): pytest.approx(value / 100 if quantity == "peak_depth" else value)
        for series, printed in TABLE_1.items()
        for quantity, value in zip(QUANTITIES, printed, strict=True)
    }
    assert table.drop_nulls("published")["step"].null_count() == len(found)
    assert table.drop("published", "note").equals(before.drop("published", "note"))
    assert table.filter(pl.col("published").is_null())["note"].null_count() == len(table) - len(found)


def test_notes_on_table_1_say_where_the_paper_contradicts_itself():
    table = efficiency(efficiencies(None), REPOS, FIGURES)
    notes = {row[:2]: row[2] for row in table.select("series", "quantity", "note").rows()}
    assert notes["qwen", "layer_efficiency"] == (
        "the paper's prose says 0.294; of Qwen1.5-MoE over Qwen1.5-7B its prose says 37%, its table 51%"
    )
    # both are what the printed numbers give
    assert TABLE_1["qwen"][-1] / TABLE_1["qwen-dense"][-1] == pytest.approx(1.51, abs=0.005)
    assert 1.37 <= 0.294 / 0.213 < 1.385
    assert "the paper's prose says 0.213" in notes["qwen-dense", "layer_efficiency"]
    assert "the paper's prose says 0.787" in notes["olmoe", "peak_depth"]
    for quantity in ("peak_layer", "peak_depth"):  # the depth is made of the layer
        assert all("layers from 0 or 1" in notes[series, quantity] for series in TABLE_1)
    assert "main is annealed" in notes["olmoe", "hit@10"]
    assert "converted copy" in notes["llama", "ffn_gain"]
    # (1.0 + .98 + .75 + 1.0 + .95 + .87 + .87 + .35 + .97 + .74 + .76 + .61) / 12
    assert "its table 8 averages to 0.82 over relations" in notes["mixtral", "mrr"]
    assert "table 8" not in notes["mistral", "mrr"]
    assert notes["mistral", "ffn_gain"] is None


def test_the_printed_position_of_the_peak_is_that_of_the_printed_layer_but_for_one_model():
    layers = {"llama": 32, "qwen-dense": 32, "mistral": 32, "qwen": 24, "olmoe": 16, "mixtral": 32}
    off = {s for s, row in TABLE_1.items() if abs(row[4] / layers[s] - row[5] / 100) > 0.002}
    table = efficiency(efficiencies(None), REPOS, FIGURES).filter(quantity="peak_depth")
    noted = table.filter(pl.col("note").str.contains("27.08 of 32 layers, which is 0.846"))
    assert set(noted["series"]) == off == {"qwen-dense"}
    assert pytest.approx(0.846, abs=5e-4) == 27.08 / 32


# All other tables ----------------------------------------------------------------------------------------------------

RELATIONS = sorted({row["relation"] for row in FIGURES.filter(study="collaboration", table="8").iter_rows(named=True)})


@functools.cache
def accuracies() -> pl.DataFrame:
    series, relations = list(REPOS), ["all", "macro", *RELATIONS]
    keys = crossed(series=series, step=[None, 5000], relation=relations, metric=["hit@10", "mrr"])
    return frame("relation_accuracy", [row | {"prompts": 20} for row in numbered(keys)])


@functools.cache
def budgets(shared=(False, True)) -> pl.DataFrame:
    keys = crossed(
        step=[None, 5000],
        mode=["top_n", "only_rank", "drop_rank"],
        size=[0, 1, 2, 3, 4],
        weights=["family", "keep"],
        shared=list(shared),
        named=[("all", None, "micro"), ("all", None, "macro"), ("relation", "name_religion", "micro")],
        metric=["hit@10", "mrr", "log_prob"],
    )
    rows = [{**row, **dict(zip(("scope", "name", "average"), row["named"], strict=True))} for row in numbered(keys)]
    return frame("budgets", [row | {"prompts": 20} for row in rows])


@functools.cache
def blocking() -> pl.DataFrame:
    keys = crossed(
        step=[None, 5000],
        semantics=["reroute", "reroute_logit"],
        size=[1, 5, 10],
        control=["none", "matched", "random"],
        crossfit=[False, True],
        named=[("all", None, "micro"), *(("relation", name, "micro") for name in RELATIONS)],
        metric=["hit@10", "mrr"],
    )
    rows = [
        {**row, **dict(zip(("scope", "name", "average"), row["named"], strict=True)), "value": 0.9}
        for row in numbered(keys, column="blocked")
    ]
    return frame("blocking", [row | {"clean": 0.5, "prompts": 20, "seeds": 0} for row in rows])


def gains(edges=(13, 19), layers=24) -> pl.DataFrame:
    """Layer l gains l + 1 in the FFN and 1 in attention."""
    rows = []
    for component, gain in (("ffn", [layer + 1.0 for layer in range(layers)]), ("attn", [1.0] * layers)):
        base = {"step": None, "component": component}
        rows += [base | {"quantity": "layer", "layer": i, "value": value} for i, value in enumerate(gain)]
        bounds = (0, *edges, layers)
        for stage, first, end in zip(("early", "mid", "late"), bounds[:-1], bounds[1:], strict=True):
            inside = sum(gain[first:end])
            rows.append(base | {"quantity": "stage_gain", "stage": stage, "value": inside})
            rows.append(base | {"quantity": "stage_share", "stage": stage} | interval(inside / sum(gain)))
    return frame("gains", rows)


def neuron_types() -> pl.DataFrame:
    keys = crossed(
        step=[None],
        top=[100, 200, 300],
        ranking=["per_prompt", "aggregate"],
        named=[("all", None), ("relation", "name_religion")],
        kind=["routed", "shared"],
    )
    rows = [row | dict(zip(("scope", "name"), row["named"], strict=True)) for row in numbered(keys)]
    return frame("neuron_types", [row | {"chance_active": row["value"] + 0.5, "chance_all": 0.94} for row in rows])


def causality(pairs=((19, 12, 20, 59), (3, 1, 4, 2)), folds=(None,)) -> pl.DataFrame:
    quantities = [quantity for quantity, *_ in collaboration_published.CAUSALITY.values()]
    keys = crossed(
        step=[None], pair=[(None,) * 4, *pairs], fold=list(folds), quantity=quantities, gate_layer=[None, 20, 21]
    )
    rows = numbered(keys)
    for row in rows:
        row |= dict(zip(("head_layer", "head", "layer", "expert"), row["pair"], strict=True)) | {"prompts": 20}
        row |= {f"control_{end}": row[end] / 2 for end in ("value", "low", "high")}
    return frame("causality", rows)


def everything() -> Ours:
    correlations = {EXPERT_PAIR: Correlation(0.3, 0.2, 0.4, 0.01), HEAD_PAIR: (0.1, -0.1, 0.3)}
    return Ours(gains(), budgets(), blocking(), causality(), neuron_types(), correlations)


@pytest.fixture(scope="module")
def beside() -> pl.DataFrame:
    return beside_published(dict.fromkeys(REPOS, everything()), accuracies(), REPOS, FIGURES)


def beside_qwen(**ours) -> pl.DataFrame:
    return beside_published({"qwen": Ours(**ours)}, accuracies(), REPOS, FIGURES)


def row(table, series, quantity, condition, relation=None):
    found = table.filter(pl.col("relation").eq_missing(relation), series=series, quantity=quantity, condition=condition)
    assert len(found) == 1
    return found.row(0, named=True)


def value(table: pl.DataFrame, column: str = "value", **where) -> float:
    """The one value of a table where these columns hold exactly this, nulls too."""
    (found,) = table.filter(*(pl.col(name).eq_missing(pl.lit(one)) for name, one in where.items()))[column]
    return found


def test_every_number_of_the_file_stands_in_the_table_once(beside):
    with open(FILE, newline="", encoding="utf-8") as file:
        printed = [r for r in csv.DictReader(file) if r["study"] == "collaboration" and r["table"] != "1"]
    series = {MODELS[repo]: name for name, repo in REPOS.items() if repo in MODELS}
    expected = Counter(
        (
            series[r["model"]],
            r["table"],
            r["condition"],
            r["relation"] or None,
            round(float(r["value"]) / (100 if "percent" in r["unit"] else 1), 9),
        )
        for r in printed
    )
    columns = ("series", "table", "condition", "relation", "published")
    assert Counter((*found[:4], round(found[4], 9)) for found in beside.select(columns).iter_rows()) == expected
    assert set(beside["series"]) == {"qwen", "olmoe", "mixtral"}
    assert len(beside) == len(printed) > 170


def test_of_everything_measured_nothing_is_missing(beside):
    assert beside["value"].null_count() == 0
    assert not beside["note"].fill_null("").str.contains("not measured|not tested|configured").any()


#: A number of every kind, read in the paper by eye: series, our quantity, condition, relation, published.
READ = [
    ("qwen", "hit@10", "shared only", None, 0.03),
    ("qwen", "mrr", "shared + top-1", None, 0.59),
    ("qwen", "hit@10", "shared + 2nd routed", None, 0.04),
    ("qwen", "hit@10", "top-1 routed only", None, 0.0),
    ("mixtral", "mrr", "top-1", None, 0.67),
    ("mixtral", "hit@10", "top-2 (default)", None, 0.90),
    ("olmoe", "hit@10", "3 experts", None, 0.81),
    ("olmoe", "hit@10", "1 expert", None, 0.18),
    ("qwen", "ffn_stage_share", "layers 14-19", None, 0.435),
    ("qwen", "r", EXPERT_PAIR, None, 0.68),
    ("qwen", "r", HEAD_PAIR, None, 0.62),
    ("qwen", "routed_share", "top 300", None, 0.38),
    ("qwen", "mrr", "none", "country_capital_city", 0.71),
    ("qwen", "mrr", "block top-10 experts", "country_capital_city", 0.40),
    ("olmoe", "mrr", "block top-1 experts", "occupation_gender", 0.86),
    ("mixtral", "mrr", "block top-5 experts", "occupation_age", 0.49),
    ("qwen", "mrr_drop", "suppress head (19,12)", None, 0.29),
]


@pytest.mark.parametrize(("series", "quantity", "condition", "relation", "printed"), READ)
def test_numbers_read_by_eye(beside, series, quantity, condition, relation, printed):
    assert row(beside, series, quantity, condition, relation)["published"] == pytest.approx(printed)


def test_the_effects_of_the_pair_are_those_of_the_prose(beside):
    printed = {"gate_drop": 0.54, "mrr_drop": 0.29, "forced_mrr": 0.85, "gradient_share_with_rest": 0.28}
    found = beside.filter(pl.col("quantity").is_in(list(printed))).select("quantity", "published")
    assert dict(found.iter_rows()) == pytest.approx(printed)


ALL = {"step": None, "weights": "family", "scope": "all", "name": None, "average": "micro"}


@pytest.mark.parametrize(
    ("series", "condition", "mode", "size", "shared"),
    [
        ("qwen", "top-2 routed only", "top_n", 2, False),
        ("qwen", "shared only", "top_n", 0, True),
        ("qwen", "shared + 2nd routed", "only_rank", 2, True),
        ("qwen", "shared + top-4 (default)", "top_n", 4, True),
    ],
)
def test_budgets_are_those_of_the_condition(beside, series, condition, mode, size, shared):
    for metric in ("hit@10", "mrr"):
        expected = value(budgets(), **ALL, mode=mode, size=size, shared=shared, metric=metric)
        assert row(beside, series, metric, condition)["value"] == expected


@pytest.mark.parametrize("shared", [False, True])
def test_without_shared_experts_the_flag_does_not_matter(shared):
    ours = Ours(budgets=budgets((shared,)))
    table = beside_published({"mixtral": ours, "olmoe": ours}, accuracies(), REPOS, FIGURES)
    for series, condition, size in (("mixtral", "top-0", 0), ("mixtral", "top-1", 1), ("olmoe", "3 experts", 3)):
        expected = value(ours.budgets, **ALL, mode="top_n", size=size, metric="hit@10")
        found = row(table, series, "hit@10", condition)
        assert [found[end] for end in ("value", "low", "high")] == pytest.approx(
            [expected + x for x in (0, -0.01, 0.01)]
        )


def test_a_budget_without_the_shared_expert_is_not_taken_for_one_with_it():
    table = beside_qwen(budgets=budgets((True,)))
    found = row(table, "qwen", "hit@10", "top-1 routed only")
    assert (found["value"], found["note"], found["published"]) == (None, "not measured here", 0.0)


def test_blocking_is_in_sample_and_rerouted_and_its_null_is_matched_and_cross_fitted(beside):
    here = {"step": None, "semantics": "reroute", "size": 5, "scope": "relation", "metric": "mrr"}
    found = row(beside, "olmoe", "mrr", "block top-5 experts", "name_religion")
    ours = value(blocking(), "blocked", **here, name="name_religion", control="none", crossfit=False)
    null = value(blocking(), "blocked", **here, name="name_religion", control="matched", crossfit=True)
    assert (found["value"], found["null_value"]) == (ours, null)
    assert (found["low"], found["null_low"]) == (None, None)
    assert (found["null"], found["note"]) == ("matched control (cross-fitted)", "in-sample, as in the paper")


def test_blocking_without_a_control_has_no_null():
    alone = Ours(blocking=blocking().filter(pl.col("control") == "none"))
    found = row(
        beside_published({"qwen": alone}, accuracies(), REPOS, FIGURES),
        "qwen",
        "mrr",
        "block top-1 experts",
        "adj_antonym",
    )
    assert (found["value"] is not None, found["null_value"], found["null"]) == (True, None, None)
    other = Ours(blocking=blocking().filter(pl.col("crossfit")))
    found = row(
        beside_published({"qwen": other}, accuracies(), REPOS, FIGURES),
        "qwen",
        "mrr",
        "block top-1 experts",
        "adj_antonym",
    )
    assert (found["value"], found["null"], found["note"]) == (None, None, "not measured here")


def test_clean_mrr_is_that_of_the_relation_of_the_series_at_main(beside):
    for series in ("qwen", "olmoe"):
        expected = value(accuracies(), series=series, step=None, relation="word_last_letter", metric="mrr")
        found = row(beside, series, "mrr", "none", "word_last_letter")
        assert (found["value"], found["low"]) == (expected, pytest.approx(expected - 0.01))


def test_stages_of_the_paper_count_from_1(beside):
    """Layers 1-13 of 24 gain 1 + ... + 13 of 1 + ... + 24."""
    conditions = {"layers 1-13": 91, "layers 14-19": 190 - 91, "layers 20-24": 300 - 190}
    for condition, gain in conditions.items():
        assert row(beside, "qwen", "ffn_stage_share", condition)["value"] == pytest.approx(gain / 300)
    assert "0.417" in row(beside, "qwen", "ffn_stage_share", "layers 14-19")["note"]


@pytest.mark.parametrize(
    ("edges", "layers", "known"), [((12, 19), 24, ["layers 20-24"]), ((13, 20), 24, ["layers 1-13"]), ((8, 12), 16, [])]
)
def test_stages_of_other_layers_are_not_compared(edges, layers, known):
    table = beside_qwen(gains=gains(edges, layers))
    stages = table.filter(quantity="ffn_stage_share")
    assert stages.drop_nulls("value")["condition"].to_list() == known
    assert set(stages.filter(pl.col("value").is_null())["note"]) == {"the stages configured here are of other layers"}


def test_routed_share_stands_beside_that_of_active_neurons(beside):
    found = row(beside, "qwen", "routed_share", "top 100")
    here = {"step": None, "top": 100, "ranking": "per_prompt", "scope": "all", "name": None, "kind": "routed"}
    ours = value(neuron_types(), **here)
    assert (found["value"], found["null_value"], found["published"]) == (ours, pytest.approx(ours + 0.5), 0.25)
    assert found["null"] == "share among active neurons"


def test_correlations_keep_their_labels(beside):
    assert EXPERT_PAIR.startswith("as printed: E(18,10)")
    found = row(beside, "qwen", "r", EXPERT_PAIR)
    assert [found[end] for end in ("value", "low", "high", "note")] == [
        0.3,
        0.2,
        0.4,
        "between two experts, as printed",
    ]
    table = beside_qwen(correlations={HEAD_PAIR: (0.1, None, None), EXPERT_PAIR: None})
    assert (row(table, "qwen", "r", HEAD_PAIR)["value"], row(table, "qwen", "r", HEAD_PAIR)["note"]) == (0.1, None)
    assert row(table, "qwen", "r", EXPERT_PAIR)["value"] is None
    assert row(table, "qwen", "r", EXPERT_PAIR)["note"].endswith("not measured here")


def test_effects_are_those_of_the_named_pair_over_all_later_layers(beside):
    pair = {"head_layer": 19, "head": 12, "layer": 20, "expert": 59, "gate_layer": None}
    for quantity, control, _ in collaboration_published.CAUSALITY.values():
        found = beside.filter(quantity=quantity).row(0, named=True)
        ours = value(causality(), **pair, quantity=quantity)
        assert (found["value"], found["null_value"], found["null"]) == (ours, pytest.approx(ours / 2), control)


def test_a_pair_that_was_not_tested_is_asked_for():
    table = beside_qwen(causality=causality(((3, 1, 4, 2),)))
    for quantity, *_ in collaboration_published.CAUSALITY.values():
        found = table.filter(quantity=quantity).row(0, named=True)
        assert (found["value"], found["null"]) == (None, None)
        assert found["note"] == "H(19,12)-E(20,59) was not tested: name it in collaboration.pairs"


def test_a_pair_of_one_fold_says_so_and_a_named_one_goes_first():
    for folds, words in (((0,), True), ((None, 0), False)):
        ours = Ours(causality=causality(folds=folds))
        found = row(
            beside_published({"qwen": ours}, accuracies(), REPOS, FIGURES), "qwen", "mrr_drop", "suppress head (19,12)"
        )
        assert ("prompts of fold 0 only" in (found["note"] or "")) == words


def test_a_share_of_negative_attribution_is_said_to_be_one():
    table = causality().with_columns(sign=pl.when(pl.col("head") == 12).then(pl.lit("-")))
    found = beside_qwen(causality=table)
    noted = found.filter(pl.col("note").str.contains("r is negative here"))
    assert noted["quantity"].to_list() == ["gradient_share_with_rest"]
    assert not beside_qwen(causality=causality())["note"].fill_null("").str.contains("r is negative").any()


def test_a_series_without_tables_has_its_numbers_without_ours():
    empty = accuracies().clear()
    table = beside_published({"olmoe": Ours(), "mine": everything()}, empty, REPOS, FIGURES)
    assert set(table["series"]) == {"olmoe"}
    assert table["value"].null_count() == len(table)
    assert set(table["note"]) == {"not measured here"}
    assert beside_published({"mine": everything()}, accuracies(), REPOS, FIGURES).is_empty()
    assert beside_published({}, empty, {}, FIGURES).is_empty()


def test_other_checkpoints_than_main_are_not_the_published_model():
    frames = {name: table for name, table in vars(everything()).items() if name != "correlations"}
    later = {name: table.with_columns(step=pl.lit(5000, dtype=pl.Int64)) for name, table in frames.items()}
    at_step = accuracies().filter(pl.col("step") == 5000)
    table = beside_published({"qwen": Ours(**later)}, at_step, REPOS, FIGURES)
    assert table["value"].null_count() == len(table) > 0


def test_a_foreign_quantity_is_refused():
    odd = FIGURES.with_columns(quantity=pl.when(pl.col("table") == "fig6").then(pl.lit("odd")).otherwise("quantity"))
    with pytest.raises(PublishedError, match=r"figures\.csv: quantity odd is not known"):
        beside_published({"qwen": Ours()}, accuracies(), REPOS, odd)


def test_the_models_of_the_paper_are_exact_repositories():
    assert set(MODELS.values()) == set(FIGURES.filter(study="collaboration")["model"])
