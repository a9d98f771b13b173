"""The paper's tables: its numbers as the CSV file has them, ours from hand-made series, each beside its null."""

import csv
import itertools

import numpy as np
import polars as pl
import pytest
from scipy.stats import t as student

from moescope import published, tables
from moescope.published import MODELS, PublishedError, table_2, table_3, table_4
from tests.examples import ROOT

FILE = ROOT / "resources" / "published" / "figures.csv"
FIGURES = published.read(FILE)
WINDOWS = [(10_000, 70_000), (100_000, 600_000), (70_000, 600_000), (10_000, 600_000), (10_000, 1_200_000)]
PAPER = [*range(10_000, 80_000, 10_000), *range(100_000, 1_300_000, 100_000)]
REPOS = {"moe": "allenai/OLMoE-1B-7B-0924", "dense": "allenai/OLMo-7B-hf", "mine": None, "other": "someone/OLMo-7B"}

#: The paper's tables as printed: table, model, component, our quantity, our condition -> the number, as a share.
PRINTED = {
    ("2", "OLMo-7B", "ffn", "jaccard", "10000-70000"): 0.063,
    ("2", "OLMo-7B", "ffn", "jaccard", "100000-600000"): 0.061,
    ("2", "OLMo-7B", "ffn", "gain_share", "all"): 0.264,
    ("2", "OLMoE-1B-7B", "ffn", "jaccard", "10000-70000"): 0.222,
    ("2", "OLMoE-1B-7B", "ffn", "jaccard", "100000-600000"): 0.253,
    ("2", "OLMoE-1B-7B", "ffn", "gain_share", "all"): 0.489,
    ("3", "OLMo-7B", "ffn", "consistency", "10000-600000"): 0.54,
    ("3", "OLMo-7B", "ffn", "cv", "10000-600000"): 5.01,
    ("3", "OLMo-7B", "attn", "consistency", "10000-600000"): 0.49,
    ("3", "OLMo-7B", "attn", "cv", "10000-600000"): 8.64,
    ("3", "OLMoE-1B-7B", "ffn", "consistency", "10000-600000"): 0.97,
    ("3", "OLMoE-1B-7B", "ffn", "cv", "10000-600000"): 0.37,
    ("3", "OLMoE-1B-7B", "attn", "consistency", "10000-600000"): 0.97,
    ("3", "OLMoE-1B-7B", "attn", "cv", "10000-600000"): 0.49,
    ("3", "OLMoE-1B-7B", "ffn", "consistency", "10000-1200000"): 0.97,
    ("3", "OLMoE-1B-7B", "ffn", "cv", "10000-1200000"): 0.47,
    ("3", "OLMoE-1B-7B", "attn", "consistency", "10000-1200000"): 0.95,
    ("3", "OLMoE-1B-7B", "attn", "cv", "10000-1200000"): 0.76,
    ("4", "OLMoE-1B-7B", "attn", "top_1_head", "micro, in-sample"): 0.0006,
    ("4", "OLMoE-1B-7B", "attn", "top_10_heads", "micro, in-sample"): 0.0944,
    ("4", "OLMoE-1B-7B", "ffn", "top_1pct_neurons", "micro, in-sample"): 0.3547,
    ("4", "OLMo-7B", "attn", "top_1_head", "micro, in-sample"): 0.1646,
    ("4", "OLMo-7B", "attn", "top_10_heads", "micro, in-sample"): 0.5043,
    ("4", "OLMo-7B", "ffn", "top_1pct_neurons", "micro, in-sample"): 0.9619,
}


def test_the_file_holds_the_printed_tables_and_nothing_else():
    with open(FILE, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["study"] == "dynamics" and row["table"] in "234"]
    shares = [round(float(row["value"]) / (100 if row["unit"] == "percent" else 1), 9) for row in rows]
    in_file = sorted(
        (*(row[k] for k in ("table", "model", "component")), x) for row, x in zip(rows, shares, strict=True)
    )
    assert in_file == sorted((*key[:3], value) for key, value in PRINTED.items())


