"""What the report says of study collaboration: numbers as in the tables, and a line for what there is not."""

import polars as pl
import pytest

from moescope import collaboration_report, report, tables
from moescope.collaboration_report import FIGURES, OF_EXPERTS, OVER_ALL, Series, study
from tests.examples import ROOT
from tests.unit.test_report import Page, png
from tests.unit.test_report import series as reported

TEMPLATE = ROOT / "workflow" / "report" / "report.html.j2"
OF_SERIES = [name for name in FIGURES if name not in OVER_ALL]


def frame(name: str, rows: list[dict]) -> pl.DataFrame:
    """A checked table from rows that name only what is not null."""
    schema = tables.SCHEMAS[name].columns
    return tables.check(pl.DataFrame([{c: row.get(c) for c in schema} for row in rows], schema=schema), name)


def interval(value: float, prefix: str = "", reach: float = 0.05) -> dict:
    return {f"{prefix}value": value, f"{prefix}low": value - reach, f"{prefix}high": value + reach}


def shown(value: float, reach: float = 0.05) -> str:
    return f"{value:.3f} [{value - reach:.3f}, {value + reach:.3f}]"


def efficiency() -> pl.DataFrame:
    rows = [
        {"series": series, "step": step, "quantity": quantity} | interval(start + shift)
        for series, shift in (("m", 0.0), ("n", 0.1), ("d", 0.2))
        for step, start in ((None, 0.3), (700, 0.6))
        for quantity in ("ffn_gain", "mrr")
    ]
    published = {"published": 0.63, "note": "so it is"}
    return frame(
        "efficiency",
        [
            row | (published if (row["series"], row["step"], row["quantity"]) == ("m", None, "mrr") else {})
            for row in rows
        ],
    )


def budgets() -> pl.DataFrame:
    base = {"step": None, "scope": "all", "average": "micro", "weights": "family", "shared": True, "prompts": 20}
    rows = [
        base | {"mode": mode, "size": size, "metric": metric} | interval(value) | interval(value / 2, "drop_")
        for mode, size, start in (("top_n", 0, 0.1), ("top_n", 1, 0.2), ("only_rank", 2, 0.3))
        for metric, value in (("hit@10", start), ("mrr", start + 0.05), ("log_prob", -start))
    ]
    odd = [rows[0] | {"weights": "keep"}, rows[0] | {"average": "macro"}, rows[0] | {"step": 700, "size": 4}]
    return frame("budgets", [*rows, rows[3] | {"shared": False} | interval(0.01), *odd])


def blocking() -> pl.DataFrame:
    rows = []
    for average, shift in (("micro", 0.0), ("macro", 0.1)):
        base = {"step": None, "semantics": "reroute", "size": 5, "scope": "all", "average": average, "metric": "mrr"}
        base |= {"clean": 0.5 + shift, "blocked": 0.4, "prompts": 20, "seeds": 0}
        for control, crossfit, value in (
            ("none", True, 0.4),
            ("none", False, 0.45),
            ("matched", True, 0.2),
            ("matched", False, 0.22),
            ("random", False, 0.1),
        ):
            beyond = interval(0.4 - value, "excess_", 0.01) if control != "none" else {}
            rows.append(base | {"control": control, "crossfit": crossfit} | interval(value + shift) | beyond)
    other = rows[0] | {"metric": "hit@10", "value": 0.99}
    relation = rows[0] | {"scope": "relation", "name": "capital", "value": 0.98}
    return frame("blocking", [*rows, other, relation, rows[0] | {"semantics": "zero_weight"}])


def importance() -> pl.DataFrame:
    rows = [
        {
            "relation": relation,
            "method": method,
            "fold": fold,
            "rank": rank,
            "layer": 2,
            "expert": first + rank,
            "importance": 9.0,
        }
        for relation, base in (("capital", 0), ("language", 20))
        for method, more in (("top_neuron_frequency", 0), ("mean_weight", 40))
        for fold, fitted in ((None, 0), (0, 80))
        for rank in range(1, 11)
        for first in (base + more + fitted,)
    ]
    return frame("expert_importance", rows)


