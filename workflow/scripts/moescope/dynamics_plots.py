"""How neurons and layers move over training: result tables of study ``dynamics`` in, a matplotlib Figure out.

One function per figure; nothing is computed here but what is drawn where. ``axis`` says what courses run over: ``log``
(steps, log scale), ``step`` or ``tokens``. Averages are micro (over prompts); macro averages stand in the tables. A
curve whose table rows are missing or null (no group tables, no routing) is left out, also of the legend; a value that
is not available breaks its curve. Every figure needs two checkpoints and raises PlotError where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moescope.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PANELS,
    PURPLE,
    RANDOM_JACCARD,
    SKY,
    UNIFORM_SHARE,
    VERMILLION,
    WIDTH,
    Curve,
    correlation_axes,
    course,
    course_axis,
    course_places,
    draw_panel,
    estimate,
    from_zero,
    headline,
    needs_two,
    reference,
    shared_legend,
    short,
    styled,
)

THRESHOLDS = ("0.9", "0.95", "0.99")
READINGS = {
    "gain_share": ("ranked by gain, in the model", VERMILLION, "o"),
    "gain_share_layer": ("ranked by gain, in each layer", ORANGE, "D"),
    "gain_share_by_importance": ("ranked by importance, in the model", BLUE, "s"),
    "gain_share_by_importance_layer": ("ranked by importance, in each layer", SKY, "^"),
}


@styled
def stability(table: pl.DataFrame, title: str, axis: str = "log") -> Figure:
    """Overlap J of the top 1% of neurons with the checkpoint before, between its noise ceiling and its nulls.

    ``table`` is ``neuron_dynamics``, ``title`` names the series.
    """
    needs_two(table.filter(pl.col("metric") == "jaccard"), "stability", title)
    both = not course(table, "ffn", "jaccard_given_expert").is_empty()
    given = "layer × expert (attention: × head)" if both else "layer × head (attention)"
    looks = {
        "jaccard": ("J with the checkpoint before", VERMILLION, "o", "-"),
        "ceiling": ("noise ceiling (halves of the prompts)", BLACK, "", "--", 1.4, 0.1),
        "cross_half": ("J across halves and checkpoints", BLUE, "", "-."),
        "jaccard_given_layer": ("N1: J expected given the layer", GREEN, "", ":"),
        "jaccard_given_expert": (f"N1: J expected given {given}", PURPLE, "", ":"),
    }
    figure, panels = _two_panels(f"Stability of the top 1% of neurons: {title}", 2.4)
    for axes, component in zip(panels, PANELS, strict=True):
        curves = [Curve(look[0], course(table, component, m), *look[1:]) for m, look in looks.items()]
        draw_panel(axes, curves, axis, PANELS[component])
        reference(axes, RANDOM_JACCARD, f"random sets ({RANDOM_JACCARD:.3f})")
    panels[0].set_ylabel("Jaccard overlap J")
    from_zero(panels[0])
    shared_legend(figure, panels)
    return figure


@styled
def concentration(table: pl.DataFrame, title: str, axis: str = "log") -> Figure:
    """How much of all positive gain, and of all positive importance, the top 1% of neurons hold.

    Above the default reading with its intervals, below all four readings of the positive-gain concentration R without.
    ``table`` is ``neuron_dynamics``, ``title`` names the series.
    """
    needs_two(table.filter(pl.col("metric") == "gain_share"), "concentration", title)
    above = {
        "gain_share": ("R: share of the positive gain", VERMILLION, "o", "-"),
        "gain_share_crossfit": ("R, cross-fitted", VERMILLION, "", "--"),
        "positive_share": ("share of the positive importance", BLUE, "s", "-"),
    }
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    headline(figure, f"Concentration in the top 1% of neurons: {title}")
    upper, lower = figure.subfigures(2, 1)
    rows = [part.subplots(1, 2, sharey=True) for part in (upper, lower)]
    for component, first, second in zip(PANELS, *rows, strict=True):
        whole = [Curve(look[0], course(table, component, m), *look[1:]) for m, look in above.items()]
        draw_panel(first, whole, axis, PANELS[component])
        curves = _readings(table, component)
        draw_panel(second, curves, axis, f"{PANELS[component]}: four readings of R")
        course_axis(second, whole, axis)
    for part, panels in zip((upper, lower), rows, strict=True):
        for axes in panels:
            reference(axes, UNIFORM_SHARE, f"uniform ({UNIFORM_SHARE:g})" if part is upper else None)
        panels[0].set_ylabel("share held by the top 1%")
        from_zero(panels[0])
        shared_legend(part, panels)
    return figure


def _readings(table: pl.DataFrame, component: str) -> list[Curve]:
    """The four readings of R, then the same cross-fitted; without intervals, which would hide one another."""
    return [
        Curve(f"{name}{told}", course(table, component, f"{metric}{part}"), colour, mark, dash, 1.1).bare()
        for part, told, dash in (("", "", "-"), ("_crossfit", ", cross-fitted", "--"))
        for metric, (name, colour, mark) in READINGS.items()
    ]


@styled
def survival(table: pl.DataFrame, title: str) -> Figure:
    """Every checkpoint against every other: survival of the top 1% above the diagonal, Jaccard overlap below.

    ``table`` is ``overlap``, ``title`` names the series. Pairs whose importances are equal to the bit are crossed.
    """
    pairs = table.filter(pl.col("step_from") < pl.col("step"))
    needs_two(pairs, "survival", title)
    steps = pl.concat([pairs["step_from"], pairs["step"]]).unique().sort().to_list()
    place = {step: i for i, step in enumerate(steps)}
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    headline(figure, f"Overlap of the top 1% of neurons between any two checkpoints: {title}")
    for axes, (component, name) in zip(panels, PANELS.items(), strict=True):
        matrix = np.full((len(steps), len(steps)), np.nan)
        same = []
        rows = pairs.filter(pl.col("component") == component)
        for early, late, jaccard, survived, identical in rows.select(
            "step_from", "step", "jaccard", "survival", "identical"
        ).iter_rows():
            matrix[place[early], place[late]], matrix[place[late], place[early]] = survived, jaccard
            if identical:
                same += [(place[late], place[early]), (place[early], place[late])]
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        size = min(4.0, 60 / len(steps))
        if same:
            look = {"color": VERMILLION, "marker": "x", "markersize": size, "linestyle": ""}
            axes.plot(*zip(*same, strict=True), label="identical checkpoints", **look)
        axes.set_title(name)
        axes.set_xlabel("step (columns)")
        _matrix_ticks(axes, steps)
    panels[0].set_ylabel("step (rows)")
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("survival (above the diagonal)\nJaccard overlap (below)")
    if any(axes.lines for axes in panels):
        shared_legend(figure, panels)
    return figure


def _matrix_ticks(axes: Axes, steps: Sequence[int]) -> None:
    """As many steps as can be read, counted back from the last."""
    stride = math.ceil(len(steps) / 16)
    chosen = range(len(steps) - 1, -1, -stride)
    labels = [short(steps[i]) for i in chosen]
    axes.set_xticks(chosen, labels, rotation=90)
    axes.set_yticks(chosen, labels)
    axes.tick_params(length=2)


# --- layers over training ---------------------------------------------------------------------------------------------


@styled
def consolidation(similarity: pl.DataFrame, dynamics: pl.DataFrame, title: str, axis: str = "log") -> Figure:
    """Correlation of each layer profile with the last one and with the one before, and where it settles.

    ``similarity`` is ``profile_similarity``, ``dynamics`` is ``layer_dynamics``, ``title`` names the series. Diamonds
    stand at the consolidation step of each threshold, with the interval of that step.
    """
    needs_two(similarity.filter(pl.col("metric") == "to_previous"), "consolidation", title)
    looks = {
        "to_final": ("r with the last profile", VERMILLION, "o", "-"),
        "to_previous": ("r with the profile before", BLUE, "s", "-"),
        "to_previous_spearman": ("Spearman with the profile before", SKY, "", "--"),
    }
    figure, panels = _two_panels(f"Consolidation of the layer profiles: {title}", 2.5)
    places = dict(sorted(zip(similarity["step"], course_places(similarity, axis), strict=True)))
    whole = dynamics.filter(pl.col("window") == "all")
    for axes, (component, name) in zip(panels, PANELS.items(), strict=True):
        rows = similarity.filter(pl.col("component") == component)
        curves = [Curve(look[0], rows.filter(pl.col("metric") == m), *look[1:]) for m, look in looks.items()]
        curves[-1] = curves[-1].bare()  # ranks of few layers jump, their bands fill the panel
        of_component = whole.filter(pl.col("component") == component)
        mean = of_component.filter(pl.col("metric") == "consistency").drop_nulls("value")
        number = estimate(*mean.select("value", "low", "high").row(0)) if len(mean) else "not available"
        draw_panel(axes, curves, axis, f"{name}: consistency {number}")
        for threshold in THRESHOLDS:
            axes.axhline(float(threshold), color=GREY, linewidth=0.6, linestyle=":", zorder=0)
            for row in of_component.filter(pl.col("metric") == f"consolidation_{threshold}").iter_rows(named=True):
                _consolidated(axes, row, float(threshold), places)
    correlation_axes(panels)
    panels[0].set_ylabel("correlation of layer profiles\n(scale stretched towards 1)")
    shared_legend(figure, panels)
    return figure


def _consolidated(axes: Axes, row: Mapping, threshold: float, places: Mapping[int, float]) -> None:
    if row["value"] is None:
        return
    label = "consolidation step (r with the last stays above the line)"
    look = {"color": BLACK, "marker": "D", "markersize": 4.5, "markerfacecolor": "white", "linestyle": "", "zorder": 5}
    steps, there = list(places), list(places.values())
    value, low, high = (
        None if s is None else np.interp(s, steps, there) for s in (row["value"], row["low"], row["high"])
    )
    if low is not None:
        axes.hlines(threshold, low, high, color=BLACK, linewidth=1.0, zorder=4)
    axes.plot([value], [threshold], label=label, **look)


def _two_panels(title: str, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH, height + 0.9), layout="constrained")
    headline(figure, title)
    return figure, figure.subplots(1, 2, sharey=True)
