"""Which experts and which neurons lead, whether rankings, prompts and relations agree on them, and what chance gives.

Result tables in, a matplotlib Figure out, one function per figure; nothing is computed here but what is drawn where. Of
a series of several checkpoints the last is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moescope.drawing import (
    BLACK,
    BLUE,
    GREEN,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    PlotError,
    plain,
    shared_legend,
    styled,
    suptitle,
)
from moescope.marks import DASHED, DOTTED, Mark, apart, cells, chance, last, lines_of, spots, stripes, words

METHODS = {
    "top_neuron_frequency": "frequency among top neurons",
    "top_neuron_count": "count of top neurons",
    "routing_frequency": "routing frequency",
    "mean_weight": "mean weight",
    "summed_lpi": "summed LPI",
}
#: Experts in the lists that are compared.
LISTED = 5
#: Kinds of FFN neurons; what is told of a kind has its colour.
KINDS = {"all": BLACK, "dense": BLUE, "routed": VERMILLION, "shared": GREEN}
CHANCES = {"chance_active": ("active neurons", DASHED), "chance_all": ("all neurons", DOTTED)}


# --- experts ----------------------------------------------------------------------------------------------------------


@styled
def expert_overlap(table: pl.DataFrame, title: str) -> Figure:
    """How many of the five leading experts of a relation two methods have in common, and each with the published list.

    ``table`` is ``expert_overlap``, ``title`` names the series. Left the mean over relations, right (where there is a
    published list) relation by relation; in brackets what chance gives if each layer keeps its number of members.
    Raises PlotError where there is nothing to compare.
    """
    if table.is_empty():
        raise PlotError(f"overlap of experts of {title}: there are no two lists; rank the experts by a second method")
    table = last(table, "overlap of experts", title)
    published = table.filter(other="published")
    methods = [name for name in METHODS if name in table["method"] or name in table["other"]]
    pairs = table.filter(pl.col("method").is_in(methods), pl.col("other").is_in(methods))
    relations = published["relation"].unique().sort().to_list()
    lines = max(len(methods) - 1 if len(pairs) else 0, len(relations))
    figure = Figure(figsize=(WIDTH, 1.5 + max(1.2, 0.34 * lines)), layout="constrained")
    suptitle(figure, f"Do the rankings agree on the leading experts? {title}", table)
    wanted = [bool(len(pairs)), bool(len(published))]
    panels = iter(figure.subplots(1, sum(wanted), squeeze=False)[0])
    if wanted[0]:
        _common_to_methods(next(panels), pairs, methods)
    if wanted[1]:
        _common_with_published(next(panels), published, relations, methods)
    numbered = ", ".join(f"{number} {METHODS[name]}" for number, name in enumerate(methods, start=1))
    anywhere = f"Among all experts chance gives {table['chance'].max():.2g} at most."
    shared_legend(figure, [], f"Experts in common (by chance, in the same layers). {anywhere}\nColumns: {numbered}.")
    return figure


def _common_to_methods(axes: Axes, pairs: pl.DataFrame, methods: Sequence[str]) -> None:
    """The lower triangle of all pairs of methods, mean over relations."""
    number = {name: i for i, name in enumerate(methods)}
    common = np.full((len(methods) - 1, len(methods) - 1), np.nan)
    said = np.full(common.shape, "", dtype=object)
    means = pairs.group_by("method", "other").agg(pl.col("common", "chance", "chance_given_layers").mean())
    for row in means.iter_rows(named=True):
        first, second = sorted((number[row["method"]], number[row["other"]]))
        common[second - 1, first] = row["common"]
        said[second - 1, first] = _in_common(row, "{:.1f}")
    cells(axes, common, said, "Blues", (0, LISTED))
    axes.set_yticks(
        range(len(methods) - 1), [f"{i} {words(METHODS[name], 16)}" for i, name in enumerate(methods[1:], start=2)]
    )
    axes.set_xticks(range(len(methods) - 1), range(1, len(methods)))
    axes.set_title("Two methods, mean over relations")


def _common_with_published(
    axes: Axes, published: pl.DataFrame, relations: Sequence[str], methods: Sequence[str]
) -> None:
    common = np.full((len(relations), len(methods)), np.nan)
    said = np.full(common.shape, "", dtype=object)
    for row in published.iter_rows(named=True):
        place = relations.index(row["relation"]), methods.index(row["method"])
        common[place], said[place] = row["common"], _in_common(row, "{}")
    cells(axes, common, said, "Blues", (0, LISTED))
    axes.set_yticks(range(len(relations)), [words(name, 24) for name in relations])
    axes.set_xticks(range(len(methods)), range(1, len(methods) + 1))
    axes.set_title("With the published list")


def _in_common(row: Mapping, form: str) -> str:
    return f"{form.format(row['common'])}\n({row['chance_given_layers']:.1f})"


# --- whose neurons lead -----------------------------------------------------------------------------------------------


@styled
def neuron_types(table: pl.DataFrame, title: str) -> Figure:
    """Of which kind the leading FFN neurons are, against the share of each kind among the active and among all neurons.

    ``table`` is ``neuron_types``, ``title`` names the series. Filled: ranked prompt by prompt, then averaged; hollow:
    ranked once by the mean. On the right every relation, for the shortest list. Raises PlotError where there is but one
    kind of neuron.
    """
    table = last(table, "kinds of neurons", title)
    kinds = [kind for kind in KINDS if kind in table["kind"]]
    if len(kinds) < 2:
        raise PlotError(f"kinds of neurons of {title}: all FFN neurons are of one kind; leave the series out")
    overall, by_relation = table.filter(scope="all"), table.filter(scope="relation", top=table["top"].min())
    relations = by_relation["name"].unique().sort().to_list()
    labels = [words(name, 24) for name in relations]
    pitch = 0.2 + 0.12 * max((label.count("\n") for label in labels), default=0)
    figure = Figure(figsize=(WIDTH, 1.5 + max(2.0, pitch * len(relations))), layout="constrained")
    suptitle(figure, f"Whose neurons lead: {title}", table)
    left, *right = figure.subplots(1, 1 + bool(relations), squeeze=False)[0]
    tops = overall["top"].unique().sort().to_list()
    for number, kind in enumerate(kinds):
        _shares_of(left, overall.filter(kind=kind), tops, kind, apart(number, len(kinds), 0.5))
    left.set_xticks(range(len(tops)), tops)
    left.set(title="All prompts", xlabel="leading neurons", ylabel="share of the kind", xlim=(-0.6, len(tops) - 0.4))
    left.set_ylim(-0.03, 1.03)
    left.yaxis.set_major_formatter(plain)
    for axes in right:
        stripes(axes, len(relations))
        for number, kind in enumerate(kinds):
            _shares_by(axes, by_relation.filter(kind=kind), relations, kind, apart(number, len(kinds), 0.5))
        lines_of(axes, labels, range(len(relations)))
        axes.set(title=f"By relation, {tops[0]} leading neurons", xlabel="share of the kind", xlim=(-0.03, 1.03))
    shared_legend(figure, [left])
    return figure


def _shares_of(axes: Axes, rows: pl.DataFrame, tops: Sequence[int], kind: str, aside: float) -> None:
    """The share of a kind by length of the list, upright, and what chance gives."""
    for ranking, hollow in (("per_prompt", False), ("aggregate", True)):
        of_ranking = rows.filter(ranking=ranking)
        places = [tops.index(top) + aside + (0.1 if hollow else -0.1) for top in of_ranking["top"]]
        spots(axes, of_ranking, np.array(places), _kind_mark(kind, hollow), upright=True)
    for column, (told, dash) in CHANCES.items():
        look = {"color": KINDS[kind], "linestyle": dash, "linewidth": 0.9, "zorder": 0}
        axes.axhline(rows[column].drop_nulls()[0], label=f"{kind}: share among {told}", **look)


def _shares_by(axes: Axes, rows: pl.DataFrame, relations: Sequence[str], kind: str, aside: float) -> None:
    """The share of a kind relation by relation, and the share among the neurons that are active there."""
    for ranking, hollow in (("per_prompt", False), ("aggregate", True)):
        of_ranking = rows.filter(ranking=ranking)
        places = np.array([relations.index(name) + aside for name in of_ranking["name"]])
        spots(axes, of_ranking, places, replace(_kind_mark(kind, hollow), size=3.2))
        if not hollow:
            chance(axes, of_ranking["chance_active"], places, 0.22, "", KINDS[kind], DASHED)


def _kind_mark(kind: str, hollow: bool) -> Mark:
    how = "ranked by the mean" if hollow else "ranked by prompt"
    return Mark(f"{kind}, {how}", KINDS[kind], "s" if kind == "shared" else "o", hollow)


@styled
def neuron_overlap(table: pl.DataFrame, title: str) -> Figure:
    """How far prompts, and relations, share their leading FFN neurons: the Jaccard overlap, beside that of random sets.

    ``table`` is ``neuron_overlap``, ``title`` names the series. One panel for all neurons and one for each kind. Raises
    PlotError where no two prompts or relations can be compared.
    """
    table = last(table, "overlap of neurons", title).drop_nulls("value")
    kinds = [kind for kind in KINDS if kind in table["kind"]]
    if not kinds:
        raise PlotError(f"overlap of neurons of {title}: there is one prompt only; add facts to the relations")
    relations = pl.concat([table["relation"], table["other"]]).drop_nulls().unique().sort().to_list()
    labels = {name: words(name, 24) for name in relations}
    if "strangers" in table["comparison"]:
        labels = {None: "two prompts of\ndifferent relations"} | labels
    pitch = 0.16 + 0.12 * max(1, *(label.count("\n") for label in labels.values()))
    figure = Figure(figsize=(WIDTH, 1.7 + max(0.8, pitch * len(labels))), layout="constrained")
    suptitle(figure, f"Do prompts and relations share their leading neurons? {title}", table)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        stripes(axes, len(labels))
        _overlaps(axes, table.filter(kind=kind), list(labels))
        lines_of(axes, list(labels.values()), range(len(labels)))
        axes.set(title=f"{kind.capitalize()} neurons", xlabel="Jaccard overlap")
        axes.set_xlim(min(0.0, axes.get_xlim()[0]), None)
    shared_legend(figure, panels)
    return figure


def _overlaps(axes: Axes, rows: pl.DataFrame, lines: Sequence[str | None]) -> None:
    """Strangers in the first line; then the relations, each with its own prompts and with every other relation."""
    strangers, samples = rows.filter(comparison="strangers"), rows.filter(comparison="samples")
    pairs = rows.filter(comparison="relations").drop("low", "high")
    pairs = pl.concat([pairs, pairs.rename({"relation": "other", "other": "relation"}).select(pairs.columns)])
    for part, mark, tick in (
        (pairs, Mark("the relation and another one", BLUE, "s", hollow=True, size=2.6), "chance of two relations"),
        (strangers, Mark("two prompts of different relations", PURPLE, "D"), "chance of two prompts"),
        (samples, Mark("two prompts of the relation", VERMILLION), "chance of two prompts"),
    ):
        places = np.array([lines.index(name) for name in part["relation"]])
        spots(axes, part, places, mark)
        chance(axes, part["chance"], places, 0.3, tick, SKY if part is pairs else BLACK)