def overlap() -> pl.DataFrame:
    base = {"step": None, "relation": "capital", "method": "top_neuron_frequency", "size": 5, "other_size": 5}
    chances = {"chance": 0.0174, "chance_given_layers": 0.4, "p": 0.001}
    found = base | chances | {"other": "published", "common": 3}
    return frame(
        "expert_overlap", [found, found | {"other": "mean_weight", "common": 4}, found | {"method": "mean_weight"}]
    )


def associations(folds=(None, 0, 1)) -> pl.DataFrame:
    base = {
        "layer": 20,
        "head_layer": 19,
        "p": 0.01,
        "null_median": 0.2,
        "null_95": 0.3,
        "pairs": 288_000,
        "prompts": 453,
    }
    rows = []
    for fold in folds:
        for head in range(12):
            r = (-1) ** head * (0.9 - 0.05 * head - 0.01 * (fold or 0))
            tested = {} if fold is None else {"r_tested": abs(r) / 2, "p_tested": 0.04 if head % 4 < 2 else 0.2}
            rows.append(base | {"fold": fold, "head": head, "expert": 59, "r": r} | tested)
    rows.append(base | {"relation": "capital", "head": 31, "expert": 7, "r": 0.99})
    return frame("associations", rows)


def causality() -> pl.DataFrame:
    pair = {"head_layer": 19, "head": 12, "layer": 20, "expert": 59}
    base = {"step": None, "quantity": "gate_drop", "prompts": 20}
    rows = [
        base | interval(0.5) | interval(0.2, "control_") | interval(0.3, "excess_"),
        base | {"sign": "-"} | interval(0.5) | interval(0.2, "control_") | interval(0.3, "excess_"),
        base | pair | {"fold": 1} | interval(0.6) | interval(0.2, "control_") | interval(0.4, "excess_"),
        base | pair | {"fold": 1, "gate_layer": 21} | interval(0.7),
        base | pair | {"fold": 1, "quantity": "recovery", "value": None},
    ]
    return frame("causality", [row | {"sign": "-"} if "head" in row else row for row in rows])


def shared_neurons() -> pl.DataFrame:
    rows = [
        {
            "step": None,
            "relation": "capital",
            "within": within,
            "rank": rank,
            "layer": 20,
            "neuron": 10 * rank,
            "importance": 1 / rank,
        }
        for within in ("all", "first_I")
        for rank in range(1, 8)
    ]
    return frame("shared_neurons", rows)


def beside() -> pl.DataFrame:
    row = {"series": "m", "table": "8", "quantity": "mrr", "condition": "block top-5 experts", "relation": "capital"}
    row |= interval(0.68) | {
        "null_value": 0.7,
        "null": "matched control (cross-fitted)",
        "published": 0.61,
        "note": "in-sample",
    }
    lacking = {
        "series": "m",
        "table": "2",
        "quantity": "mrr",
        "condition": "shared only",
        "published": 0.01,
        "note": "not measured",
    }
    return frame("beside_published", [row, lacking])


TABLES = {
    "budgets": budgets(),
    "blocking": blocking(),
    "expert_importance": importance(),
    "expert_overlap": overlap(),
    "associations": associations(),
    "causality": causality(),
    "shared_neurons": shared_neurons(),
}
PICTURES = dict.fromkeys(OF_SERIES, png(0.5))
MOE = Series("m", False, True, None, TABLES, PICTURES, ["no integrated gradients: its attention has no heads."])
PLAIN = Series("n", False, False, None, {}, {k: v for k, v in PICTURES.items() if not k.startswith("neuron")})
DENSE = Series("d", True, False, 700, {}, {})
OVER = {"efficiency": efficiency(), "beside_published": beside()}


@pytest.fixture(scope="module")
def whole() -> report.Study:
    return study([MOE, PLAIN, DENSE], OVER, dict.fromkeys(OVER_ALL, png(0.2)))


def rows_of(section: report.Study, heading: str) -> list[list[str]]:
    (table,) = [table for table in section.tables if table.heading.startswith(heading)]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    return [list(row) for row in table.rows]