@pytest.mark.parametrize(("key", "value"), PRINTED.items(), ids=lambda x: "-".join(x) if isinstance(x, tuple) else None)
def test_every_number_is_found_for_its_model_alone(key, value):
    table, model, component, quantity, condition = key
    assert published.published(FIGURES, model, int(table), component, quantity, condition) == pytest.approx(value)
    for other in (None, "Mixtral-8x7B", "olmo-7b"):
        assert published.published(FIGURES, other, int(table), component, quantity, condition) is None
    for others in itertools.product("234", ("OLMo-7B", "OLMoE-1B-7B"), ("attn", "ffn")):
        found = published.published(FIGURES, others[1], int(others[0]), others[2], quantity, condition)
        expected = PRINTED.get((*others, quantity, condition))
        assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("quantity", "condition"),
    [("jaccard", "all"), ("jaccard", "10000-600000"), ("gain_share", "10000-70000"), ("cv_abs", "10000-600000")],
)
def test_what_the_paper_does_not_print_is_null(quantity, condition):
    for table in (2, 3, 4):
        assert published.published(FIGURES, "OLMoE-1B-7B", table, "ffn", quantity, condition) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "restore the file"), ("a,b\n1,2\n", "columns must be study"), ("{},\n", "columns must be")],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = tmp_path / "figures.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(PublishedError, match=message):
        published.read(path)
    path.write_text(",".join(published.COLUMNS) + "\ndynamics,2,m,ffn,,all steps,q,many,percent\n", encoding="utf-8")
    with pytest.raises(PublishedError, match=r"figures\.csv"):
        published.read(path)


# Ours beside them ----------------------------------------------------------------------------------------------------


def neuron_dynamics(steps, seed=0, expert=True, groups=True, metrics=("jaccard", *published.READINGS)):
    """One series: a pair's value is 0.1 + 0.02 x its number, with replicates; N1 expects half of it for J."""
    random, rows = np.random.default_rng(seed), []
    for component in ("attn", "ffn"):
        for i, (before, step) in enumerate(itertools.pairwise(steps)):
            base = {"component": component, "population": "all", "average": "micro", "step_from": before, "step": step}
            value = 0.1 + 0.02 * i
            nulls = {"low": 0.4 * value, "value": 0.5 * value, "high": 0.7 * value}  # a low end that is cut off
            for metric in metrics:
                without = {f"without_{g}": value + random.normal() / 50 if groups else None for g in range(10)}
                rows.append({**base, "metric": metric, "value": value, "low": 0.0, "high": 1.0, **without})
            rows.append({**base, "metric": "jaccard_given_layer", **nulls, "value": 0.45 * value})
            if expert:
                rows.append({**base, "metric": "jaccard_given_expert", **nulls})
            # what must not be taken for it
            rows.append({**base, "metric": "jaccard", "average": "macro", "value": 0.9})
            rows.append({**base, "metric": "jaccard", "population": "matched", "value": 0.8})
    columns = tables.SCHEMAS["neuron_dynamics"].columns
    frame = pl.DataFrame(rows, schema=dict(columns), orient="row", strict=False, infer_schema_length=None)
    return tables.check(frame, "neuron_dynamics")


def row(table, series, component, quantity, condition):
    found = table.filter(series=series, component=component, quantity=quantity, condition=condition)
    assert len(found) == 1
    return found.row(0, named=True)


def test_means_over_pairs_and_their_windows():
    """The paper's steps: 18 pairs of OLMoE, six in 10K-70K, five in 100K-600K, six with the pair from 70K."""
    table = table_2({"moe": neuron_dynamics(PAPER)}, WINDOWS, REPOS, FIGURES)
    pairs = list(itertools.pairwise(PAPER))
    for (first, last), count in zip(WINDOWS, (6, 5, 6, 12, 18), strict=True):
        inside = [0.1 + 0.02 * i for i, (a, b) in enumerate(pairs) if first <= a and b <= last]
        assert len(inside) == count
        for quantity in ("jaccard", *published.READINGS):
            found = row(table, "moe", "ffn", quantity, f"{first}-{last}")
            assert (found["value"], found["checkpoints"]) == (pytest.approx(np.mean(inside)), count + 1)
    assert row(table, "moe", "ffn", "jaccard", "all")["checkpoints"] == 19


