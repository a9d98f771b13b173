"""Shared and routed experts, series by series and beside each other: result tables in, a matplotlib Figure out.

One function per figure; nothing is computed here but what is drawn where. Averages are micro (over prompts); macro
averages stand in the tables. Of a series of several checkpoints the last is drawn. Chance and controls stand beside
what they are the chance and the controls of; what is not available is left out, also of the legend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from moescope.drawing import (
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    WIDTH,
    PlotError,
    band,
    headline,
    plain,
    reference,
    shared_legend,
    styled,
    suptitle,
)
from moescope.marks import DOTTED, Mark, apart, cells, folded, ink, last, lines_of, series_mark, spots, stripes, words

METRICS = {"hit@10": "HIT@10", "mrr": "MRR"}
#: Quantities of ``efficiency``: panel and axis.
EFFICIENCY = {
    "hit@10": ("HIT@10", "share of prompts"),
    "mrr": ("MRR", "mean of 1/rank"),
    "peak_depth": ("Peak of the FFN gain", "layer / number of layers"),
    "ffn_gain": ("FFN gain", "nats, all layers"),
    "attn_gain": ("Attention gain", "nats, all layers"),
    "ffn_share": ("FFN share of the gain", "FFN / (FFN + attention)"),
    "layer_efficiency": ("Layer efficiency", "FFN gain / number of layers (nats)"),
    "gain_per_active_parameter": ("Per active parameter", "FFN gain (nats) / million"),
}
STAGES = ("early", "mid", "late")
#: Rows of ``relation_accuracy`` that are means: over prompts and over relations.
MEANS = {"all": "all prompts", "macro": "mean over relations"}
MODES = {
    "top_n": ("The n largest slots", "n, slots that are left"),
    "only_rank": ("One slot alone", "n, rank of the slot that is left"),
    "drop_rank": ("All but one slot", "n, rank of the slot that is dropped"),
}
SEMANTICS = ("reroute", "reroute_logit", "zero_weight", "min_logit")
UNKNOWN = "\N{EN DASH}"


# --- series beside each other -----------------------------------------------------------------------------------------


@styled
def efficiency(table: pl.DataFrame, title: str) -> Figure:
    """What the layers of every series add, where most, and how much of it by layer and by parameter.

    ``table`` is ``efficiency`` with one step a series, ``title`` says which series. One panel a quantity, one line a
    series; published values are open diamonds below their own. Raises PlotError where no quantity has a value.
    """
    shown = [name for name in EFFICIENCY if table.filter(quantity=name)["value"].is_not_null().any()]
    if not shown:
        raise PlotError(f"efficiency of {title}: no quantity has a value; score a checkpoint of a series first")
    series = table["series"].unique().sort().to_list()
    labels = [folded(name, 20) for name in series]
    lines = math.ceil(len(shown) / 3)
    pitch = 0.14 + 0.12 * max(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(WIDTH, 0.8 + lines * (0.75 + max(0.6, pitch * len(series)))), layout="constrained")
    headline(figure, f"What layers add, and where: {title}")
    grid = figure.subplots(lines, min(3, len(shown)), squeeze=False, sharey=True)
    ours, paper = Mark("here, 95% interval", VERMILLION), Mark("published", BLUE, "D", hollow=True)
    for axes, name in zip(grid.flat, shown, strict=False):
        rows = pl.DataFrame({"series": series}).join(table.filter(quantity=name), on="series", how="left")
        places = np.arange(len(series))
        spots(axes, rows, places, ours)
        spots(axes, rows.select(value="published"), places + 0.25, paper)
        lines_of(axes, labels, places)
        axes.set_title(EFFICIENCY[name][0])
        axes.set_xlabel(EFFICIENCY[name][1])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    shared_legend(figure, grid.flat[: len(shown)])
    return figure


@styled
def gain_curves(tables: Mapping[str, pl.DataFrame], title: str) -> Figure:
    """FFN gain along the relative depth of every series: by layer, as a share of the total up to there, and by stage.

    ``tables`` are ``gains`` by name of series, ``title`` says which series. The relative depth of a layer is its number
    from 1 by the number of layers. Bars behind the stage shares stand at the stage's share of the layers. Raises
    PlotError where there is no gain.
    """
    gains = {name: last(tables[name], "gain curves", name).filter(component="ffn") for name in sorted(tables)}
    if not gains or any(rows.filter(quantity="layer").is_empty() for rows in gains.values()):
        raise PlotError(f"gain curves of {title}: a series has no FFN gain; score a checkpoint of it first")
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    headline(figure, f"Where along the depth the FFN gains: {title}")
    panels = figure.subplot_mosaic([["layer", "share"], ["stage", "stage"]], height_ratios=[1.25, 1])
    for number, (name, rows) in enumerate(gains.items()):
        mark = series_mark(name, number)
        for quantity in ("layer", "share"):
            _along_depth(panels[quantity], rows.filter(quantity=quantity).sort("layer"), mark)
        _stage_shares(panels["stage"], rows, mark, number, len(gains))
    for quantity in ("layer", "share"):
        panels[quantity].set_xlim(0, 1.02)
        panels[quantity].set_xlabel("relative depth ((layer + 1) / number of layers)")
    panels["layer"].set(title="Gain of a layer", ylabel="FFN gain (nats)")
    panels["share"].set(title="Gain up to a layer", ylabel="share of the total FFN gain")
    reference(panels["layer"], 0)
    panels["share"].plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=DOTTED, label="the same in all layers")
    panels["stage"].set(title="Gain of a stage", ylabel="share of the total FFN gain", xlim=(-0.5, len(STAGES) - 0.5))
    panels["stage"].set_xticks(range(len(STAGES)), STAGES)
    reference(panels["stage"], 0)
    for axes in panels.values():
        axes.yaxis.set_major_formatter(plain)
    shared_legend(figure, panels.values())
    return figure


def _along_depth(axes: Axes, rows: pl.DataFrame, mark: Mark) -> None:
    """One curve over the relative depth with its band; a value that is null breaks it."""
    depth = (rows["layer"].to_numpy() + 1) / len(rows)
    axes.plot(depth, rows["value"].to_numpy(), color=mark.colour, marker=mark.marker, markersize=2.6, label=mark.label)
    band(axes, depth, rows, mark.colour, 0.12)


def _stage_shares(axes: Axes, rows: pl.DataFrame, mark: Mark, number: int, of: int) -> None:
    """The share of each stage, series side by side, and the share of the layers that the stage holds."""
    quantities = (
        rows.filter(quantity=name).select("stage", "value") for name in ("stage_gain", "stage_gain_per_layer")
    )
    gain, per_layer = (dict(pairs.iter_rows()) for pairs in quantities)
    layers = rows.filter(quantity="layer")["layer"].n_unique()
    shares = rows.filter(quantity="stage_share")
    places = np.array([STAGES.index(stage) for stage in shares["stage"]]) + apart(number, of, 0.7)
    for place, stage in zip(places, shares["stage"], strict=True):
        if gain[stage]:
            uniform, width = gain[stage] / per_layer[stage] / layers, 0.3 / of
            axes.hlines(uniform, place - width, place + width, color=GREY, linestyle=DOTTED, linewidth=1.2)
    spots(axes, shares, places, mark, upright=True)


@styled
def relation_accuracy(table: pl.DataFrame, title: str) -> Figure:
    """HIT@10 and MRR of every series by relation, the relation that is known best first.

    ``table`` is ``relation_accuracy`` with one step a series, ``title`` says which series. Means over prompts and over
    relations stand on top. Raises PlotError where there is no relation.
    """
    ranked = (
        table.filter(~pl.col("relation").is_in(list(MEANS)), metric="hit@10")
        .group_by("relation")
        .agg(pl.col("value").mean(), pl.col("prompts").max())
        .sort("value", "relation", descending=[True, False], nulls_last=True)
    )
    if ranked.is_empty():
        raise PlotError(f"accuracy by relation of {title}: there is no relation; score a checkpoint of a series first")
    names = [*(name for name in MEANS if name in table["relation"]), *ranked["relation"]]
    sizes = dict(ranked.select("relation", "prompts").iter_rows())
    labels = [MEANS.get(name) or f"{words(name, 24)} (n = {sizes[name]:,})" for name in names]
    series = table["series"].unique().sort().to_list()
    pitch = max(0.1 + 0.085 * len(series), 0.08 + 0.12 * max(label.count("\n") + 1 for label in labels))
    figure = Figure(figsize=(WIDTH, 1.1 + 0.12 * len(series) + max(1.0, pitch * len(names))), layout="constrained")
    headline(figure, f"Knowledge of the facts by relation: {title}")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (metric, name) in zip(panels, METRICS.items(), strict=True):
        stripes(axes, len(names))
        for number, one in enumerate(series):
            rows = table.filter(series=one, metric=metric)
            places = [names.index(relation) + apart(number, len(series), 0.75) for relation in rows["relation"]]
            spots(axes, rows, np.array(places), replace(series_mark(one, number), size=3.2))
        lines_of(axes, labels, range(len(names)))
        axes.set(title=name, xlabel={"hit@10": "share of prompts", "mrr": "mean of 1/rank"}[metric], xlim=(-0.02, 1.02))
        axes.xaxis.set_major_locator(MultipleLocator(0.2))
    shared_legend(figure, panels)
    return figure


# --- what a series does with fewer experts ----------------------------------------------------------------------------


@styled
def budget(table: pl.DataFrame, title: str) -> Figure:
    """HIT@10 and MRR with some of the routing slots of every layer, with and without the shared expert.

    ``table`` is ``budgets``, ``title`` names the series. Dashed and hollow: the weights of the clean run, where they
    give anything else than those of the family's rule. Raises PlotError where no budget was run.
    """
    none = "no slots were left out; name some in collaboration.budgets"
    table = last(table, "routing budget", title, none).filter(scope="all", average="micro")
    shown = [mode for mode in MODES if mode in table["mode"]]
    figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
    suptitle(figure, f"Fewer routing slots: {title}", table)
    grid = figure.subplots(len(METRICS), len(shown), squeeze=False, sharex="col", sharey="row")
    for line, (metric, name) in zip(grid, METRICS.items(), strict=True):
        of_metric = table.filter(metric=metric)
        for axes, mode in zip(line, shown, strict=True):
            _budgets(axes, of_metric.filter(mode=mode))
            reference(axes, _clean(of_metric), "clean")
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(plain)
        line[0].set_ylabel(name)
    for axes, mode in zip(grid[0], shown, strict=True):
        axes.set_title(MODES[mode][0])
    for axes, mode in zip(grid[-1], shown, strict=True):
        axes.set_xlabel(MODES[mode][1])
        sizes = table.filter(mode=mode)["size"].unique().sort()
        axes.set_xticks(sizes[:: math.ceil(len(sizes) / 9)])
        axes.set_xlim(sizes[0] - 0.5, sizes[-1] + 0.5)
    shared_legend(figure, grid.flat)
    return figure


def _budgets(axes: Axes, rows: pl.DataFrame) -> None:
    """One curve with and one without the shared expert, and the same with clean weights where it is another."""
    both = rows["shared"].n_unique() > 1
    for shared, colour, marker in ((True, VERMILLION, "o"), (False, BLUE, "s")):
        of_shared = rows.filter(shared=shared).sort("size")
        family, keep = (of_shared.filter(weights=weights) for weights in ("family", "keep"))
        told = ("with the shared expert" if shared else "without it") if both else "routed experts"
        _budget_curve(axes, family, Mark(told, colour, marker), "-", -0.06 if shared else 0.06)
        if not _agree(family, keep):
            clean = Mark(f"{told}, weights of the clean run", colour, marker, hollow=True)
            _budget_curve(axes, keep, clean, "--", -0.14 if shared else 0.14)


def _budget_curve(axes: Axes, rows: pl.DataFrame, mark: Mark, dash: str, aside: float) -> None:
    """One value a size with its interval, a little aside, so that no bar hides another."""
    places = rows["size"].to_numpy() + aside
    axes.plot(places, rows["value"].to_numpy(), color=mark.colour, linestyle=dash, linewidth=0.9, zorder=2)
    spots(axes, rows, places, mark, upright=True)


def _agree(family: pl.DataFrame, keep: pl.DataFrame) -> bool:
    """Whether the clean weights were not tried, or give what those of the family's rule give."""
    both = family.join(keep, on="size", how="right", suffix="_keep")
    return both.filter(pl.col("value").is_null() | ((pl.col("value") - pl.col("value_keep")).abs() > 1e-9)).is_empty()


