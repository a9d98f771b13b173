"""What breaks without a part, and whether the scores foretell it: ablation tables in, a matplotlib Figure out.

One function per figure; nothing is computed here but what is drawn where. ``axis`` says what courses run over: ``log``
(steps, log scale), ``step`` or ``tokens``. Averages are micro (over prompts); macro averages stand in the tables. A
curve without values is left out, also of the legend; a value that is not available breaks its curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from moescope.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    WIDTH,
    Curve,
    PlotError,
    course_places,
    draw_panel,
    headline,
    plain,
    points,
    present,
    reference,
    shared_legend,
    styled,
    suptitle,
)

INTERVENTIONS = {
    ("head", "1"): "top-1 head",
    ("head", "10"): "top-10 heads",
    ("head", "1%"): "top-1% of heads",
    ("ffn_neuron", "1%"): "top-1% of FFN neurons",
}
RANKINGS = {"signed": "mean LPI", "abs": "absolute mean LPI", "per_relation": "mean LPI on the relation"}
DOSES = ("0.1%", "0.3%", "1%", "3%")
DROPS = {"hit@10": "relative drop of HIT@10", "log_prob": "drop of log p(target) (nats)"}
NO_HITS = "clean HIT@10 is below 0.1"
SCORES = {
    "lpi": ("LPI", VERMILLION, "o"),
    "gradient": ("gradient × activation", BLUE, "s"),
    "magnitude": ("|coefficient| × |value|", GREEN, "D"),
    "random": ("random", GREY, "^"),
}
KINDS = {"dense": (BLUE, "o"), "routed": (VERMILLION, "o"), "shared": (GREEN, "s")}


@styled
def robustness(table: pl.DataFrame, title: str, axis: str = "log") -> Figure:
    """Relative drop of HIT@10 without the checkpoint's own top heads or neurons, over steps, beside its controls.

    ``table`` is ``robustness``, ``title`` names the series. Interventions that are degenerate in a model of this size
    are named below, not drawn; steps where clean HIT@10 is below 0.1 are crossed on the axis, and where that is so at
    every step the loss of log-probability is drawn instead. One checkpoint gives a list.
    """
    table = table.filter(pl.col("scope") == "all", pl.col("average") == "micro")
    metric = "hit@10" if _known(table, "hit@10") else "log_prob"
    table = table.filter(pl.col("metric") == metric)
    parts = {
        label: rows
        for (site, size), label in INTERVENTIONS.items()
        if len(rows := table.filter(pl.col("site") == site, pl.col("size") == size))
    }
    shown = {label: rows for label, rows in parts.items() if not rows["degenerate"].any()}
    if not shown:
        raise PlotError(
            f"robustness of {title}: every intervention is degenerate in a model of this size; leave it out"
        )
    notes = (
        []
        if metric == "hit@10"
        else [f"{NO_HITS[0].upper()}{NO_HITS[1:]} at every step; drawn is the loss of log-probability."]
    )
    if left_out := [label for label in parts if label not in shown]:
        notes.append(f"Degenerate in a model of this size, in the table only: {', '.join(left_out)}.")
    heading, note = f"What breaks without the most important parts: {title}", "\n".join(notes)
    if table["step"].n_unique() == 1:
        return _robustness_list(shown, heading, note, DROPS[metric])
    lines = math.ceil(len(shown) / 2)
    figure = Figure(figsize=(WIDTH, 1.1 + 2.0 * lines), layout="constrained")
    headline(figure, heading)
    grid = figure.subplots(lines, min(2, len(shown)), squeeze=False)
    for axes, (label, rows) in zip(grid.flat, shown.items(), strict=False):
        draw_panel(axes, _courses(rows), axis, f"{label[0].upper()}{label[1:]}{_units(rows)}", wide=len(shown) == 1)
        reference(axes, 0)
        _mark_unavailable(axes, rows, axis)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    for line in grid:
        line[0].set_ylabel(DROPS[metric])
    shared_legend(figure, grid.flat[: len(shown)], note)
    return figure


def _robustness_list(shown: Mapping[str, pl.DataFrame], heading: str, note: str, quantity: str) -> Figure:
    """One checkpoint: every intervention under every condition, a gap between interventions."""
    curves, places = [], []
    for number, (label, rows) in enumerate(shown.items()):
        for curve in present(_conditions(rows)):
            places.append(len(curves) + 0.8 * number)
            curves.append(replace(curve, label=f"{label}{_units(rows)}: {curve.label}"))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.19 * (places[-1] + 1)), layout="constrained")
    suptitle(figure, heading, curves[0].rows)
    axes = figure.subplots()
    points(axes, curves, quantity, places)
    axes.axvline(0, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    if note:
        shared_legend(figure, [], note)
    return figure


def _known(table: pl.DataFrame, metric: str) -> bool:
    """Whether the metric has a value anywhere."""
    return table.filter(pl.col("metric") == metric)["value"].is_not_null().any()


def _conditions(rows: pl.DataFrame) -> list[Curve]:
    """The selection cross-fitted and in-sample, its matched and the random controls; the first ranking there is."""
    ranking = next((name for name in RANKINGS if name in rows["ranking"]), "signed")
    chosen = rows.filter(pl.col("ranking") == ranking)
    matched = chosen.filter(pl.col("control") == "matched")
    if matched["crossfit"].any():
        matched = matched.filter("crossfit")
    selection = chosen.filter(pl.col("control") == "none")
    name = f"largest {RANKINGS[ranking]}"
    return [
        Curve(f"{name}, cross-fitted", selection.filter("crossfit"), VERMILLION, "o", "-"),
        Curve(f"{name}, in-sample (optimistic)", selection.filter(~pl.col("crossfit")), ORANGE, "o", "--"),
        Curve("matched control", matched, BLUE, "s", "-"),
        Curve("random control", rows.filter(pl.col("control") == "random"), GREY, "^", "-"),
    ]


def _courses(rows: pl.DataFrame) -> list[Curve]:
    """The conditions; the in-sample band is left out where it would cover the cross-fitted one, which is the result."""
    crossfitted, in_sample, *controls = _conditions(rows)
    return [crossfitted, in_sample.bare() if present([crossfitted]) else in_sample, *controls]


def _units(rows: pl.DataFrame) -> str:
    """How many heads or neurons are taken away, where the name does not say it."""
    units = rows["units"].max()
    return f" ({units:,})" if rows["size"][0].endswith("%") else ""


def _mark_unavailable(axes: Axes, rows: pl.DataFrame, axis: str) -> None:
    """Crosses on the axis at the steps without a value."""
    missing = rows.group_by("step").agg(pl.all().first(), gone=pl.col("value").is_null().all()).filter("gone")
    if missing.is_empty():
        return
    look = {"color": BLACK, "marker": "x", "markersize": 4, "linestyle": "", "clip_on": False, "zorder": 5}
    x = course_places(missing.sort("step"), axis)
    axes.plot(x, np.zeros(len(x)), transform=axes.get_xaxis_transform(), label=f"not available: {NO_HITS}", **look)


@styled
def dose_response(table: pl.DataFrame, title: str) -> Figure:
    """Drop of HIT@10 and of the log-probability at the last step against how many FFN neurons are taken away.

    ``table`` is ``robustness``, ``title`` names the series. On the left against their number, on the right against the
    share of the squared norm of the FFN output that they carry. Without HIT@10 (clean below 0.1) it is one row.
    """
    table = table.filter(
        pl.col("scope") == "all",
        pl.col("average") == "micro",
        pl.col("site") == "ffn_neuron",
        pl.col("size").is_in(DOSES),
    )
    if table.is_empty():
        raise PlotError(f"dose response of {title}: no neurons were ablated; run the ablation first")
    table = table.filter(pl.col("step") == table["step"].max())
    rows = {metric: table.filter(pl.col("metric") == metric) for metric in DROPS if _known(table, metric)}
    note = "" if "hit@10" in rows else f"{NO_HITS[0].upper()}{NO_HITS[1:]}: its relative drop is not available."
    figure = Figure(figsize=(WIDTH, 1.3 + 2.0 * len(rows)), layout="constrained")
    suptitle(figure, f"Dose and response, FFN neurons: {title}", table)
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex="col", sharey="row")
    for line, (metric, part) in zip(grid, rows.items(), strict=True):
        _doses(line, present(_conditions(part)))
        line[0].set_ylabel(DROPS[metric])
    grid[0, 0].set_title("Against the number")
    grid[0, 1].set_title("Against what they carry")
    grid[-1, 0].set_xlabel("neurons taken away (% of all FFN neurons, log scale)")
    scale = " (log scale)" if grid[0, 1].get_xscale() == "log" else ""
    grid[-1, 1].set_xlabel(f"share of |F|² taken away{scale}")
    shared_legend(figure, grid.flat, note)
    return figure


def _doses(line: Sequence[Axes], curves: Sequence[Curve]) -> None:
    """The same curves against the number of neurons and against what is removed, with bars for the intervals."""
    removed = pl.concat([curve.rows["removed"] for curve in curves]).drop_nulls()
    for number, curve in enumerate(curves):
        rows = curve.rows.with_columns(dose=pl.col("size").str.strip_suffix("%").cast(pl.Float64)).sort("dose")
        look = {"color": curve.colour, "marker": curve.marker, "linestyle": curve.dash, "label": curve.label}
        # a little apart, so that no bar hides another
        apart = rows["dose"].to_numpy() * 1.04 ** (number - (len(curves) - 1) / 2)
        for axes, x in zip(line, (apart, rows["removed"].to_numpy()), strict=True):
            axes.plot(x, rows["value"].to_numpy(), linewidth=1.1, zorder=3, **look)
            axes.vlines(x, rows["low"].to_numpy(), rows["high"].to_numpy(), color=curve.colour, linewidth=1.0)
    for axes in line:
        reference(axes, 0)
        axes.yaxis.set_major_formatter(plain)
    doses = [float(dose.rstrip("%")) for dose in DOSES]
    _log_ticks(line[0], doses)
    if len(removed) and removed.min() > 0:
        low, high = removed.min() / 1.3, removed.max() * 1.3
        powers = [10.0**k for k in range(-9, 1)]
        ticks = [tick for tick in powers if low <= tick <= high]
        between = [tick for power in powers for tick in (power, 3 * power) if low <= tick <= high]
        _log_ticks(line[1], ticks if len(between) > 6 else between)
        line[1].set_xlim(low, high)
    line[1].xaxis.set_major_formatter(plain)


def _log_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(plain)


@styled
def faithfulness(neurons: pl.DataFrame, scores: pl.DataFrame, title: str, axis: str = "log") -> Figure:
    """The score of sampled neurons against the true effect of zeroing each alone, and four scores compared.

    ``neurons`` is ``faithfulness`` of the last step, ``scores`` is ``score_faithfulness``, ``title`` names the series.
    The grey stripe is the interval of random scores. Several steps add the course of the correlations.
    """
    last = scores.filter(pl.col("step") == scores["step"].max())
    several = scores["step"].n_unique() > 1
    figure = Figure(figsize=(WIDTH, 5.6 if several else 3.3), layout="constrained")
    suptitle(figure, f"Is the score faithful? {title}", last)
    mosaic = [["neurons", "scores"], ["course", "course"]] if several else [["neurons", "scores"]]
    heights = [1.25, 1] if several else [1]
    panels = figure.subplot_mosaic(mosaic, height_ratios=heights, width_ratios=[1, 1])
    _score_against_effect(panels["neurons"], neurons)
    _correlations(panels["scores"], last)
    if several:
        curves = [
            Curve(name, scores.filter(pl.col("kind") == "all", pl.col("score") == score), colour, marker)
            for score, (name, colour, marker) in SCORES.items()
        ]
        draw_panel(panels["course"], curves, axis, "Over training", wide=True)
        panels["course"].set_ylabel("Spearman with the effect")
        reference(panels["course"], 0)
    shared_legend(figure, [axes for name, axes in panels.items() if name != "scores"])
    return figure


def _score_against_effect(axes: Axes, neurons: pl.DataFrame) -> None:
    """Every sampled neuron, both axes on one scale: linear around 0, logarithmic beyond."""
    kinds = [kind for kind in KINDS if kind in neurons["kind"]]
    if len(kinds) > 1:
        for kind in kinds:
            rows = neurons.filter(pl.col("kind") == kind)
            colour, marker = KINDS[kind]
            look = {"color": colour, "marker": marker, "markersize": 2.6, "alpha": 0.6, "markeredgewidth": 0}
            axes.plot(rows["lpi"], rows["effect"], linestyle="", label=f"{kind} neurons (n = {len(rows):,})", **look)
    else:
        cloud = axes.scatter(neurons["lpi"], neurons["effect"], c=neurons["layer"], cmap="cividis", s=7, linewidth=0)
        bar = axes.get_figure().colorbar(cloud, ax=axes, shrink=0.8, pad=0.02, label="layer")
        bar.locator = MaxNLocator(nbins=6, integer=True)
        bar.outline.set_visible(False)
    size = np.abs(np.concatenate([neurons["lpi"].to_numpy(), neurons["effect"].to_numpy()]))
    size = size[size > 0] if (size > 0).any() else np.array([1.0])
    largest = float(size.max())
    first, last = (math.floor(math.log10(edge)) for edge in (np.quantile(size, 0.25), largest))
    decades = range(last, first if last > first else first - 1, -max(1, math.ceil((last - first) / 2)))
    ticks = [10.0**decade for decade in decades]
    axes.set(xlabel="LPI (nats)", ylabel="true effect of zeroing it (nats)")
    for scale, which in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
        scale("symlog", linthresh=10.0**first, linscale=0.7)
        which.set_major_locator(FixedLocator([*(-tick for tick in ticks), 0, *ticks]))
        which.set_minor_locator(NullLocator())
        which.set_major_formatter(_power)
    ends = [-1.6 * largest, 1.6 * largest]
    axes.set(xlim=ends, ylim=ends)
    axes.plot(ends, ends, color=GREY, linewidth=0.7, linestyle=":", zorder=0, label="effect = LPI")
    axes.set_title(f"{len(neurons):,} neurons")


def _power(value: float, _: int | None = None) -> str:
    """A power of ten, as in −10⁻³."""
    if value == 0:
        return "0"
    exponent = str(round(math.log10(abs(value)))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    sign = "\N{MINUS SIGN}" if value < 0 else ""
    return f"{sign}10{exponent}"


def _correlations(axes: Axes, scores: pl.DataFrame) -> None:
    """Spearman of each score with the effect; the kinds of neurons apart, smaller, where there is more than one."""
    kinds = [kind for kind in ("all", *KINDS) if kind in scores["kind"]]
    kinds = kinds if len(kinds) > 2 else ["all"]
    curves, places = [], []
    for number, (score, (name, colour, marker)) in enumerate(SCORES.items()):
        for kind in kinds:
            rows = scores.filter(pl.col("score") == score, pl.col("kind") == kind)
            if rows["value"].is_not_null().any():
                places.append(len(curves) + 0.7 * number)
                label = name if len(kinds) == 1 else f"{name}, {kind}"
                curves.append(Curve(label, rows, colour if kind == "all" else "#777777", marker))
    points(axes, curves, "Spearman with the effect", places)
    null = scores.filter(pl.col("score") == "random", pl.col("kind") == "all", pl.col("low").is_not_null())
    for low, high in null.select("low", "high").iter_rows():
        axes.axvspan(low, high, color=GREY, alpha=0.2, linewidth=0, zorder=0)
    axes.axvline(0, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    axes.set_title("Rank correlation, 95% intervals")
