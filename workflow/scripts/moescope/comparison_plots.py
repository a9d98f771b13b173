"""Series of study ``dynamics`` over each other, and the sparsity question: result tables in, a matplotlib Figure out.

One function per figure; nothing is computed here but what is drawn where. ``axis`` says what courses run over: ``log``
(steps, log scale), ``step`` or ``tokens``. Averages are micro (over prompts); macro averages stand in the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from moescope.drawing import (
    BLUE,
    DASHES,
    MARKERS,
    PALETTE,
    PANELS,
    RANDOM_JACCARD,
    UNIFORM_SHARE,
    VERMILLION,
    WIDTH,
    Curve,
    PlotError,
    correlation_axes,
    course,
    course_axis,
    draw_curves,
    estimate,
    filled,
    from_zero,
    headline,
    needs_two,
    present,
    reference,
    shared_legend,
    styled,
)

CLAIMS = ("stability", "gain", "importance")
#: Top sets by population, and how few neurons make it worth saying that J then moves in large steps.
SETS, FEW = {"all": "top 1%", "matched": "top set of N4"}, 10
#: The rows of the sparsity figure: heading, populations of the MoE and of the dense series, and per panel its name, its
#: metric and which claim and test it shows.
SPARSITY = (
    (
        "As they are, and what routing alone makes expect (N1, dotted)",
        ("all", "all"),
        (
            ("J of the top 1%", "jaccard", (("stability", "plain"), ("stability", "N1"))),
            ("R, share of the positive gain", "gain_share", (("gain", "plain"),)),
            ("share of the positive importance", "positive_share", (("importance", "plain"),)),
        ),
    ),
    (
        "N2: the dense model, each prompt keeping only the blocks that the MoE routes it to",
        ("all", "masked"),
        (
            ("J of the top 1%", "jaccard", (("stability", "N2"),)),
            ("R, share of the positive gain", "gain_share", (("gain", "N2"),)),
            ("share of the positive importance", "positive_share", (("importance", "N2"),)),
        ),
    ),
    (
        "N3: within each prompt, among its active neurons only",
        ("prompt", "prompt"),
        (
            ("J of the top 1%", "jaccard", (("stability", "N3"),)),
            ("share of the positive LPI", "positive_share", (("gain", "N3"),)),
            ("effective number / active neurons", "effective_share", ()),
        ),
    ),
    (
        "N4: the MoE's top 1% × its active share against the dense top 1%, both to the fraction of a neuron",
        ("matched", "matched"),
        (
            ("J of the top set", "jaccard", (("stability", "N4"),)),
            ("R, share of the positive gain", "gain_share", (("gain", "N4"),)),
            ("share of the positive importance", "positive_share", (("importance", "N4"),)),
        ),
    ),
)


@styled
def comparison(
    neurons: Mapping[str, pl.DataFrame],
    importance: Mapping[str, pl.DataFrame],
    similarity: Mapping[str, pl.DataFrame],
    axis: str = "log",
) -> Figure:
    """Stability, concentration, layer importance and consolidation of all series, FFN on the left, attention right.

    The tables by name of series: ``neuron_dynamics``, ``layer_importance`` and ``profile_similarity``.
    """
    lines = {
        "J of the top 1%": {name: _both(table, "jaccard") for name, table in neurons.items()},
        "R of the top 1%": {name: _both(table, "gain_share") for name, table in neurons.items()},
        "layer importance (nats)": {
            name: table.filter(pl.col("aggregate") == "mean", pl.col("step").is_not_null())
            for name, table in importance.items()
        },
        "r with the last\nlayer profile": {
            name: table.filter(pl.col("metric") == "to_final") for name, table in similarity.items()
        },
    }
    needs_two(pl.concat(lines["J of the top 1%"].values()), "comparison", " and ".join(neurons))
    figure = Figure(figsize=(WIDTH, 1.2 + 1.65 * len(lines)), layout="constrained")
    headline(figure, "Series beside each other")
    grid = figure.subplots(len(lines), 2, sharex=True, sharey="row")
    names = list(dict.fromkeys([*neurons, *importance, *similarity]))
    drawn = []
    for line, (label, tables) in zip(grid, lines.items(), strict=True):
        for axes, component in zip(line, PANELS, strict=True):
            parts = {name: rows.filter(pl.col("component") == component) for name, rows in tables.items()}
            curves = present(Curve(name, rows, *_series_look(names.index(name))) for name, rows in parts.items())
            draw_curves(axes, curves, axis)
            axes.yaxis.set_major_locator(_few_ticks())
            drawn += curves
        line[0].set_ylabel(label)
    for line, value, label in ((0, RANDOM_JACCARD, "random sets, uniform shares"), (1, UNIFORM_SHARE, None)):
        for axes in grid[line]:
            reference(axes, value, label)
            from_zero(axes)
    correlation_axes(grid[3])
    for axes, name in zip(grid[0], PANELS.values(), strict=True):
        axes.set_title(name)
    for axes in grid[-1]:
        course_axis(axes, drawn, axis)
    for axes in grid[:-1].flat:
        axes.tick_params(labelbottom=False)
    shared_legend(figure, grid.flat)
    return figure


def _both(table: pl.DataFrame, metric: str) -> pl.DataFrame:
    """The courses of one metric of both components."""
    return pl.concat([course(table, component, metric) for component in PANELS])


def _few_ticks() -> MaxNLocator:
    return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])


def _series_look(number: int) -> tuple[str, str, str]:
    """Colour, marker and dash of the n-th series."""
    dash = DASHES[number // len(PALETTE) % len(DASHES)]
    return PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)], dash


@styled
def sparsity(
    table: pl.DataFrame, verdict: pl.DataFrame, neurons: Mapping[str, pl.DataFrame], axis: str = "log"
) -> Figure:
    """Is it more than sparsity? Every pair of a MoE and a dense series as they are and under N1 to N4.

    ``table`` is ``sparsity``, ``verdict`` is ``verdict``, ``neurons`` holds ``neuron_dynamics`` by name of series. Each
    panel says the mean difference, its interval and whether the MoE exceeds; the verdicts stand below.
    """
    pairs = table.select("moe", "dense").unique(maintain_order=True).rows()
    if not pairs:
        raise PlotError("sparsity is empty: there is no pair of series; set dynamics.pairs")
    lines = {pair: _sparsity_lines(neurons[pair[0]], neurons[pair[1]], pair) for pair in pairs}
    pairs = [pair for pair in pairs if lines[pair]]
    if not pairs:
        raise PlotError("sparsity needs two checkpoints of both series of a pair; add steps to the series")
    notes = {pair: filled(_note(pair, verdict, neurons)) for pair in pairs}
    heights = [1.75 * len(lines[pair]) + 0.9 + 0.13 * notes[pair].count("\n") for pair in pairs]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(pairs), 1, height_ratios=heights))
    for part, pair in zip(parts, pairs, strict=True):
        _sparsity_pair(part, pair, lines[pair], table, notes[pair], axis)
    return figure


SparsityPanel = tuple[str, list[Curve], Sequence[tuple[str, str]]]


def _sparsity_lines(
    moe: pl.DataFrame, dense: pl.DataFrame, names: tuple[str, str]
) -> list[tuple[str, list[SparsityPanel]]]:
    """The rows of one pair that have something to show: heading and panels (name, curves, claims with their tests)."""
    if any(course(table, "ffn", "jaccard").is_empty() for table in (moe, dense)):
        return []
    lines = []
    for heading, populations, wanted in SPARSITY:
        panels = []
        for name, metric, tests in wanted:
            curves = [
                Curve(f"{names[0]} (MoE)", course(moe, "ffn", metric, populations[0]), VERMILLION, "o"),
                Curve(f"{names[1]} (dense)", course(dense, "ffn", metric, populations[1]), BLUE, "s"),
            ]
            if ("stability", "N1") in tests:
                routed = course(moe, "ffn", "jaccard_given_expert")
                layered = course(dense, "ffn", "jaccard_given_layer")
                curves.append(Curve(f"N1: J expected given layer × expert, {names[0]}", routed, VERMILLION, "", ":"))
                curves.append(Curve(f"N1: J expected given the layer, {names[1]}", layered, BLUE, "", ":"))
            if len(present(curves[:2])) == 2:
                panels.append((name, present(curves), tests))
        if panels:
            lines.append((heading, panels))
    return lines


def _sparsity_pair(
    part: SubFigure,
    pair: tuple[str, str],
    lines: Sequence[tuple[str, list[SparsityPanel]]],
    table: pl.DataFrame,
    note: str,
    axis: str,
) -> None:
    headline(part, f"Is it more than sparsity? FFN neurons of {pair[0]} and {pair[1]}")
    grid = part.subplots(len(lines), 3, squeeze=False, sharex=True)
    everything = [curve for _, panels in lines for _, curves, _ in panels for curve in curves]
    for line, (heading, panels) in zip(grid, lines, strict=True):
        for axes, (name, curves, tests) in zip(line, panels, strict=False):
            draw_curves(axes, curves, axis)
            differences = [text for test in tests if (text := _difference(table, *pair, *test))]
            axes.set_title("\n".join([name, *differences]), fontsize=6.5, fontweight="normal", linespacing=1.25)
            axes.yaxis.set_major_locator(_few_ticks())
            from_zero(axes)
        above = 11.5 + 8.6 * line[0].get_title(loc="left").count("\n")
        place = {"xy": (0, 1), "xytext": (-18, above + 3), "xycoords": "axes fraction", "textcoords": "offset points"}
        # the heading is wider than its panel, so the layout keeps room for a blank of its height instead
        for text, counts in ((heading, False), (" ", True)):
            line[0].annotate(text, **place, va="bottom", fontweight="bold", annotation_clip=False, in_layout=counts)
        for axes in line[len(panels) :]:
            axes.remove()
    for axes in grid[-1][: len(lines[-1][1])]:
        course_axis(axes, everything, axis)
        axes.tick_params(labelbottom=True)
        if axes is not grid[-1][len(lines[-1][1]) // 2]:
            axes.set_xlabel("")  # too long for every panel
    shared_legend(part, [axes for axes in grid.flat if axes.figure is not None], note)


def _difference(table: pl.DataFrame, moe: str, dense: str, claim: str, test: str) -> str:
    """The mean difference in words, empty where the table has no such test."""
    wanted = {"moe": moe, "dense": dense, "claim": claim, "test": test}
    rows = table.filter(*(pl.col(column) == value for column, value in wanted.items()))
    if rows.is_empty() or rows["difference_value"][0] is None:
        return ""
    number = estimate(*rows.select("difference_value", "difference_low", "difference_high").row(0), sign="+")
    exceeds = {True: ": exceeds", False: ": not above", None: ""}[rows["exceeds"][0]]
    if (rows["difference_high"][0] or 0) < 0:
        exceeds = ": below"
    over = "Δ over N1" if test == "N1" else "Δ"
    return f"{over} {number}{exceeds}"


def _note(pair: tuple[str, str], verdict: pl.DataFrame, neurons: Mapping[str, pl.DataFrame]) -> str:
    """The verdict on every claim, one a line, what the differences mean, and which sets are small."""
    delta = "Δ: mean difference MoE − dense (as the row says), its 95% interval; exceeds: above 0, below: under 0."
    return "\n".join([*_sentences(verdict, *pair), delta, *_small_sets(pair, neurons)])


def _sentences(verdict: pl.DataFrame, moe: str, dense: str) -> list[str]:
    """The verdict on every claim."""
    rows = verdict.filter(pl.col("moe") == moe, pl.col("dense") == dense)
    said = {True: "beyond sparsity", False: "not beyond sparsity", None: "undecided"}
    lines = {
        claim: f"{claim.capitalize()}: {said[beyond]}. {because}"
        for claim, beyond, because in rows.select("claim", "beyond_sparsity", "because").iter_rows()
    }
    return [lines[claim] for claim in CLAIMS if claim in lines]


def _small_sets(pair: tuple[str, str], neurons: Mapping[str, pl.DataFrame]) -> list[str]:
    """Which top sets hold few neurons, each of which is worth one over their number in survival, and in J that much."""
    found = []
    for name, (population, what) in itertools.product(pair, SETS.items()):
        kept, shared = (
            course(neurons[name], "ffn", metric, population)["resolution"].max() for metric in ("survival", "jaccard")
        )
        if kept and 1 / kept < FEW:
            worth = f"one more in common moves its J by up to {shared:.2f}"
            found.append(f"The {what} of {name} holds {1 / kept:.3g} neurons only: {worth}.")
    return found
