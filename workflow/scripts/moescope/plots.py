"""The figures of the attribution, one function per figure: a result table in, a matplotlib Figure out.

A series of one checkpoint has no course to show: its values are drawn as labelled points. A checkpoint without a step
(``main``, which may be annealed) is not on the trajectory: it is drawn only where it stands alone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, MultipleLocator
from matplotlib.transforms import ScaledTranslation

from moescope.drawing import (
    BLACK,
    BLUE,
    DASHES,
    GREY,
    MARKERS,
    PALETTE,
    VERMILLION,
    WIDTH,
    Curve,
    PlotError,
    band,
    course_axis,
    draw_curves,
    plain,
    points,
    styled,
    suptitle,
)

PARTS = {"seen": "template seen in training", "held_out": "template held out"}
QUARTERS = {
    "exposure_1": "exposure quarter 1 (rarest)",
    "exposure_2": "exposure quarter 2",
    "exposure_3": "exposure quarter 3",
    "exposure_4": "exposure quarter 4 (most frequent)",
}
QUANTITIES = {"hit@10": "HIT@10 (share of prompts)", "mrr": "MRR (mean of 1/rank)"}
ELSEWHERE = {"color": VERMILLION, "marker": "D", "markerfacecolor": "white", "markersize": 3.5, "linestyle": ""}
#: The early profile is that of one twelfth of the way: 50,000 of 600,000 steps in the published figures.
EARLY = 1 / 12
COMPONENTS = {"attn": ("attention", BLUE, "o"), "ffn": ("FFN", VERMILLION, "s")}


# --- the figures ------------------------------------------------------------------------------------------------------


@styled
def accuracy(table: pl.DataFrame, title: str) -> Figure:
    """HIT@10 and MRR over steps, HIT@10 by relation category and, where the exposure is known, by its quarters.

    ``table`` is ``accuracy``, ``title`` names the series. Micro averages over prompts. Without exposure the first two
    panels show all prompts; with a single category the third shows the relations, with a single relation none.
    One checkpoint gives a list of all these groups, relations included, by both metrics.
    """
    table = trajectory(table, "accuracy").filter(pl.col("average") == "micro")
    overall, whole = table.filter(pl.col("scope") == "all"), table.filter(pl.col("subset") == "all")
    parts = _groups(overall, "subset", PARTS) or _groups(overall, "subset", {"all": "all prompts"})
    categories, relations = (
        _groups(rows, "name", {name: name for name in rows["name"].unique().sort()})
        for rows in (whole.filter(pl.col("scope") == scope) for scope in ("category", "relation"))
    )
    quarters = _groups(overall, "subset", QUARTERS)
    title = f"Knowledge of the facts (micro averages): {title}"
    if table["step"].n_unique() == 1:
        return _draw_list([parts, *(groups for groups in (categories, relations) if len(groups) > 1), quarters], title)
    panels = [_Panel("HIT@10", "hit@10", parts), _Panel("MRR", "mrr", parts)]
    if len(categories) > 1:
        panels.append(_Panel("HIT@10 by relation category, all prompts", "hit@10", categories))
    elif len(relations) > 1:
        panels.append(_Panel("HIT@10 by relation, all prompts", "hit@10", relations))
    if quarters:
        panels.append(_Panel("HIT@10 by exposure, seen templates", "hit@10", quarters, ordered=True))
    return _draw_panels(panels, title)


@styled
def layer_importance(table: pl.DataFrame, title: str) -> Figure:
    """Log-probability increase by attention and by FFN over steps, mean over layers.

    ``table`` is ``layer_importance``, ``title`` names the series.
    """
    table = trajectory(table, "layer_importance").filter(pl.col("aggregate") == "mean")
    curves = [
        Curve(label, table.filter(pl.col("component") == component), colour, marker)
        for component, (label, colour, marker) in COMPONENTS.items()
    ]
    single = table["step"].n_unique() == 1
    figure = Figure(figsize=(WIDTH, 1.4 if single else 3.3), layout="constrained")
    axes = figure.subplots()
    suptitle(figure, f"Mean layer importance: {title}", table)
    label = "log-probability increase of a layer (nats)"
    if single:
        points(axes, curves, label, places=range(len(curves)))
        axes.axvline(0, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    else:
        courses(axes, curves, label, wide=True)
        axes.axhline(0, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    return figure


@styled
def layer_profiles(table: pl.DataFrame, title: str) -> Figure:
    """Log-probability increase by layer: of an early and of the last checkpoint, the others faint behind them.

    ``table`` is ``layer_importance``, ``title`` names the series. The early checkpoint is the one nearest to a twelfth
    of the last step.
    """
    table = trajectory(table, "layer_importance").filter(pl.col("aggregate") == "layer")
    steps = table["step"].unique().sort().to_list()
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    panels = figure.subplots(1, len(COMPONENTS), sharey=True)
    suptitle(figure, f"Layer profiles: {title}", table)
    for axes, (component, (name, colour, marker)) in zip(panels, COMPONENTS.items(), strict=True):
        _profiles(axes, table.filter(pl.col("component") == component), steps, colour, marker)
        axes.set_title(name if name.isupper() else name.capitalize())
        axes.set_xlabel("layer (0 = next to the embedding)")
        axes.axhline(0, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    panels[0].set_ylabel("log-probability increase (nats)")
    return figure


@styled
def top_experts(table: pl.DataFrame, title: str) -> Figure:
    """The five experts with the largest mean log-probability increase of every relation, one panel a relation.

    ``table`` is ``top_experts``, ``title`` names the series. ``L3·E17`` is expert 17 of layer 3; the share of the
    relation's prompts that are routed to it stands on the right, the hollow diamond is its mean over all other prompts.
    """
    if table.is_empty():
        raise PlotError("top_experts is empty: no prompt was routed to any expert")
    groups = [
        (name, rows.sort("rank")) for (name,), rows in sorted(table.partition_by("relation", as_dict=True).items())
    ]
    columns = min(3, len(groups))
    lines = math.ceil(len(groups) / columns)
    names = [wrapped(name, 22) for name, _ in groups]
    extra = [max(name.count("\n") for name in names[i : i + columns]) for i in range(0, len(names), columns)]
    heights = [1.25 + 0.14 * n for n in extra]
    figure = Figure(figsize=(max(2, columns) / 3 * WIDTH, 1.1 + sum(heights)), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, height_ratios=heights)
    suptitle(figure, f"Top experts by relation: {title}", table, always=True)
    for name, (_, rows), axes in zip(names, groups, grid.flat, strict=False):
        _experts(axes, rows, name)
    for axes in grid.flat[len(groups) :]:
        axes.remove()
    for column in range(columns):
        last = (len(groups) - 1 - column) // columns
        grid[last, column].set_xlabel("log-probability increase (nats)")
    for line in range(lines):
        grid[line, 0].set_ylabel("layer · expert")
    inside = Line2D([], [], color=BLUE, marker="o", label="mean over the relation's prompts, 95% interval")
    outside = Line2D([], [], **ELSEWHERE, label="mean over all other prompts")
    routed = Line2D([], [], linestyle="", label="right: share of the relation's prompts that are routed to the expert")
    handles = [inside, routed] if table["elsewhere"].is_null().all() else [inside, outside, routed]
    figure.legend(handles=handles, loc="outside lower left", ncols=2 if columns > 2 else 1)
    return figure


# --- curves over steps, or points where there is one step -------------------------------------------------------------


Groups = Sequence[tuple[str, pl.DataFrame]]


@dataclass(frozen=True)
class _Panel:
    """One metric of several groups, each a label and its rows of ``accuracy``."""

    title: str
    metric: str
    groups: Groups
    ordered: bool = False

    def curves(self) -> list[Curve]:
        shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.85, len(self.groups)))
        colours = [matplotlib.colors.to_hex(shade) for shade in shades] if self.ordered else PALETTE
        curves = []
        for i, (name, rows) in enumerate(self.groups):
            rows = rows.filter(pl.col("metric") == self.metric)
            dash = DASHES[i // len(colours) % len(DASHES)]
            curves.append(Curve(_sized(name, rows), rows, colours[i % len(colours)], MARKERS[i % len(MARKERS)], dash))
        return curves


def _groups(table: pl.DataFrame, column: str, labels: Mapping[str, str]) -> list[tuple[str, pl.DataFrame]]:
    """(label, rows) of every value of the column that the table holds."""
    parts = table.partition_by(column, as_dict=True)
    return [(label, parts[(value,)]) for value, label in labels.items() if (value,) in parts]


def _sized(name: str, rows: pl.DataFrame) -> str:
    return f"{wrapped(name, 40)} (n = {rows['prompts'].max():,})"


def _draw_panels(panels: Sequence[_Panel], title: str) -> Figure:
    """Two panels a row; a last one that is left alone takes the whole row."""
    mosaic = [[i, i + 1 if i + 1 < len(panels) else i] for i in range(0, len(panels), 2)]
    heights = [2.3 + 0.1 * max(len(panels[i].groups) for i in line) for line in mosaic]
    figure = Figure(figsize=(WIDTH, 0.35 + sum(heights)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    grid = figure.subplot_mosaic(mosaic, height_ratios=heights)
    suptitle(figure, title, panels[0].groups[0][1])
    for i, panel in enumerate(panels):
        wide = mosaic[i // 2][0] == mosaic[i // 2][1]
        courses(grid[i], panel.curves(), QUANTITIES[panel.metric], limits=(-0.02, 1.02), wide=wide)
        grid[i].set_title(panel.title)
    return figure


def _draw_list(sections: Sequence[Groups], title: str) -> Figure:
    """All groups below one another, a gap between sections, one column a metric."""
    places, groups = [], []
    for number, section in enumerate(section for section in sections if section):
        places += [len(groups) + 0.8 * number + i for i in range(len(section))]
        groups += section
    labels = [_sized(name, rows) for name, rows in groups]
    pitch = 0.05 + 0.13 * max(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(WIDTH, 0.9 + pitch * (places[-1] + 1)), layout="constrained")
    suptitle(figure, title, groups[0][1])
    panels = figure.subplots(1, len(QUANTITIES), sharey=True)
    for axes, (metric, quantity) in zip(panels, QUANTITIES.items(), strict=True):
        chosen = [rows.filter(pl.col("metric") == metric) for _, rows in groups]
        curves = [Curve(label, rows, BLUE, "o") for label, rows in zip(labels, chosen, strict=True)]
        points(axes, curves, quantity, places, limits=(-0.02, 1.02))
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    panels[1].tick_params(axis="y", labelleft=False)
    return figure


# --- profiles and experts ---------------------------------------------------------------------------------------------


def _profiles(axes: Axes, table: pl.DataFrame, steps: Sequence[int | None], colour: str, marker: str) -> None:
    profiles = {step: rows.sort("layer") for (step,), rows in table.partition_by("step", as_dict=True).items()}
    last, early = steps[-1], _early(steps)
    others = [step for step in steps if step not in (last, early)]
    if others:
        lines = [profiles[step].select("layer", "value").to_numpy() for step in others]
        opacity = min(0.6, max(0.15, 1.5 / math.sqrt(len(others))))
        label = f"the other {len(others)} checkpoints" if len(others) > 1 else "the other checkpoint"
        axes.add_collection(LineCollection(lines, colors=GREY, linewidths=0.6, alpha=opacity, label=label, zorder=1))
    looks = [(last, "last", {"color": colour, "marker": marker})]
    if early is not None:
        looks.insert(
            0, (early, "early", {"color": BLACK, "marker": "o", "markerfacecolor": "white", "linestyle": "--"})
        )
    layer = profiles[last]["layer"].to_numpy()
    for step, word, look in looks:
        rows = profiles[step]
        label = "one checkpoint" if len(steps) == 1 else f"step {step:,} ({word})"
        size = 3.6 if len(layer) <= 24 else 2.4
        axes.plot(layer, rows["value"].to_numpy(), label=label, markersize=size, zorder=3, **look)
        band(axes, layer, rows, look["color"])
    margin = max(0.02 * layer[-1], 0.05)
    axes.set_xlim(-margin, layer[-1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.yaxis.set_major_formatter(plain)
    if len(steps) > 1:
        legend(axes, wide=False)


def _early(steps: Sequence[int | None]) -> int | None:
    """The step nearest to a twelfth of the last on a log scale, None where there is but one; step 0 only if need be."""
    if len(steps) == 1:
        return None
    return min(steps[:-1], key=lambda step: abs(math.log(step / (EARLY * steps[-1]))) if step else math.inf)


def _experts(axes: Axes, rows: pl.DataFrame, title: str) -> None:
    places = range(len(rows))
    axes.axvline(0, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    axes.hlines(places, rows["low"], rows["high"], color=BLUE, linewidth=1.4)
    axes.plot(rows["value"], places, color=BLUE, marker="o", linestyle="", markersize=4)
    axes.plot(rows["elsewhere"].to_numpy(), places, zorder=3, **ELSEWHERE)
    axes.set_yticks(places, [f"L{layer}·E{expert}" for layer, expert in rows.select("layer", "expert").iter_rows()])
    axes.set_ylim(max(len(rows), 2) - 0.5, -0.5)
    for place, share in enumerate(rows["routed"]):
        axes.annotate(
            f"{100 * share:.0f}%",
            (1.02, place),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=6.5,
            color="#555555",
        )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(plain)
    axes.set_title(title)


# --- courses and names ------------------------------------------------------------------------------------------------


def courses(
    axes: Axes,
    curves: Sequence[Curve],
    label: str,
    limits: tuple[float, float] | None = None,
    wide: bool = False,
    axis: str = "log",
) -> None:
    """Value over steps (or tokens, as ``axis`` says) with its band, and the legend below."""
    draw_curves(axes, curves, axis)
    course_axis(axes, curves, axis, wide)
    axes.set_ylabel(label)
    if limits:
        axes.set_ylim(limits)
        axes.yaxis.set_major_locator(MultipleLocator(0.2))
    legend(axes, wide)


def legend(axes: Axes, wide: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), (110 if wide else 54) // (longest + 8)))
    # below the axis label, where nothing of the data is covered; constrained layout keeps the room
    below = axes.transAxes + ScaledTranslation(0, -0.42, axes.get_figure().dpi_scale_trans)
    place = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": below, "borderaxespad": 0, "borderpad": 0}
    legend = axes.legend(handles, labels, ncols=columns, **place)
    for handle in legend.legend_handles:
        handle.set_alpha(1)  # faint lines must be found in the legend


def trajectory(table: pl.DataFrame, name: str) -> pl.DataFrame:
    if table.is_empty():
        raise PlotError(f"{name} is empty: there is no checkpoint to draw")
    return table if table["step"].is_null().all() else table.filter(pl.col("step").is_not_null())


def wrapped(name: str, width: int) -> str:
    """A name in lines of at most ``width`` characters, its underscores read as spaces."""
    return textwrap.fill(name.replace("_", " "), width, break_long_words=True)