def test_figures_over_all_series_come_first_and_each_series_has_its_own(whole):
    assert [figure.name for figure in whole.figures] == list(FIGURES)
    assert [figure.name for figure in whole.figures[:3]] == list(OVER_ALL)
    for figure in whole.figures[:3]:
        assert (list(figure.images), figure.missing) == (["all series"], [])
    assert [list(figure.images) for figure in whole.figures[3:]] == [["m", "n"]] * 5 + [["m"]] * 2


def test_what_a_series_cannot_have_is_said(whole):
    missing = {figure.name: figure.missing for figure in whole.figures}
    assert missing["blocking"] == ["d: no experts, so there is nothing to block."]
    assert missing["causality"] == ["d: no experts, so there is nothing to route."]
    for name in ("neuron_types", "neuron_overlap"):
        assert missing[name] == ["n: has no shared expert.", "d: no experts, so there is nothing to tell apart."]
    assert set(OF_EXPERTS) == set(OF_SERIES)
    bare = study([Series("m", False, True, None, {}, {})], {}, {})
    assert all(figure.missing == ["Not drawn."] for figure in bare.figures[:3])
    assert all(figure.missing == ["m: not measured here."] for figure in bare.figures[3:])
    assert (bare.tables, len(bare.notes)) == ([], len(collaboration_report.CAVEATS))


def test_the_notes_hold_the_caveats_and_what_was_left_out(whole):
    said = " ".join(whole.notes)
    for words in (
        "one training run of each model",
        "complementary by accounting",
        "cross-fitted",
        "is no cause",
        "at all positions, while integrated gradients are taken at the last",
        "tiny models: their efficiency says nothing about architectures",
    ):
        assert words in said
    assert whole.notes[-1] == "m: no integrated gradients: its attention has no heads."


def test_efficiency_stands_by_series_at_its_own_step(whole):
    (table,) = [table for table in whole.tables if table.heading == "Efficiency"]
    assert list(table.columns) == ["quantity", "m", "n", "d"]
    assert [row[0] for row in table.rows] == ["MRR", "FFN gain (nats)"]
    assert list(table.rows[0][1:]) == [shown(0.3), shown(0.4), shown(0.8)]
    assert rows_of(whole, "Efficiency beside") == [["m", "MRR", shown(0.3), "0.630", "so it is"]]


def test_budgets_are_those_of_the_family_over_all_prompts(whole):
    rows = rows_of(whole, "Routing budgets")
    one = ["m", "the n heaviest", "yes", "1", shown(0.2), shown(0.1), shown(0.25), shown(0.125)]
    assert one in rows
    assert [row[1:4] for row in rows] == [
        ["the n heaviest", "yes", "0"],
        ["the n heaviest", "yes", "1"],
        ["the n heaviest", "no", "1"],
        ["the n-th alone", "yes", "2"],
    ]
    assert rows[2][6] == report.UNKNOWN
    assert rows[2][4] == shown(0.01)
    plain = study([Series("n", False, False, None, {"budgets": budgets()}, {})], {}, {})
    assert {row[2] for row in rows_of(plain, "Routing budgets")} == {report.UNKNOWN}


def test_blocking_holds_the_cross_fitted_loss_against_its_controls(whole):
    rows = rows_of(whole, "Blocking")
    assert [row[1:4] for row in rows] == [
        ["reroute", "macro", "5"],
        ["reroute", "micro", "5"],
        ["zero_weight", "micro", "5"],
    ]
    losses = [shown(0.4), shown(0.2), shown(0.1), shown(0.2, 0.01), shown(0.45)]
    assert rows[1] == ["m", "reroute", "micro", "5", "0.500", *losses, "20"]
    assert rows[0][4:6] == ["0.600", shown(0.5)]
    assert rows[2][5:10] == [shown(0.4), *[report.UNKNOWN] * 4]


def test_leading_experts_are_the_first_five_of_the_default_on_all_prompts(whole):
    capital, language = rows_of(whole, "Leading experts")
    assert capital[:3] == ["m", "capital", "E(2,1), E(2,2), E(2,3), E(2,4), E(2,5)"]
    assert capital[3:] == ["3 of 5", "0.017", "0.400", "0.001"]
    assert language[2:] == ["E(2,21), E(2,22), E(2,23), E(2,24), E(2,25)", *[report.UNKNOWN] * 4]