def test_the_interval_is_the_jackknife_of_the_mean():
    frame = neuron_dynamics(PAPER[:7])
    found = row(table_2({"moe": frame}, WINDOWS, REPOS, FIGURES), "moe", "ffn", "jaccard", "10000-70000")
    mine = frame.filter(component="ffn", metric="jaccard", population="all", average="micro")
    replicates = np.array([mine[f"without_{g}"].mean() for g in range(10)])
    error = np.sqrt(9 / 10 * ((replicates - replicates.mean()) ** 2).sum())
    reach = student.ppf(0.975, 9) * error
    assert [found["low"], found["high"]] == pytest.approx([found["value"] - reach, found["value"] + reach])
    bare = table_2({"moe": neuron_dynamics(PAPER, groups=False)}, WINDOWS, REPOS, FIGURES)
    assert bare["value"].is_not_null().all()
    assert bare["low"].is_null().all()


def test_nulls_of_stability_and_concentration():
    table = table_2(
        {"moe": neuron_dynamics(PAPER), "dense": neuron_dynamics(PAPER, expert=False)}, WINDOWS, REPOS, FIGURES
    )
    found = row(table, "moe", "ffn", "jaccard", "10000-70000")
    values = 0.1 + 0.02 * np.arange(6)
    assert found["null"] == "N1: given layer and expert"
    assert row(table, "moe", "attn", "jaccard", "all")["null"] == "N1: given layer and head"
    assert found["null_value"] == pytest.approx(0.5 * values.mean())
    # ends of a mean of six independent overlaps, not the mean of their ends; by the high ends: low ones are cut off
    reach = np.sqrt((0.04 * values**2).sum()) / 6
    assert [found["null_low"], found["null_high"]] == pytest.approx([found["null_value"] + x for x in (-reach, reach)])
    dense = row(table, "dense", "ffn", "jaccard", "10000-70000")
    assert (dense["null"], dense["null_value"]) == ("N1: given layer", pytest.approx(0.45 * values.mean()))
    gain = row(table, "moe", "ffn", "gain_share", "all")
    assert (gain["null"], gain["null_value"], gain["null_low"]) == ("uniform gains", 0.01, None)
    plain = neuron_dynamics(PAPER).filter(pl.col("metric").str.contains("given").not_())
    found = row(table_2({"mine": plain}, (), REPOS, FIGURES), "mine", "attn", "jaccard", "all")
    assert found["null"] == "random sets of 1%"
    assert found["null_value"] == pytest.approx(0.00503, abs=1e-5)


def test_the_null_of_stability_stays_within_0_and_1():
    for value, high, ends in ((0.02, 0.1, (0, 0.1)), (0.9, 0.95, (0.85, 0.95)), (0.7, 1.2, (0.2, 1))):
        frame = neuron_dynamics([10, 20]).with_columns(
            pl.when(pl.col("metric") == "jaccard_given_expert").then(new).otherwise(name).alias(name)
            for name, new in (("value", value), ("low", 0.0), ("high", high))
        )
        found = row(table_2({"mine": frame}, (), REPOS, FIGURES), "mine", "ffn", "jaccard", "all")
        assert [found["null_low"], found["null_high"]] == pytest.approx(ends)


def test_published_numbers_stand_beside_the_published_models_alone():
    frames = {name: neuron_dynamics(PAPER if name == "moe" else PAPER[:13]) for name in REPOS}
    table = table_2(frames, WINDOWS, REPOS, FIGURES)
    beside = table.filter(pl.col("published").is_not_null())
    found = {tuple(one[:4]): one[4] for one in beside.select(*tables.SCHEMAS["table_2"].key, "published").iter_rows()}
    assert found == {
        (series, "ffn", quantity, condition): pytest.approx(value)
        for series, model in (("moe", "OLMoE-1B-7B"), ("dense", "OLMo-7B"))
        for (number, whose, _, quantity, window), value in PRINTED.items()
        if number == "2" and whose == model
        for condition in ([window, "70000-600000"] if window == "100000-600000" else [window])
    }
    notes = beside.filter(pl.col("note").is_not_null())
    assert set(notes["condition"]) == {"70000-600000"}
    assert notes["note"].str.contains("the pair from 70K to 100K").all()


