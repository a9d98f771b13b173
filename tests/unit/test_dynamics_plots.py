"""The figures of neurons and layers over training: they show their tables, say what they show, and nothing collides."""

import numpy as np
import polars as pl
import pytest

from moescope import drawing, dynamics_plots
from tests.reading import (
    assert_curve,
    assert_presentable,
    bars,
    laid_out,
    lines,
    panel,
    panels,
    said,
)
from tests.unit.dynamics_tables import (
    COMPONENTS,
    LONG,
    READINGS,
    STEPS,
    assert_axis_is_checked,
    assert_caption_warns,
    assert_needs_two,
    drawn_once,
    layer_table,
    neuron_table,
    of,
    overlap_table,
    similarity_table,
    tokens_of,
)


def stability(steps, name="tiny-olmoe", axis="log", **options):
    return dynamics_plots.stability(neuron_table(STEPS[steps], **options), name, axis)


def concentration(steps, name="tiny-olmoe", axis="log", **options):
    return dynamics_plots.concentration(neuron_table(STEPS[steps], **options), name, axis)


def survival(steps, name="tiny-olmoe", **options):
    return dynamics_plots.survival(overlap_table(STEPS[steps], **options), name)


def consolidation(steps, name="tiny-olmoe", axis="log", **options):
    steps = STEPS[steps]
    layers = layer_table(steps, options.get("groups", True))
    return dynamics_plots.consolidation(similarity_table(steps, **options), layers, name, axis)


FIGURES = {
    **{f"stability, {n}": (stability, n, {}) for n in (2, 12, 244)},
    "stability, dense": (stability, 16, {"moe": False}),
    "stability, no groups": (stability, 2, {"groups": False, "name": LONG}),
    "stability, tokens": (stability, 16, {"axis": "tokens"}),
    **{f"concentration, {n}": (concentration, n, {}) for n in (12, 244)},
    "concentration, no groups": (concentration, 2, {"groups": False, "axis": "step"}),
    **{f"survival, {n}": (survival, n, {}) for n in (2, 244)},
    "survival, identical": (survival, 12, {"identical": {(8, 13), (505, 800)}, "name": LONG}),
    **{f"consolidation, {n}": (consolidation, n, {}) for n in (2, 16, 244)},
    "consolidation, no groups": (consolidation, 12, {"groups": False, "axis": "tokens"}),
}

drawn = drawn_once(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_be_read(drawn, name):
    assert_presentable(drawn(name), FIGURES[name][2].get("name", "tiny-olmoe"))


def random_line(axes, value):
    """Whether a horizontal line stands there, all across."""
    return any(list(line.get_xdata()) == [0, 1] and list(line.get_ydata()) == [value, value] for line in axes.lines)


@pytest.mark.parametrize("steps", [12, 244])
def test_stability_draws_ceiling_and_nulls(drawn, steps):
    figure, table = drawn(f"stability, {steps}"), neuron_table(STEPS[steps])
    for component, name in COMPONENTS.items():
        axes = panel(figure, name)
        assert_curve(axes, "J with the checkpoint before", of(table, component, "jaccard"))
        assert_curve(axes, "noise ceiling", of(table, component, "ceiling"))
        assert_curve(axes, "J across halves", of(table, component, "cross_half"))
        assert_curve(axes, "N1: J expected given the layer", of(table, component, "jaccard_given_layer"))
        assert_curve(axes, "N1: J expected given layer × expert", of(table, component, "jaccard_given_expert"))
        assert random_line(axes, pytest.approx(0.00503, abs=5e-6))


def test_a_dense_series_has_no_expectation_given_experts(drawn):
    assert "× expert" not in said(drawn("stability, dense"))
    assert "× head" in said(drawn("stability, dense"))


def test_concentration_draws_all_readings(drawn):
    figure, table = drawn("concentration, 12"), neuron_table(STEPS[12])
    for component, name in COMPONENTS.items():
        axes = panel(figure, name)
        assert_curve(axes, "R: share", of(table, component, "gain_share"))
        assert_curve(axes, "R, cross-fitted", of(table, component, "gain_share_crossfit"))
        assert_curve(axes, "share of the positive importance", of(table, component, "positive_share"))
        below = panel(figure, f"{name}: four readings of R")
        drawn_values = [line.get_ydata() for line in below.lines if line.get_label().startswith("ranked")]
        wanted = [of(table, component, f"{r}{end}")["value"] for end in ("", "_crossfit") for r in READINGS]
        assert [list(one) for one in drawn_values] == [pytest.approx(list(values)) for values in wanted]
        assert random_line(axes, 0.01)
        assert axes.get_xlim() == below.get_xlim()


def test_survival_fills_both_triangles_and_crosses_twins(drawn):
    steps, twins = STEPS[12], {(8, 13), (505, 800)}
    figure, table = drawn("survival, identical"), overlap_table(steps, twins)
    for component, name in COMPONENTS.items():
        axes = panel(figure, name)
        matrix = np.asarray(axes.images[0].get_array().filled(np.nan))
        assert np.isnan(np.diag(matrix)).all()
        for row in table.filter(component=component).iter_rows(named=True):
            i, j = steps.index(row["step_from"]), steps.index(row["step"])
            assert (matrix[i, j], matrix[j, i]) == (row["survival"], row["jaccard"])
        crossed = {(steps[int(y)], steps[int(x)]) for x, y in axes.lines[0].get_xydata()}
        assert crossed == twins | {(late, early) for early, late in twins}
        assert [tick.get_text() for tick in axes.get_xticklabels()][::-1] == [str(step) for step in steps]
    assert not any(axes.lines for axes in panels(drawn("survival, 2")))


@pytest.mark.parametrize(("name", "place"), [("consolidation, 16", int), ("consolidation, no groups", tokens_of)])
def test_consolidation_marks_where_it_settles(drawn, name, place):
    _, steps, options = FIGURES[name]
    steps = STEPS[steps]
    table, layers = similarity_table(steps, options.get("groups", True)), layer_table(steps)
    for component, title in COMPONENTS.items():
        (axes,) = [axes for axes in panels(drawn(name)) if axes.get_title(loc="left").startswith(title)]
        assert "consistency 0.91" in axes.get_title(loc="left")
        for label, metric in (("r with the last", "to_final"), ("r with the profile", "to_previous")):
            rows = table.filter(component=component, metric=metric)
            x, y, _ = lines(axes, label)
            assert x.tolist() == [place(step) for step in rows["step"]]
            assert y == pytest.approx(rows["value"].to_numpy())
        marks = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "D"]
        rows = layers.filter(component=component, window="all").filter(pl.col("metric").str.contains("consolidation"))
        wanted = [(place(step), float(metric[14:])) for metric, step in rows.select("metric", "value").iter_rows()]
        assert [tuple(mark) for mark in marks] == [
            pytest.approx(mark) for mark in sorted(wanted, key=lambda one: one[1])
        ]


