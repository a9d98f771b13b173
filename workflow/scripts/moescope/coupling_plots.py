"""Which heads go with which experts, and what a head does to its expert: result tables in, a matplotlib Figure out.

``H3.1 > E5.17`` is head 1 of layer 3 and expert 17 of layer 5. One function per figure; nothing is computed here but
what is drawn where. Of a series of several checkpoints the last is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moescope.drawing import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    WIDTH,
    PlotError,
    headline,
    shared_legend,
    styled,
    suptitle,
)
from moescope.marks import DASHED, DOTTED, Mark, chance, last, lines_of, spots, stripes

PAIR = ("head_layer", "head", "layer", "expert")
#: Pairs of a relation that are drawn.
LEADING = 3
POSITIVE, NEGATIVE = Mark("r where found, above 0", VERMILLION, hollow=True), Mark("below 0", BLUE, "v", hollow=True)
TESTED = Mark("r on the other fold (below 0: the other sign)", BLACK, "D", size=3.2)
NOT_FORCED = Mark("the pair, its expert not forced", ORANGE, "D", hollow=True, size=3.2)
_SIDES = {"+": ">", "-": "<"}
#: Quantities of ``causality``: panel, what it is, and where nothing has happened.
EFFECTS = {
    "gate_drop": ("Later gates", "drop of the clean\ntop K, no head", 0.0),
    "expert_gate_drop": ("Expert's gate", "drop of its\nprobability, no head", 0.0),
    "mrr_drop": ("MRR", "relative drop,\nno head", 0.0),
    "forced_mrr": ("Expert forced", "MRR / clean MRR,\nno head", 1.0),
    "gradient_share": ("Gradient", "head's share of\nits layer", None),
}


@styled
def association(table: pl.DataFrame, title: str) -> Figure:
    """The strongest pairs of a head and an expert against the largest |r| of as many unrelated pairs.

    ``table`` is ``associations`` of one checkpoint, ``title`` names the series. Left all relations together: found on
    all prompts, and found without a fold and tested on it; right the three strongest of the leading pairs of every
    relation. Raises PlotError where no pair was found.
    """
    if table.is_empty():
        raise PlotError(f"association of {title}: no head varies together with an expert; add facts to the relations")
    table = table.with_columns(size=pl.col("r").abs()).sort("size", *PAIR, descending=[True, *[False] * len(PAIR)])
    together, by_relation = (table.filter(pl.col("relation").is_null() == whole) for whole in (True, False))
    folds = together["fold"].unique().sort(nulls_last=False).to_list()
    groups = [together.filter(pl.col("fold").eq_missing(fold)) for fold in folds]
    relations = by_relation["relation"].unique().sort().to_list()
    left = sum(len(rows) + 2.5 for rows in groups)
    right = sum(1 + min(LEADING, len(by_relation.filter(relation=name))) for name in relations)
    figure = Figure(figsize=(WIDTH, 1.6 + 0.13 * max(left, right, 9)), layout="constrained")
    headline(figure, f"Heads and experts that go together: {title}")
    columns = iter(np.atleast_1d(figure.subfigures(1, bool(groups) + bool(relations))))
    panels = []
    if groups:
        heights = [len(rows) for rows in groups]
        panels += next(columns).subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights).flat
        for axes, rows in zip(panels, groups, strict=True):
            _strongest(axes, rows)
        turned = (together["r_tested"] * together["r"].sign()).min() or 0.0
        panels[-1].set(xlabel="|r|", xlim=(min(0.0, turned) - 0.04, 1.02))
    if relations:
        panels.append(next(columns).subplots())
        _by_relation(panels[-1], by_relation, relations)
    searched = {"left": together["pairs"].max(), "right": by_relation["pairs"].max()}
    told = ", ".join(f"{side} of {number:,}" for side, number in searched.items() if number)
    shared_legend(figure, panels, f"The largest |r| of a search, by chance: {told} pairs.")
    return figure


def _strongest(axes: Axes, rows: pl.DataFrame) -> None:
    """The pairs that were found on the same prompts, and r on the other fold where they were tested there."""
    places, fold = np.arange(len(rows)), rows["fold"][0]
    _sizes(axes, rows, places)
    # the sign of where it was found, so that a pair that turned round stands below 0
    tested = rows.select(value=pl.col("r_tested") * pl.col("r").sign())
    spots(axes, tested, places, TESTED)
    _null(axes, rows, -0.6, len(rows) - 0.4)
    lines_of(axes, [pair_name(row) for row in rows.select(PAIR).iter_rows()], places)
    number = rows["prompts"][0]
    axes.set_title(f"Found on all {number:,} prompts" if fold is None else f"Found outside fold {fold} ({number:,})")
    axes.axvline(0, color=GREY, linewidth=0.7, zorder=0)


def _by_relation(axes: Axes, table: pl.DataFrame, relations: Sequence[str]) -> None:
    """The strongest of each relation below its name."""
    labels, headings = [], []
    for name in relations:
        rows = table.filter(relation=name).head(LEADING)
        headings.append(len(labels))
        labels.append(textwrap.shorten(name.replace("_", " "), 30, placeholder="…"))
        places = np.arange(len(rows)) + len(labels)
        _sizes(axes, rows, places)
        _null(axes, rows, places[0] - 0.5, places[-1] + 0.5)
        labels += [pair_name(row) for row in rows.select(PAIR).iter_rows()]
    lines_of(axes, labels, np.arange(len(labels)))
    for place in headings:
        axes.get_yticklabels()[place].set_fontweight("bold")
    axes.set(title="Leading pairs by relation", xlabel="|r|", xlim=(-0.02, 1.02))


def _sizes(axes: Axes, rows: pl.DataFrame, places: np.ndarray) -> None:
    """|r| where the pair was found."""
    for mark, chosen in ((POSITIVE, rows["r"] >= 0), (NEGATIVE, rows["r"] < 0)):
        spots(axes, rows.filter(chosen).select(value="size"), places[chosen.to_numpy()], mark)


def _null(axes: Axes, rows: pl.DataFrame, top: float, bottom: float) -> None:
    """Median and 95% quantile of the largest |r| of as many unrelated pairs, the same for all these rows."""
    for quantile, told, dash in (("null_median", "median", DOTTED), ("null_95", "95%", DASHED)):
        label = f"{told} of the largest |r| of unrelated pairs"
        axes.vlines(rows[quantile][0], top, bottom, color=GREY, linestyle=dash, linewidth=1.0, label=label, zorder=1)


@styled
def causality(table: pl.DataFrame, title: str) -> Figure:
    """What the head of each pair does to its expert, and the expert without its head, beside the control of the pair.

    ``table`` is ``causality``, ``title`` names the series. On top all pairs together, and those of each sign of r where
    there are both; a dotted line where nothing has happened. Raises PlotError where no pair was interfered with.
    """
    none = "no pair was interfered with; find some (collaboration.strongest) or name some (collaboration.pairs)"
    table = last(table, "causality", title, none).filter(pl.col("gate_layer").is_null())
    signs = table["sign"].drop_nulls().unique()
    if len(signs) < 2:  # the pairs of one sign are all pairs
        table = table.filter(pl.col("head").is_not_null() | pl.col("sign").is_null())
    shown = [name for name in EFFECTS if table.filter(quantity=name)["value"].is_not_null().any()]
    if not shown:
        raise PlotError(f"causality of {title}: nothing has a value; ask facts that the model knows")
    key = [*PAIR, "fold", "sign"]
    table = table.sort(key, nulls_last=False)
    pairs = table.select(key).unique(maintain_order=True).rows()
    labels = [pair_name(pair, sign) + ("" if fold is None else f" · {fold}") for *pair, fold, sign in pairs]
    figure = Figure(figsize=(WIDTH, 1.8 + max(0.8, 0.22 * len(pairs))), layout="constrained")
    suptitle(figure, f"What a head does to its expert: {title}", table)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        rows, (heading, quantity, nothing) = table.filter(quantity=name), EFFECTS[name]
        places = np.array([pairs.index(pair) for pair in rows.select(key).iter_rows()])
        stripes(axes, len(pairs))
        spots(axes, rows, places - 0.17, Mark("the pair", VERMILLION))
        if name == "gradient_share":
            chance(axes, rows["control_value"], places, 0.4, "chance (1 / heads of the layer)")
        else:
            spots(axes, rows, places + 0.17, Mark("control", BLUE, "s", size=3.2), of="control_")
        if name == "forced_mrr":
            suppressed = rows.join(
                table.filter(quantity="mrr_drop"),
                on=key,
                nulls_equal=True,
                how="left",
                maintain_order="left",
            )
            spots(axes, suppressed.select(value=1 - pl.col("value_right")), places - 0.17, NOT_FORCED)
        if nothing is not None:
            axes.axvline(nothing, color=GREY, linewidth=0.8, linestyle=DOTTED, zorder=0)
        lines_of(axes, labels, range(len(labels)))
        axes.set(title=heading, xlabel=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    for label, pair in zip(panels[0].get_yticklabels(), pairs, strict=True):
        label.set_fontweight("bold" if pair[0] is None else "normal")
    notes = ["· 0, · 1: tested on this fold of subjects, found on the other."] * table["fold"].is_not_null().any()
    if "-" in signs:
        notes.append("(-): r < 0, the head should turn its expert down; of all pairs, its gate in the direction of r.")
    shared_legend(figure, panels, "\n".join(notes))
    return figure


def pair_name(pair: Sequence[int | None], sign: str | None = None) -> str:
    """H3.1 > E5.17 of (head_layer, head, layer, expert), marked where its r is negative; nulls stand for all pairs, or
    those of a sign."""
    if pair[0] is None:
        return "all pairs" if sign is None else f"r {_SIDES[sign]} 0"
    head_layer, head, layer, expert = pair
    return f"H{head_layer}.{head} > E{layer}.{expert}" + " (-)" * (sign == "-")