def test_a_mean_over_other_checkpoints_is_noted():
    table = table_2({"moe": neuron_dynamics(PAPER[::2])}, WINDOWS, REPOS, FIGURES)
    assert row(table, "moe", "ffn", "jaccard", "10000-70000")["note"] == "over 4 checkpoints, the paper's over 7"
    assert row(table, "moe", "ffn", "gain_share", "all")["note"] == "over 10 checkpoints, the paper's over 19"
    assert row(table, "moe", "attn", "jaccard", "10000-70000")["note"] is None


def test_pairs_without_a_value_are_left_out_and_counted():
    frame = neuron_dynamics([0, 10, 20, 30]).with_columns(
        value=pl.when((pl.col("metric") == "gain_share") & (pl.col("step") < 20)).then(None).otherwise("value")
    )
    found = row(table_2({"mine": frame}, (), REPOS, FIGURES), "mine", "ffn", "gain_share", "all")
    assert (found["value"], found["checkpoints"]) == (pytest.approx(0.13), 3)
    assert found["note"] == "no value in 1 of 3 pairs"
    nothing = frame.with_columns(value=pl.lit(None, dtype=pl.Float64))
    found = row(table_2({"mine": nothing}, (), REPOS, FIGURES), "mine", "ffn", "jaccard", "all")
    assert (found["value"], found["low"], found["checkpoints"]) == (None, None, 0)
    assert table_2({"mine": frame.filter(pl.col("step_from").is_null())}, (), REPOS, FIGURES).is_empty()


def test_table_3():
    rows = [
        (component, metric, window, None if metric == "cv_abs" else 0.5, 0.4, 0.6, count)
        for component in ("attn", "ffn")
        for metric in ("consistency", "consistency_spearman", "cv", "cv_abs", "consolidation_0.95")
        for window, count in (("all", 19), ("10000-600000", 13), ("10000-1200000", 19))
    ]
    frame = tables.check(
        pl.DataFrame(rows, schema=dict(tables.SCHEMAS["layer_dynamics"].columns), orient="row"), "layer_dynamics"
    )
    table = table_3({"moe": frame, "mine": frame}, REPOS, FIGURES)
    assert set(table["quantity"]) == {"consistency", "consistency_spearman", "cv", "cv_abs"}
    assert table["null"].is_null().all()
    for (number, model, *key), value in PRINTED.items():
        if number == "3" and model == "OLMoE-1B-7B":
            found = row(table, "moe", *key)
            assert found["published"] == pytest.approx(value)
            assert (found["value"], found["low"], found["high"], found["note"]) == (0.5, 0.4, 0.6, None)
    assert table["published"].is_not_null().sum() == 8
    assert row(table, "mine", "ffn", "cv_abs", "all")["note"].startswith("no value")


def summary(rankings=("signed",), unavailable=0, matched=4):
    """``robustness_summary`` with a different number in every row: 0.01 x its place; 4 checkpoints, or ``matched``."""
    entries = [
        (site, size, ranking, control, crossfit)
        for site, sizes in (("head", ("1", "10", "1%")), ("ffn_neuron", ("0.1%", "1%")))
        for size in sizes
        for ranking in rankings
        for control, crossfit in (("none", True), ("none", False), ("matched", True), ("random", False))
        if control != "random" or ranking == "signed"
    ]
    rows = []
    for entry in entries:
        key = (*entry[:2], None if entry[3] == "random" else entry[2], *entry[3:])
        for scope, name, average, metric, statistic in (
            ("all", None, "micro", "hit@10", "mean"), ("all", None, "macro", "hit@10", "mean"),
            ("all", None, "micro", "hit@10", "slope"), ("all", None, "micro", "mrr", "mean"),
            ("relation", "r", "micro", "hit@10", "mean"),
        ):  # fmt: skip
            value = 0.01 * len(rows)
            number = matched if entry[3] == "matched" else 4
            tail = (None, number, unavailable + 4 - number, entry[:2] == ("head", "10"))
            rows.append((*key, scope, name, average, metric, statistic, value, value - 0.1, value + 0.1, *tail))
    schema = dict(tables.SCHEMAS["robustness_summary"].columns)
    return tables.check(pl.DataFrame(rows, schema=schema, orient="row"), "robustness_summary")