def test_associations_are_the_strongest_that_were_tested(whole):
    rows = rows_of(whole, "Strongest associations")
    assert len(rows) == collaboration_report.PAIRS
    # heads 0 to 4 of both folds; r of head 1 and 3 is negative where it was found, positive where it was tested
    assert [row[1] for row in rows] == [f"H(19,{head})" for head in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)]
    assert rows[0][3:] == ["0.900", "0.010", "0.300", "0.450", "0.040", "yes", "288,000", "453"]
    assert [row[8] for row in rows] == ["yes"] * 2 + ["no"] * 6 + ["yes"] * 2
    untested = study([Series("m", False, True, None, {"associations": associations((None,))}, {})], {}, {})
    rows = rows_of(untested, "Strongest associations")
    assert (len(rows), {row[8] for row in rows}) == (collaboration_report.PAIRS, {report.UNKNOWN})
    assert "H(19,31)" not in {row[1] for row in rows}


def test_causality_is_pooled_first_then_by_pair(whole):
    assert rows_of(whole, "Do heads steer") == [
        ["m", "all pairs", "", "gate_drop", shown(0.5), shown(0.2), shown(0.3), "20"],
        ["m", "H(19,12)", "E(20,59) (-)", "gate_drop", shown(0.6), shown(0.2), shown(0.4), "20"],
        ["m", "H(19,12)", "E(20,59) (-)", "recovery", *[report.UNKNOWN] * 3, "20"],
    ]


def test_pairs_of_either_sign_stand_apart_where_both_occur():
    pooled = {"step": None, "quantity": "expert_gate_drop", "prompts": 20}
    values = {None: 0.5, "+": 0.6, "-": -0.4}
    table = frame("causality", [pooled | {"sign": sign} | interval(value) for sign, value in values.items()])
    shown_rows = rows_of(study([Series("m", False, True, None, {"causality": table}, {})], {}, {}), "Do heads steer")
    assert [row[1:5] for row in shown_rows] == [
        ["all pairs", "", "expert_gate_drop", shown(0.5)],
        ["pairs with r > 0", "", "expert_gate_drop", shown(0.6)],
        ["pairs with r < 0", "", "expert_gate_drop", shown(-0.4)],
    ]


def test_shared_neurons_and_published_numbers(whole):
    rows = rows_of(whole, "Leading neurons")
    assert rows[0] == ["m", "all", "capital", "N(20,10), N(20,20), N(20,30), N(20,40), N(20,50)"]
    assert [row[1] for row in rows] == ["all", "first_I"]
    lacking, found = rows_of(whole, "Ours beside")
    assert found[:7] == ["m", "8", "mrr", "capital", "block top-5 experts", shown(0.68), "0.610"]
    assert found[7:] == ["0.700", "matched control (cross-fitted)", "in-sample"]
    assert lacking[3:] == ["", "shared only", report.UNKNOWN, "0.010", report.UNKNOWN, report.UNKNOWN, "not measured"]


def test_tables_at_another_step_are_not_shown():
    late = Series("m", False, True, 700, TABLES, {})
    headings = [table.heading for table in study([late], {}, {}).tables]
    assert [heading.split(" (")[0] for heading in headings] == [
        "Routing budgets",
        "Leading experts by relation",
        "Strongest associations of heads and experts",
    ]


def test_the_study_stands_on_the_page(whole, tmp_path):
    (tmp_path / "report.html.j2").write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    for name in (*report.FIGURES, *FIGURES):
        (tmp_path / f"{name}.rst").write_text(f"The caption of {name}.\n", encoding="utf-8")
    page = Page(report.build([reported()], tmp_path, [whole]))
    described = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert f"{FIGURES['blocking']}, m" in described
    assert f"{FIGURES['gain_curves']}, all series" in described
    assert "d: no experts, so there is nothing to block." in page.text
    assert ["m", "capital", "E(2,1), E(2,2), E(2,3), E(2,4), E(2,5)", "3 of 5", "0.017", "0.400", "0.001"] in page.rows
