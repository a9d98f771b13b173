"""What the report says of study dynamics: numbers as in the tables, what is missing, what must be warned of."""

import polars as pl
import pytest

from moescope import dynamics_report, report, tables
from tests.examples import ROOT
from tests.unit.test_report import Page, png, series

FOLDER = ROOT / "workflow" / "report"


def frame(name: str, rows: list[dict]) -> pl.DataFrame:
    """A checked table from rows that name only what is not null."""
    schema = tables.SCHEMAS[name].columns
    return tables.check(pl.DataFrame([{c: row.get(c) for c in schema} for row in rows], schema=schema), name)


def overlap(identical: bool) -> pl.DataFrame:
    pairs = [(0, 0, 1.0, True), (0, 10, 1.0 if identical else 0.2, identical), (10, 10, 1.0, True)]
    return frame(
        "overlap",
        [
            {"component": "ffn", "step_from": a, "step": b, "jaccard": j, "survival": j, "identical": same}
            for a, b, j, same in pairs
        ],
    )


def robustness(value: float | None, degenerate: bool) -> pl.DataFrame:
    row = {
        "step": 10,
        "site": "head",
        "size": "10",
        "ranking": "signed",
        "control": "none",
        "crossfit": True,
        "scope": "all",
        "average": "micro",
        "metric": "hit@10",
        "clean": 0.5,
        "ablated": 0.4,
        "value": value,
        "units": 10,
        "prompts": 20,
        "seeds": 0,
        "degenerate": degenerate,
    }
    return frame("robustness", [row])


def faithfulness() -> pl.DataFrame:
    rows = [
        {"step": step, "kind": "dense", "score": score, "neurons": 40, "value": v, "low": v - 0.1, "high": v + 0.1}
        for step, shift in ((0, -0.5), (10, 0.0))
        for score, v in (("lpi", 0.8 + shift), ("gradient", 0.7 + shift), ("magnitude", 0.3), ("random", 0.0))
    ]
    return frame("score_faithfulness", rows)


def one(name: str, steps=(0, 10), ablated=(10,), identical=False, value=0.2, degenerate=False, figures=None):
    shown = {"overlap": overlap(identical)}
    if ablated:
        shown |= {"robustness": robustness(value, degenerate), "score_faithfulness": faithfulness()}
    of_series = [f for f in dynamics_report.FIGURES if f not in dynamics_report.OVER_ALL]
    return dynamics_report.Series(
        name, steps, ablated, shown, dict.fromkeys(of_series, png(0.5)) if figures is None else figures
    )


SPARSITY = frame(
    "sparsity",
    [
        {
            "moe": "m",
            "dense": "d",
            "claim": "stability",
            "test": "N2",
            "exceeds": False,
            "pairs": 11,
            "moe_value": 0.4,
            "moe_low": 0.3,
            "moe_high": 0.5,
            "dense_value": 0.35,
            "difference_value": 0.05,
        },
        {"moe": "m", "dense": "d", "claim": "gain", "test": "N3", "pairs": 0},
    ],
)
VERDICT = frame(
    "verdict",
    [
        {"moe": "m", "dense": "d", "claim": "stability", "beyond_sparsity": False, "because": "N2 fails."},
        {"moe": "m", "dense": "d", "claim": "gain", "because": "N3 is not available."},
    ],
)
TABLE_2 = frame(
    "table_2",
    [
        {
            "series": "m",
            "component": "ffn",
            "quantity": "jaccard",
            "condition": "all",
            "checkpoints": 12,
            "value": 0.25,
            "low": 0.2,
            "high": 0.3,
            "null_value": 0.005,
            "null": "random sets",
            "published": 0.222,
        }
    ],
)


def page(series_of_study, over_all, figures) -> Page:
    study = dynamics_report.study(series_of_study, over_all, figures)
    return Page(report.build([series()], FOLDER, [study]))


@pytest.fixture(scope="module")
def whole() -> Page:
    over_all = {"sparsity": SPARSITY, "verdict": VERDICT, "table_2": TABLE_2}
    return page([one("m"), one("d")], over_all, {"sparsity": png(0.2), "comparison": png(0.3)})


def test_verdicts_and_numbers_are_those_of_the_tables(whole: Page):
    assert "m against d, stability: not beyond sparsity. N2 fails." in whole.text
    assert "m against d, gain: undecided. N3 is not available." in whole.text
    cells = ["ffn", "jaccard", "all", "0.250 [0.200, 0.300]", "0.005", "random sets", "12", "0.222", ""]
    assert cells in [row[1:] for row in whole.rows if row[0] == "m"]
    assert ["N2", "m", "d", "0.400 [0.300, 0.500]", "0.350", "0.050", "no", "11"] in [row[1:] for row in whole.rows]
    assert whole.row("gain") == ["N3", "m", "d", *[report.UNKNOWN] * 4, "0"]


def test_faithfulness_is_that_of_the_last_step(whole: Page):
    (first, *_) = [row for row in whole.rows if row[:2] == ["m", "dense"]]
    assert first[2:5] == ["10", "40", "0.800 [0.700, 0.900]"]


def test_every_figure_has_its_place_and_its_caption(whole: Page):
    described = [value for tag, name, value in whole.attributes if (tag, name) == ("img", "alt")]
    for name, heading in dynamics_report.FIGURES.items():
        expected = ["all series"] if name in dynamics_report.OVER_ALL else ["m", "d"]
        assert [text for text in described if text.startswith(f"{heading}, ")] == [f"{heading}, {e}" for e in expected]


@pytest.mark.parametrize("name", dynamics_report.FIGURES)
def test_every_caption_holds_its_caveats(name: str):
    text = " ".join((FOLDER / f"{name}.rst").read_text(encoding="utf-8").split())
    assert "**Caveats.**" in text
    assert "{{" not in text
    assert "seed" in text


def test_what_is_wrong_with_a_series_is_said():
    shown = [
        one("twins", identical=True),
        one("poor", value=None),
        one("small", degenerate=True),
        one("single", steps=(10,), figures={}),
        one("whole", ablated=(), figures={}),
    ]
    text = page(shown, {}, {}).text
    assert "twins: steps 0 and 10 have exactly the same scores (ffn)" in text
    assert "poor: HIT@10 is below 0.1 at step 10" in text
    assert "small: removing 10 heads is degenerate" in text
    assert "single has one checkpoint" in text
    assert "single: one checkpoint only, and this needs two." in text
    assert "whole: no checkpoint of it is ablated" in text
    assert text.count("Not drawn: ") == 2


def test_nothing_is_said_of_what_is_in_order(whole: Page):
    for words in ("exactly the same scores", "is below 0.1", "degenerate", "has one checkpoint", "Not drawn"):
        assert words not in whole.text
    for words in ("this needs two", "no neurons were sampled", "is ablated ("):
        assert words not in whole.text