def test_table_4_holds_each_drop_against_its_controls():
    frame = summary()
    table = table_4({"other": frame, "mine": frame}, REPOS, FIGURES)
    # four interventions, two averages; cross-fitted against random and matched, in-sample against random
    assert len(table) == 2 * 4 * 2 * 3
    mean = frame.filter(scope="all", metric="hit@10", statistic="mean", site="ffn_neuron", size="1%", average="micro")
    value = {(one["control"], one["crossfit"]): one["value"] for one in mean.iter_rows(named=True)}
    expected = {
        "micro, cross-fitted": (value["none", True], value["random", False], "random sets", None),
        "micro, cross-fitted, matched control": (value["none", True], value["matched", True], "matched sets", None),
        "micro, in-sample": (value["none", False], value["random", False], "random sets", "in-sample, as in the paper"),
    }
    for condition, (ours, null, text, note) in expected.items():
        found = row(table, "mine", "ffn", "top_1pct_neurons", condition)
        assert (found["value"], found["null_value"], found["null"]) == (pytest.approx(ours), pytest.approx(null), text)
        assert [found["low"], found["null_high"]] == pytest.approx([ours - 0.1, null + 0.1])
        assert (found["note"], found["checkpoints"]) == (note, 4)


def test_table_4_stands_beside_what_the_paper_did():
    table = table_4({"moe": summary(("signed", "abs")), "dense": summary(), "mine": summary()}, REPOS, FIGURES)
    beside = table.filter(pl.col("published").is_not_null())
    assert set(beside["condition"]) == {"micro, in-sample", "macro, in-sample"}
    for (number, model, *key), value in PRINTED.items():
        if number == "4":
            assert row(table, "moe" if model == "OLMoE-1B-7B" else "dense", *key)["published"] == pytest.approx(value)
    assert len(beside) == 2 * 3 * 2
    # our mean is over other checkpoints than the paper's
    for series, number in (("moe", 19), ("dense", 13)):
        note = row(table, series, "ffn", "top_1pct_neurons", "macro, in-sample")["note"]
        assert note == f"in-sample, as in the paper; over 4 checkpoints, the paper's over {number}"
    alone = table.filter(pl.col("published").is_null())["note"].drop_nulls()
    assert not alone.str.contains("the paper's over").any()
    whole = summary().with_columns(checkpoints=19)
    note = row(table_4({"moe": whole}, REPOS, FIGURES), "moe", "attn", "top_1_head", "micro, in-sample")["note"]
    assert note == "in-sample, as in the paper"
    assert row(table, "moe", "ffn", "top_1pct_neurons", "micro, in-sample, by abs")["null"] == "random sets"


def test_table_4_says_what_is_degenerate_or_missing():
    table = table_4({"mine": summary(unavailable=2)}, REPOS, FIGURES)
    note = row(table, "mine", "attn", "top_10_heads", "micro, in-sample")["note"]
    assert note.split("; ") == [
        "in-sample, as in the paper",
        "more than 10% of all heads, or as many as a smaller size",
        "no value at 2 of 6 checkpoints: clean HIT@10 below 0.1",
    ]
    alone = summary().filter(pl.col("control") == "none")
    assert table_4({"mine": alone}, REPOS, FIGURES)["null"].is_null().all()


def test_a_control_at_other_checkpoints_is_no_null():
    table = table_4({"mine": summary(matched=1)}, REPOS, FIGURES)
    found = row(table, "mine", "ffn", "top_1pct_neurons", "micro, cross-fitted, matched control")
    assert [found[name] for name in ("null_value", "null_low", "null_high", "null")] == [None] * 4
    assert (found["note"], found["checkpoints"]) == ("matched control at 1 of 4 checkpoints only", 4)
    assert found["value"] is not None
    beside_random = row(table, "mine", "ffn", "top_1pct_neurons", "micro, cross-fitted")
    assert (beside_random["null"], beside_random["note"]) == ("random sets", None)


def test_the_models_of_the_paper_are_exact_repositories():
    assert set(MODELS.values()) == {key[1] for key in PRINTED}
    assert table_3({}, {}, FIGURES).is_empty()