def _clean(rows: pl.DataFrame) -> float:
    """The clean value, from the value and the drop of any budget that have one; NaN where none has."""
    known = rows.drop_nulls(["value", "drop_value"]).filter(pl.col("drop_value") < 1)
    return float((known["value"] / (1 - known["drop_value"])).median()) if len(known) else math.nan


@styled
def blocking(table: pl.DataFrame, title: str) -> Figure:
    """What is lost of the MRR when the leading experts of a relation are blocked: by relation, and beside the controls.

    ``table`` is ``blocking``, ``title`` names the series. Above every relation under every semantics and size; a dot
    marks a loss that differs from that of the matched control. Below, over all prompts, the selection in-sample and
    cross-fitted with both controls. Raises PlotError where nothing was blocked, or no loss is available.
    """
    table = last(table, "expert blocking", title).filter(metric="mrr", average="micro")
    selection = table.filter(control="none").drop_nulls("value")
    if selection.is_empty():
        cure = "run the interventions on experts, on a checkpoint that knows more than a tenth of the facts"
        raise PlotError(f"expert blocking of {title}: no loss is available; {cure}")
    semantics = [name for name in SEMANTICS if name in selection["semantics"]]
    sizes = selection["size"].unique().sort().to_list()
    of_relation = table.filter(scope="relation", control="none")
    relations = of_relation["name"].unique().sort().to_list()
    heights = [0.75 + max(0.9, 0.23 * len(relations))] * bool(relations) + [2.6]
    figure = Figure(figsize=(WIDTH, 0.4 + sum(heights)), layout="constrained")
    suptitle(figure, f"Blocking the leading experts of a relation: {title}", last(table, "expert blocking", title))
    parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
    if relations:
        _blocked_relations(parts[0].subplots(), table.filter(scope="relation"), relations, semantics, sizes)
    panels = parts[-1].subplots(1, len(semantics), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, semantics, strict=True):
        _blocked_sizes(axes, table.filter(scope="all", semantics=name), sizes)
        axes.set_title(name)
        axes.set_xlabel("experts blocked")
    panels[0].set_ylabel("relative drop of MRR")
    shared_legend(parts[-1], panels)
    return figure


