"""The figures of study ``dynamics``, one function per figure: result tables in, a matplotlib Figure out.

Nothing is computed here but what is drawn where. ``axis`` says what courses run over: ``log`` (steps, log scale),
``step`` or ``tokens``. Averages are micro (over prompts); macro averages stand in the tables. A curve whose table rows
are missing or null (no group tables, no routing) is left out, also of the legend; a value that is not available breaks
its curve. Figures that need two checkpoints raise PlotError where there is one.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from moescope.drawing import (
    BLACK,
    BLUE,
    DASHES,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    Curve,
    PlotError,
    course_axis,
    course_places,
    draw_curves,
    plain,
    points,
    shared_legend,
    short,
    styled,
    suptitle,
)

COMPONENTS = {"ffn": "FFN", "attn": "Attention"}
#: The Jaccard overlap of two random sets of 1% each, and what a random 1% holds of any total.
RANDOM_JACCARD, UNIFORM_SHARE = 0.01 / 1.99, 0.01
THRESHOLDS = ("0.9", "0.95", "0.99")
READINGS = {
    "gain_share": ("ranked by gain, in the model", VERMILLION, "o"),
    "gain_share_layer": ("ranked by gain, in each layer", ORANGE, "D"),
    "gain_share_by_importance": ("ranked by importance, in the model", BLUE, "s"),
    "gain_share_by_importance_layer": ("ranked by importance, in each layer", SKY, "^"),
}
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
CLAIMS = ("stability", "gain", "importance")
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
        "N4: the MoE's top 1% × its active share against the dense top 1%",
        ("matched", "all"),
        (
            ("J of the top set", "jaccard", (("stability", "N4"),)),
            ("R, share of the positive gain", "gain_share", (("gain", "N4"),)),
            ("share of the positive importance", "positive_share", (("importance", "N4"),)),
        ),
    ),
)


# --- neurons over training --------------------------------------------------------------------------------------------


@styled
def stability(table: pl.DataFrame, title: str, axis: str = "log") -> Figure:
    """Overlap J of the top 1% of neurons with the checkpoint before, between its noise ceiling and its nulls.

    ``table`` is ``neuron_dynamics``, ``title`` names the series.
    """
    _needs_two(table.filter(pl.col("metric") == "jaccard"), "stability", title)
    both = not _rows(table, "ffn", "jaccard_given_expert").is_empty()
    given = "layer × expert (attention: × head)" if both else "layer × head (attention)"
    looks = {
        "jaccard": ("J with the checkpoint before", VERMILLION, "o", "-"),
        "ceiling": ("noise ceiling (halves of the prompts)", BLACK, "", "--"),
        "cross_half": ("J across halves and checkpoints", BLUE, "", "-."),
        "jaccard_given_layer": ("N1: J expected given the layer", GREEN, "", ":"),
        "jaccard_given_expert": (f"N1: J expected given {given}", PURPLE, "", ":"),
    }
    figure, panels = _two_panels(f"Stability of the top 1% of neurons: {title}", 2.4)
    for axes, component in zip(panels, COMPONENTS, strict=True):
        curves = [Curve(look[0], _rows(table, component, m), *look[1:]) for m, look in looks.items()]
        _draw(axes, curves, axis, COMPONENTS[component])
        _reference(axes, RANDOM_JACCARD, f"random sets ({RANDOM_JACCARD:.3f})")
    panels[0].set_ylabel("Jaccard overlap J")
    _from_zero(panels[0])
    shared_legend(figure, panels)
    return figure


@styled
def concentration(table: pl.DataFrame, title: str, axis: str = "log") -> Figure:
    """How much of all positive gain, and of all positive importance, the top 1% of neurons hold.

    Above the default reading with its intervals, below all four readings of the positive-gain concentration R without.
    ``table`` is ``neuron_dynamics``, ``title`` names the series.
    """
    _needs_two(table.filter(pl.col("metric") == "gain_share"), "concentration", title)
    above = {
        "gain_share": ("R: share of the positive gain", VERMILLION, "o", "-"),
        "gain_share_crossfit": ("R, cross-fitted", VERMILLION, "", "--"),
        "positive_share": ("share of the positive importance", BLUE, "s", "-"),
    }
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    _title(figure, f"Concentration in the top 1% of neurons: {title}")
    upper, lower = figure.subfigures(2, 1)
    rows = [part.subplots(1, 2, sharey=True) for part in (upper, lower)]
    for component, first, second in zip(COMPONENTS, *rows, strict=True):
        whole = [Curve(look[0], _rows(table, component, m), *look[1:]) for m, look in above.items()]
        _draw(first, whole, axis, COMPONENTS[component])
        curves = _readings(table, component)
        _draw(second, curves, axis, f"{COMPONENTS[component]}: four readings of R")
        course_axis(second, whole, axis)
    for part, panels in zip((upper, lower), rows, strict=True):
        for axes in panels:
            _reference(axes, UNIFORM_SHARE, f"uniform ({UNIFORM_SHARE:g})" if part is upper else None)
        panels[0].set_ylabel("share held by the top 1%")
        _from_zero(panels[0])
        shared_legend(part, panels)
    return figure


def _readings(table: pl.DataFrame, component: str) -> list[Curve]:
    """The four readings of R, then the same cross-fitted; without intervals, which would hide one another."""
    return [
        _bare(Curve(f"{name}{told}", _rows(table, component, f"{metric}{part}"), colour, mark, dash, 1.1))
        for part, told, dash in (("", "", "-"), ("_crossfit", ", cross-fitted", "--"))
        for metric, (name, colour, mark) in READINGS.items()
    ]


@styled
def survival(table: pl.DataFrame, title: str) -> Figure:
    """Every checkpoint against every other: survival of the top 1% above the diagonal, Jaccard overlap below.

    ``table`` is ``overlap``, ``title`` names the series. Pairs whose importances are equal to the bit are crossed.
    """
    pairs = table.filter(pl.col("step_from") < pl.col("step"))
    _needs_two(pairs, "survival", title)
    steps = pl.concat([pairs["step_from"], pairs["step"]]).unique().sort().to_list()
    place = {step: i for i, step in enumerate(steps)}
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    _title(figure, f"Overlap of the top 1% of neurons between any two checkpoints: {title}")
    for axes, (component, name) in zip(panels, COMPONENTS.items(), strict=True):
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
    _needs_two(similarity.filter(pl.col("metric") == "to_previous"), "consolidation", title)
    looks = {
        "to_final": ("r with the last profile", VERMILLION, "o", "-"),
        "to_previous": ("r with the profile before", BLUE, "s", "-"),
        "to_previous_spearman": ("Spearman with the profile before", SKY, "", "--"),
    }
    figure, panels = _two_panels(f"Consolidation of the layer profiles: {title}", 2.5)
    places = dict(sorted(zip(similarity["step"], course_places(similarity, axis), strict=True)))
    whole = dynamics.filter(pl.col("window") == "all")
    for axes, (component, name) in zip(panels, COMPONENTS.items(), strict=True):
        rows = similarity.filter(pl.col("component") == component)
        curves = [Curve(look[0], rows.filter(pl.col("metric") == m), *look[1:]) for m, look in looks.items()]
        curves[-1] = _bare(curves[-1])  # ranks of few layers jump, their bands fill the panel
        of_component = whole.filter(pl.col("component") == component)
        mean = of_component.filter(pl.col("metric") == "consistency").drop_nulls("value")
        number = _estimate(*mean.select("value", "low", "high").row(0)) if len(mean) else "not available"
        _draw(axes, curves, axis, f"{name}: consistency {number}")
        for threshold in THRESHOLDS:
            axes.axhline(float(threshold), color=GREY, linewidth=0.6, linestyle=":", zorder=0)
            for row in of_component.filter(pl.col("metric") == f"consolidation_{threshold}").iter_rows(named=True):
                _consolidated(axes, row, float(threshold), places)
    _correlation_axes(panels)
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


def _correlation_axes(panels: Sequence[Axes]) -> None:
    """Panels with one scale, from below the smallest value to 1, stretched towards 1, where correlations crowd."""
    low = min(float(np.nanmin(line.get_ydata())) for axes in panels for line in axes.lines)
    for axes in panels:
        axes.set_yscale("function", functions=(_stretch, _unstretch))
        axes.yaxis.set_major_locator(FixedLocator([-1, 0, 0.5, 0.8, 0.9, 0.95, 0.99, 1]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(plain)
        axes.set_ylim(_unstretch(_stretch(min(0.8, low)) - 0.1), 1.0002)


def _stretch(r: np.ndarray) -> np.ndarray:
    """Near 1 every further nine takes equal room; 1 itself stays finite."""
    return -np.log10(1.001 - np.minimum(r, 1.0005))


def _unstretch(place: np.ndarray) -> np.ndarray:
    return 1.001 - 10.0**-place


# --- what breaks without a part ---------------------------------------------------------------------------------------


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
    _title(figure, heading)
    grid = figure.subplots(lines, min(2, len(shown)), squeeze=False)
    for axes, (label, rows) in zip(grid.flat, shown.items(), strict=False):
        _draw(axes, _conditions(rows), axis, f"{label[0].upper()}{label[1:]}{_units(rows)}", wide=len(shown) == 1)
        _reference(axes, 0, None)
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
        for curve in _present(_conditions(rows)):
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
        _doses(line, _present(_conditions(part)))
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
        _reference(axes, 0, None)
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
        _draw(panels["course"], curves, axis, "Over training", wide=True)
        panels["course"].set_ylabel("Spearman with the effect")
        _reference(panels["course"], 0, None)
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


# --- series beside each other -----------------------------------------------------------------------------------------


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
        "J of the top 1%": {name: _all(table, "jaccard") for name, table in neurons.items()},
        "R of the top 1%": {name: _all(table, "gain_share") for name, table in neurons.items()},
        "layer importance (nats)": {
            name: table.filter(pl.col("aggregate") == "mean", pl.col("step").is_not_null())
            for name, table in importance.items()
        },
        "r with the last\nlayer profile": {
            name: table.filter(pl.col("metric") == "to_final") for name, table in similarity.items()
        },
    }
    _needs_two(pl.concat(lines["J of the top 1%"].values()), "comparison", " and ".join(neurons))
    figure = Figure(figsize=(WIDTH, 1.2 + 1.65 * len(lines)), layout="constrained")
    _title(figure, "Series beside each other")
    grid = figure.subplots(len(lines), 2, sharex=True, sharey="row")
    names = list(dict.fromkeys([*neurons, *importance, *similarity]))
    drawn = []
    for line, (label, tables) in zip(grid, lines.items(), strict=True):
        for axes, component in zip(line, COMPONENTS, strict=True):
            parts = {name: rows.filter(pl.col("component") == component) for name, rows in tables.items()}
            curves = _present(Curve(name, rows, *_series_look(names.index(name))) for name, rows in parts.items())
            draw_curves(axes, curves, axis)
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_major_locator(_few_ticks())
            drawn += curves
        line[0].set_ylabel(label)
    for line, value, label in ((0, RANDOM_JACCARD, "random sets, uniform shares"), (1, UNIFORM_SHARE, None)):
        for axes in grid[line]:
            _reference(axes, value, label)
            _from_zero(axes)
    _correlation_axes(grid[3])
    for axes, name in zip(grid[0], COMPONENTS.values(), strict=True):
        axes.set_title(name)
    for axes in grid[-1]:
        course_axis(axes, drawn, axis)
    for axes in grid[:-1].flat:
        axes.tick_params(labelbottom=False)
    shared_legend(figure, grid.flat)
    return figure


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
    sentences = {pair: _sentences(verdict, *pair) for pair in pairs}
    heights = [1.9 * len(lines[pair]) + 0.45 + 0.14 * len(sentences[pair].splitlines()) for pair in pairs]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.11)  # room for the heading of each row
    parts = np.atleast_1d(figure.subfigures(len(pairs), 1, height_ratios=heights))
    for part, pair in zip(parts, pairs, strict=True):
        _sparsity_pair(part, pair, lines[pair], table, sentences[pair], axis)
    return figure


SparsityPanel = tuple[str, list[Curve], Sequence[tuple[str, str]]]


def _sparsity_lines(
    moe: pl.DataFrame, dense: pl.DataFrame, names: tuple[str, str]
) -> list[tuple[str, list[SparsityPanel]]]:
    """The rows of one pair that have something to show: heading and panels (name, curves, claims with their tests)."""
    if any(_rows(table, "ffn", "jaccard").is_empty() for table in (moe, dense)):
        return []
    lines = []
    for heading, populations, wanted in SPARSITY:
        panels = []
        for name, metric, tests in wanted:
            curves = [
                Curve(f"{names[0]} (MoE)", _rows(moe, "ffn", metric, populations[0]), VERMILLION, "o"),
                Curve(f"{names[1]} (dense)", _rows(dense, "ffn", metric, populations[1]), BLUE, "s"),
            ]
            if ("stability", "N1") in tests:
                routed, layered = _rows(moe, "ffn", "jaccard_given_expert"), _rows(dense, "ffn", "jaccard_given_layer")
                curves.append(Curve(f"J expected given layer × expert, {names[0]}", routed, VERMILLION, "", ":"))
                curves.append(Curve(f"J expected given the layer, {names[1]}", layered, BLUE, "", ":"))
            if len(_present(curves[:2])) == 2:
                panels.append((name, _present(curves), tests))
        if panels:
            lines.append((heading, panels))
    return lines


def _sparsity_pair(
    part: SubFigure,
    pair: tuple[str, str],
    lines: Sequence[tuple[str, list[SparsityPanel]]],
    table: pl.DataFrame,
    sentences: str,
    axis: str,
) -> None:
    _title(part, f"Is it more than sparsity? FFN neurons of {pair[0]} and {pair[1]}")
    grid = part.subplots(len(lines), 3, squeeze=False, sharex=True)
    everything = [curve for _, panels in lines for _, curves, _ in panels for curve in curves]
    for line, (heading, panels) in zip(grid, lines, strict=True):
        for axes, (name, curves, tests) in zip(line, panels, strict=False):
            draw_curves(axes, curves, axis)
            differences = [text for test in tests if (text := _difference(table, *pair, *test))]
            axes.set_title("\n".join([name, *differences]), fontsize=6.5, fontweight="normal", linespacing=1.25)
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_major_locator(_few_ticks())
            _from_zero(axes)
        above = 11.5 + 8.6 * line[0].get_title(loc="left").count("\n")
        look = {"xycoords": "axes fraction", "textcoords": "offset points", "fontweight": "bold", "in_layout": False}
        line[0].annotate(heading, (0, 1), (-18, above + 3), va="bottom", annotation_clip=False, **look)
        for axes in line[len(panels) :]:
            axes.remove()
    for axes in grid[-1][: len(lines[-1][1])]:
        course_axis(axes, everything, axis)
        axes.tick_params(labelbottom=True)
        if axes is not grid[-1][len(lines[-1][1]) // 2]:
            axes.set_xlabel("")  # too long for every panel
    note = "Δ: mean difference MoE − dense (as the row says) with its 95% interval; exceeds: it lies above 0."
    shared_legend(part, [axes for axes in grid.flat if axes.figure is not None], f"{sentences}\n{note}".strip())


def _difference(table: pl.DataFrame, moe: str, dense: str, claim: str, test: str) -> str:
    """The mean difference in words, empty where the table has no such test."""
    wanted = {"moe": moe, "dense": dense, "claim": claim, "test": test}
    rows = table.filter(*(pl.col(column) == value for column, value in wanted.items()))
    if rows.is_empty() or rows["difference_value"][0] is None:
        return ""
    number = _estimate(*rows.select("difference_value", "difference_low", "difference_high").row(0), sign="+")
    exceeds = {True: ": exceeds", False: ": not above", None: ""}[rows["exceeds"][0]]
    over = "Δ over N1" if test == "N1" else "Δ"
    return f"{over} {number}{exceeds}"


def _sentences(verdict: pl.DataFrame, moe: str, dense: str) -> str:
    """The verdict on every claim, one a line."""
    rows = verdict.filter(pl.col("moe") == moe, pl.col("dense") == dense)
    said = {True: "beyond sparsity", False: "not beyond sparsity", None: "undecided"}
    lines = {
        claim: f"{claim.capitalize()}: {said[beyond]}. {because}"
        for claim, beyond, because in rows.select("claim", "beyond_sparsity", "because").iter_rows()
    }
    return "\n".join(lines[claim] for claim in CLAIMS if claim in lines)


# --- shared -----------------------------------------------------------------------------------------------------------


def _rows(table: pl.DataFrame, component: str, metric: str, population: str = "all") -> pl.DataFrame:
    """The course of one metric of ``neuron_dynamics``."""
    wanted = {"component": component, "metric": metric, "population": population, "average": "micro"}
    return table.filter(*(pl.col(column) == value for column, value in wanted.items()))


def _all(table: pl.DataFrame, metric: str) -> pl.DataFrame:
    return pl.concat([_rows(table, component, metric) for component in COMPONENTS])


def _bare(curve: Curve) -> Curve:
    """Without intervals."""
    nothing = [pl.lit(None, dtype=pl.Float64).alias(end) for end in ("low", "high")]
    return replace(curve, rows=curve.rows.with_columns(nothing))


def _present(curves: Iterable[Curve]) -> list[Curve]:
    """The curves that have a value anywhere."""
    return [curve for curve in curves if curve.rows["value"].is_not_null().any()]


def _needs_two(rows: pl.DataFrame, figure: str, title: str) -> None:
    if rows.is_empty():
        raise PlotError(f"{figure} of {title} needs two checkpoints; add steps to the series")


def _two_panels(title: str, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH, height + 0.9), layout="constrained")
    _title(figure, title)
    return figure, figure.subplots(1, 2, sharey=True)


def _title(figure: Figure | SubFigure, title: str) -> None:
    figure.suptitle(textwrap.fill(title, 88), x=0.01, ha="left")


def _draw(axes: Axes, curves: Sequence[Curve], axis: str, title: str, wide: bool = False) -> None:
    draw_curves(axes, _present(curves), axis)
    course_axis(axes, curves, axis, wide)
    axes.yaxis.set_major_formatter(plain)
    axes.set_title(title)


def _reference(axes: Axes, value: float, label: str | None) -> None:
    axes.axhline(value, color=GREY, linewidth=0.8, linestyle=(0, (1, 1)), zorder=0, label=label)


def _from_zero(axes: Axes) -> None:
    """The range of a share: from a little below zero, so that a line near it is seen, to 1 at most (bands reach on)."""
    top = min(axes.get_ylim()[1], 1.03)
    axes.set_ylim(-0.03 * top, top)


def _few_ticks() -> MaxNLocator:
    return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])


def _estimate(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    """A number with its interval, where there is one, as in 0.97 [0.95, 0.98]."""
    numbers = [number for number in (value, low, high) if number is not None]
    places = 3 if max(map(abs, numbers)) < 0.1 else 2
    value_text, *ends = (f"{number:{sign if i == 0 else ''}.{places}f}" for i, number in enumerate(numbers))
    text = f"{value_text} [{', '.join(ends)}]" if ends else value_text
    return text.replace("-", "−")