def test_the_stretched_scale_can_be_read_back():
    r = np.array([-1, -0.3, 0, 0.5, 0.9, 0.99, 1.0])
    assert drawing.unstretch(drawing.stretch(r)) == pytest.approx(r)
    assert (np.diff(drawing.stretch(r)) > 0).all()


def test_courses_run_over_what_is_asked(drawn):
    axes = panel(drawn("stability, tokens"), "FFN")
    assert lines(axes, "J with")[0].tolist() == [tokens_of(step) for step in STEPS[16][1:]]
    assert axes.get_xlabel() == "training tokens (trillions)"
    assert [tick.get_text() for tick in axes.get_xticklabels()][-2:] == ["4", "6"]
    assert axes.get_xscale() == "linear"
    assert panel(drawn("concentration, no groups"), "FFN").get_xlabel() == "training step"
    assert "log scale" in panel(drawn("stability, dense"), "FFN").get_xlabel()


@pytest.mark.parametrize("name", ["stability, no groups", "concentration, no groups", "consolidation, no groups"])
def test_without_intervals_there_is_no_band(drawn, name):
    assert not any(len(c.get_facecolor()) for axes in panels(drawn(name)) for c in axes.collections)
    assert "halves" not in said(drawn(name))


def test_values_that_are_nowhere_known_leave_a_frame():
    """Profiles of a single layer have no correlation."""
    nothing = [pl.lit(None, dtype=pl.Float64).alias(end) for end in ("value", "low", "high")]
    similarity, layers = (made.with_columns(nothing) for made in (similarity_table(STEPS[12]), layer_table(STEPS[12])))
    figure = laid_out(dynamics_plots.consolidation(similarity, layers, "one-layer"))
    assert "FFN: consistency not available" in said(figure)


def test_a_share_is_shown_up_to_1_whatever_its_interval(drawn):
    table = neuron_table(STEPS[12]).with_columns(high=pl.col("value") + 1.5, low=pl.col("value") - 1.5)
    for figure in (dynamics_plots.stability(table, "tiny"), dynamics_plots.concentration(table, "tiny")):
        for axes in panels(figure):
            assert -0.05 < axes.get_ylim()[0] < 0
            assert axes.get_ylim()[1] < 1.05


def test_a_value_that_stands_alone_is_a_point_with_a_bar(drawn):
    axes, table = panel(drawn("stability, 2"), "FFN"), neuron_table(STEPS[2])
    for metric in ("jaccard", "cross_half", "jaccard_given_layer"):
        row = of(table, "ffn", metric).row(0, named=True)
        assert (800, round(row["low"], 9), round(row["high"], 9)) in bars(axes)
        assert any(line.get_marker() != "None" and row["value"] in line.get_ydata() for line in axes.lines)


@pytest.mark.parametrize("draw", [stability, concentration, survival, consolidation])
def test_one_checkpoint_is_refused_in_one_line(draw):
    assert_needs_two(draw)


@pytest.mark.parametrize("draw", [stability, concentration, consolidation])
def test_unknown_tokens_are_refused_with_the_cure(draw):
    assert_axis_is_checked(draw)


WARNINGS = {
    "stability": ("jackknife", "pointwise", "smaller a choice"),
    "concentration": ("Cross-fitted", "mechanical reason", "pointwise"),
    "survival": ("above the diagonal", "0.005"),
    "consolidation": ("complementary by accounting", "pointwise"),
}


@pytest.mark.parametrize(("figure", "warnings"), WARNINGS.items(), ids=WARNINGS.keys())
def test_every_caption_holds_its_caveats(figure, warnings):
    assert_caption_warns(figure, warnings)
    assert callable(getattr(dynamics_plots, figure))