def _blocked_relations(
    axes: Axes, table: pl.DataFrame, relations: Sequence[str], semantics: Sequence[str], sizes: Sequence[int]
) -> None:
    """A cell for every relation, semantics and size; a dot where the matched control leaves something to explain."""
    columns = [(name, size) for name in semantics for size in sizes]
    drops = np.full((len(relations), len(columns)), np.nan)
    selection, matched = (
        _fitted(table.filter(pl.col("semantics").is_in(semantics), control=control)) for control in ("none", "matched")
    )

    def place(row: Mapping) -> tuple[int, int]:
        return relations.index(row["name"]), columns.index((row["semantics"], row["size"]))

    for row in selection.drop_nulls("value").iter_rows(named=True):
        drops[place(row)] = row["value"]
    beyond = map(place, matched.filter(pl.col("excess_low") * pl.col("excess_high") > 0).iter_rows(named=True))
    limit = float(np.nan_to_num(np.abs(drops)).max()) or 1.0
    said = np.array([[_hundredths(drop) for drop in line] for line in drops])
    image = cells(axes, drops, said, "RdBu_r", (-limit, limit))
    for i, j in beyond:
        axes.plot([j + 0.38], [i - 0.32], color=ink(image, drops[i, j]), marker="o", markersize=2.4, linestyle="")
    axes.set_yticks(range(len(relations)), [words(name, 30) for name in relations])
    axes.set_xticks(range(len(columns)), [size for _, size in columns])
    middle = [(i + 0.5) * len(sizes) - 0.5 for i in range(len(semantics))]
    axes.xaxis.remove_overlapping_locs = False  # the middle one stands over a size
    axes.set_xticks(middle, semantics, minor=True)
    axes.tick_params(axis="x", which="minor", length=0, pad=14)
    for edge in range(len(sizes), len(columns), len(sizes)):
        axes.axvline(edge - 0.5, color="white", linewidth=3)
    how = "cross-fitted" if selection["crossfit"].any() else "in-sample (optimistic)"
    told = "; dot: other than the matched control" if matched["excess_low"].is_not_null().any() else ""
    axes.set_title(f"Relative drop of MRR, {how}{told}")
    bar = axes.get_figure().colorbar(image, ax=axes, pad=0.01, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(plain)


def _fitted(rows: pl.DataFrame) -> pl.DataFrame:
    """The cross-fitted ones, where there are any."""
    return rows.filter(crossfit=bool(rows["crossfit"].any()))


def _hundredths(value: float) -> str:
    return UNKNOWN if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")


def _blocked_sizes(axes: Axes, table: pl.DataFrame, sizes: Sequence[int]) -> None:
    """The selection and its controls by number of experts, side by side."""
    conditions = [
        (table.filter(control="none", crossfit=False), Mark("in-sample (optimistic)", ORANGE, hollow=True)),
        (table.filter(control="none", crossfit=True), Mark("cross-fitted", VERMILLION)),
        (_fitted(table.filter(control="matched")), Mark("matched control", BLUE, "s")),
        (_fitted(table.filter(control="random")), Mark("random control", GREY, "^")),
    ]
    for number, (rows, mark) in enumerate(conditions):
        places = [sizes.index(size) + apart(number, len(conditions), 0.6) for size in rows["size"]]
        spots(axes, rows, np.array(places), mark, upright=True)
    reference(axes, 0)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.yaxis.set_major_formatter(plain)
