"""The figures of ablation and of faithfulness: they show their tables, say what is missing, and nothing collides."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
import pytest

from moescope import ablation_plots, drawing
from tests.reading import (
    assert_curve,
    assert_presentable,
    bands,
    bars,
    lines,
    panel,
    panels,
    said,
    segments,
)
from tests.unit.dynamics_tables import (
    LONG,
    STEPS,
    assert_axis_is_checked,
    assert_caption_warns,
    drawn_once,
    faithfulness_table,
    robustness_table,
    scores_table,
    some,
)


def robustness(steps, name="tiny-olmoe", axis="log", **options):
    return ablation_plots.robustness(robustness_table(some(steps), **options), name, axis)


def dose_response(steps, name="tiny-olmoe", **options):
    return ablation_plots.dose_response(robustness_table(some(steps), **options), name)


def faithfulness(steps, name="tiny-olmoe", axis="log", kinds=("routed",), **options):
    scores = scores_table(some(steps), kinds, **options)
    return ablation_plots.faithfulness(faithfulness_table(kinds), scores, name, axis)


FIGURES = {
    "robustness": (robustness, 12, {"unavailable": (0,)}),
    "robustness, large": (robustness, 16, {"tiny": False, "name": LONG, "axis": "step"}),
    "robustness, no groups": (robustness, 12, {"groups": False}),
    "robustness, unavailable": (robustness, 12, {"unavailable": tuple(STEPS[12])}),
    "robustness, 1": (robustness, 1, {}),
    "robustness, 1, large": (robustness, 1, {"tiny": False}),
    "robustness, 1, unavailable": (robustness, 1, {"unavailable": (800,)}),
    "dose response": (dose_response, 12, {}),
    "dose response, no groups": (dose_response, 12, {"groups": False, "name": LONG}),
    "dose response, unavailable": (dose_response, 12, {"unavailable": tuple(STEPS[12])}),
    "faithfulness": (faithfulness, 12, {}),
    "faithfulness, kinds": (faithfulness, 12, {"kinds": ("routed", "shared")}),
    "faithfulness, 1": (faithfulness, 1, {"kinds": ("dense",), "groups": False}),
    "faithfulness, 1, kinds": (faithfulness, 1, {"kinds": ("routed", "shared"), "name": LONG}),
}

drawn = drawn_once(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_be_read(drawn, name):
    assert_presentable(drawn(name), FIGURES[name][2].get("name", "tiny-olmoe"))


CONDITIONS = {
    "largest mean LPI, cross-fitted": {"ranking": "signed", "control": "none", "crossfit": True},
    "largest mean LPI, in-sample": {"ranking": "signed", "control": "none", "crossfit": False},
    "matched control": {"ranking": "signed", "control": "matched"},
    "random control": {"control": "random"},
}


def test_robustness_draws_selection_and_controls(drawn):
    steps = some(16)
    table = robustness_table(steps, tiny=False).filter(metric="hit@10")
    titles = {"Top-1 head": ("head", "1"), "Top-10 heads": ("head", "10")}
    titles |= {"Top-1% of heads (1)": ("head", "1%"), "Top-1% of FFN neurons (40)": ("ffn_neuron", "1%")}
    for title, (site, size) in titles.items():
        axes = panel(drawn("robustness, large"), title)
        for label, wanted in CONDITIONS.items():
            rows = table.filter(site=site, size=size, **wanted)
            if label.endswith("in-sample"):  # its band would cover that of the result
                x, y, colour = lines(axes, label)
                assert (x.tolist(), y.tolist()) == (rows["step"].to_list(), pytest.approx(rows["value"].to_list()))
                assert not bands(axes, colour)
            else:
                assert_curve(axes, label, rows)


def test_degenerate_interventions_are_named_and_not_drawn(drawn):
    for name in ("robustness", "robustness, 1"):
        assert "top-10 heads, top-1% of heads." in said(drawn(name))
    assert [axes.get_title(loc="left") for axes in panels(drawn("robustness"))] == [
        "Top-1 head",
        "Top-1% of FFN neurons (40)",
    ]
    table = robustness_table([800]).with_columns(degenerate=True)
    with pytest.raises(drawing.PlotError, match="every intervention is degenerate"):
        ablation_plots.robustness(table, "tiny")


def test_steps_without_a_drop_are_crossed(drawn):
    for axes in panels(drawn("robustness")):
        assert "HIT@10" in said(drawn("robustness"))
        x, _, _ = lines(axes, "not available")
        assert x.tolist() == [0]
        _, y, _ = lines(axes, "random control")
        assert np.isnan(y).tolist() == [True, False, False, False]
    table = robustness_table(some(12), unavailable=tuple(STEPS[12])).filter(metric="log_prob", site="head", size="1")
    gone = drawn("robustness, unavailable")
    assert_curve(panel(gone, "Top-1 head"), "random control", table.filter(control="random"))
    assert "drop of log p(target) (nats)" in said(gone)
    assert "Clean HIT@10 is below 0.1 at every step" in said(gone)
    assert "(nats)" in said(drawn("robustness, 1, unavailable"))


def test_one_checkpoint_is_a_list_of_drops(drawn):
    (axes,) = panels(drawn("robustness, 1, large"))
    table = robustness_table([800], tiny=False).filter(metric="hit@10", site="ffn_neuron", size="1%")
    places = dict(zip([tick.get_text() for tick in axes.get_yticklabels()], axes.get_yticks(), strict=True))
    assert len(places) == 16
    for label, wanted in CONDITIONS.items():
        (place,) = [y for text, y in places.items() if text.startswith(f"top-1% of FFN neurons (40): {label}")]
        row = table.filter(**wanted).row(0, named=True)
        assert segments(axes)[round(place, 6)] == pytest.approx((row["low"], row["high"]))


def test_a_ranking_by_relation_is_drawn_in_sample_with_its_control():
    table = robustness_table(some(12), rankings=("per_relation",))
    table = table.filter(~((pl.col("control") == "none") & pl.col("crossfit")))
    table = table.with_columns(crossfit=False)
    axes = panel(ablation_plots.robustness(table, "tiny"), "Top-1 head")
    rows = table.filter(metric="hit@10", site="head", size="1")
    assert_curve(axes, "largest mean LPI on the relation, in-sample", rows.filter(control="none"))
    assert_curve(axes, "matched control", rows.filter(control="matched"))
    assert not any("cross-fitted" in line.get_label() for line in axes.lines)


def test_dose_response_draws_every_dose_of_the_last_step(drawn):
    figure = drawn("dose response")
    assert "step 800" in figure._suptitle.get_text()
    table = robustness_table(some(12)).filter(step=800, site="ffn_neuron")
    for line, metric in ((0, "hit@10"), (1, "log_prob")):
        number, carried = panels(figure)[2 * line : 2 * line + 2]
        for label, wanted in CONDITIONS.items():
            rows = table.filter(metric=metric, **wanted).sort("units")
            assert len(rows) == 4
            x, y, _ = lines(number, label)
            assert x == pytest.approx([0.1, 0.3, 1, 3], rel=0.1)
            assert y == pytest.approx(rows["value"].to_numpy())
            x, y, _ = lines(carried, label)
            assert x == pytest.approx(rows["removed"].to_numpy())
            ends = rows.select(*(pl.col(c).round(9) for c in ("removed", "low", "high"))).rows()
            assert set(ends) <= bars(carried)


def test_without_hit10_the_dose_response_is_in_nats(drawn):
    figure = drawn("dose response, unavailable")
    assert [axes.get_ylabel() for axes in panels(figure)] == ["drop of log p(target) (nats)", ""]
    assert "not available" in said(figure)
    with pytest.raises(drawing.PlotError, match="no neurons were ablated"):
        ablation_plots.dose_response(robustness_table([800]).filter(site="head"), "tiny")


def test_faithfulness_draws_neurons_and_correlations(drawn):
    figure, kinds = drawn("faithfulness, kinds"), ("routed", "shared")
    scatter, correlation, course = panels(figure)
    neurons, scores = faithfulness_table(kinds), scores_table(some(12), kinds)
    for kind in kinds:
        rows = neurons.filter(kind=kind)
        x, y, _ = lines(scatter, kind)
        assert (x.tolist(), y.tolist()) == (rows["lpi"].to_list(), rows["effect"].to_list())
    assert scatter.get_xlim() == scatter.get_ylim()
    assert max(neurons["lpi"].abs().max(), neurons["effect"].abs().max()) < scatter.get_xlim()[1]
    last = scores.filter(step=800)
    assert len(correlation.get_yticks()) == 12
    random = last.filter(kind="all", score="random")
    (stripe,) = correlation.patches
    assert (stripe.get_x(), stripe.get_x() + stripe.get_width()) == pytest.approx((random["low"][0], random["high"][0]))
    wanted = last.filter(kind="routed", score="gradient").row(0, named=True)
    places = dict(
        zip([tick.get_text() for tick in correlation.get_yticklabels()], correlation.get_yticks(), strict=True)
    )
    place = round(places["gradient × activation, routed"], 6)
    assert segments(correlation)[place] == pytest.approx((wanted["low"], wanted["high"]))
    for label, score in (("LPI", "lpi"), ("gradient", "gradient"), ("|coef", "magnitude"), ("random", "random")):
        assert_curve(course, label, scores.filter(kind="all", score=score))


def test_one_kind_of_neuron_is_coloured_by_layer(drawn):
    scatter = panels(drawn("faithfulness"))[0]
    (cloud,) = scatter.collections
    table = faithfulness_table()
    assert cloud.get_offsets().tolist() == table.select("lpi", "effect").to_numpy().tolist()
    assert cloud.get_array().tolist() == table["layer"].to_list()
    assert any(axes.get_ylabel() == "layer" for axes in drawn("faithfulness").axes)


@pytest.mark.parametrize("draw", [robustness, faithfulness])
def test_unknown_tokens_are_refused_with_the_cure(draw):
    assert_axis_is_checked(draw)


LIBRARY = {**os.environ, "PYTHONPATH": str(Path(drawing.__file__).parents[1])}
SAVE = """
import sys, polars as pl
from moescope import drawing, ablation_plots
figure = ablation_plots.robustness(pl.read_parquet(sys.argv[1]), "tiny")
drawing.save(figure, sys.argv[2] + ".pdf", sys.argv[2] + ".png")
"""


def test_equal_tables_give_equal_bytes(tmp_path):
    """With another hash seed, and after someone changed matplotlib's settings."""
    table = robustness_table(some(12), unavailable=(0,))
    table.write_parquet(tmp_path / "table.parquet")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "pdf.compression": 0, "savefig.dpi": 30}):
        drawing.save(ablation_plots.robustness(table, "tiny"), tmp_path / "here.pdf", tmp_path / "here.png")
    command = [sys.executable, "-c", SAVE, str(tmp_path / "table.parquet"), str(tmp_path / "there")]
    subprocess.run(command, env={**LIBRARY, "PYTHONHASHSEED": "7"}, check=True)
    for ending in ("pdf", "png"):
        assert (tmp_path / f"here.{ending}").read_bytes() == (tmp_path / f"there.{ending}").read_bytes()


WARNINGS = {
    "robustness": ("optimistic", "below 0.1", "named below the figure", "Matched"),
    "dose_response": ("optimistic", "share of the squared norm"),
    "faithfulness": ("stratified", "zeroed at the last position only"),
}


@pytest.mark.parametrize(("figure", "warnings"), WARNINGS.items(), ids=WARNINGS.keys())
def test_every_caption_holds_its_caveats(figure, warnings):
    assert_caption_warns(figure, warnings)
    assert callable(getattr(ablation_plots, figure))
