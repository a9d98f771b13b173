"""What the figures share: one style, colours, curves, axes, references, legends, titles, numbers in words, saving.

Every figure is drawn by the object interface under one fixed style, so nothing depends on a user's matplotlibrc or on
what was drawn before. Colours are those of Okabe and Ito (distinct to colour-blind readers); groups that have an order
take cividis. Bands and bars are the 95% intervals of the table; where it has none (one subject) none is drawn.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, MaxNLocator, MultipleLocator, NullLocator

from moescope import files
from moescope.errors import MoescopeError

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, BLACK, GREY = "#E69F00", "#56B4E9", "#F0E442", "#000000", "#8C8C8C"
#: Groups without an order; yellow stands last because it is faint on white. Beyond eight, dashes tell them apart.
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":", "-.")
#: What a course is drawn over.
AXES = ("log", "step", "tokens")
TOKEN_UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
#: Curves of more points than this are drawn without markers, and thinner.
MARKED_POINTS = 40
WIDTH = 7.2  # inches, the text width of a page
DPI = 200
#: Characters of a legend, and of small print, that fit on a line of the page.
LINE, PROSE = 112, 124
PANELS = {"ffn": "FFN", "attn": "Attention"}
#: The Jaccard overlap of two random sets of 1% each, and what a random 1% holds of any total.
RANDOM_JACCARD, UNIFORM_SHARE = 0.01 / 1.99, 0.01

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.6,
    "figure.titlesize": 10,
    "pdf.fonttype": 42,  # text stays text
    "text.parse_math": False,  # a name may hold a dollar sign
}


class PlotError(MoescopeError):
    """A table from which the figure cannot be drawn."""


def styled(function: Callable) -> Callable:
    """The function, drawing under the fixed style."""

    @functools.wraps(function)
    def under_style(*arguments, **options):
        with style.context(["default", STYLE]):
            return function(*arguments, **options)

    return under_style


@styled
def save(figure: Figure, pdf_path: str | Path, png_path: str | Path) -> None:
    """Write the figure as PDF and PNG, each whole or not at all; equal figures give equal bytes (no date inside)."""
    with files.atomic(pdf_path) as temporary:
        figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
    with files.atomic(png_path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def drawn_or_said(draw: Callable[..., Figure], table: pl.DataFrame, title: str) -> Figure:
    """The figure of a table; where it has nothing to show, a strip that says why."""
    try:
        return draw(table, title=title)
    except PlotError as error:
        return said(f"Not drawn: {error}")


@styled
def said(line: str) -> Figure:
    """A line of text in the place of a figure."""
    figure = Figure(figsize=(WIDTH, 0.6))
    figure.text(0.01, 0.5, filled(line), va="center")
    return figure


@dataclass(frozen=True)
class Curve:
    """One group: rows with step, value, low and high, and how it is drawn; ``shade`` is how dense its band is."""

    label: str
    rows: pl.DataFrame
    colour: str
    marker: str = ""
    dash: str = "-"
    width: float = 1.4
    shade: float = 0.2

    def bare(self) -> Curve:
        """The same without intervals."""
        nothing = [pl.lit(None, dtype=pl.Float64).alias(end) for end in ("low", "high")]
        return replace(self, rows=self.rows.with_columns(nothing))


def present(curves: Iterable[Curve]) -> list[Curve]:
    """The curves that have a value anywhere."""
    return [curve for curve in curves if curve.rows["value"].is_not_null().any()]


def course(table: pl.DataFrame, component: str, metric: str, population: str = "all") -> pl.DataFrame:
    """One metric of ``neuron_dynamics`` over training, averaged over prompts."""
    wanted = {"component": component, "metric": metric, "population": population, "average": "micro"}
    return table.filter(*(pl.col(column) == value for column, value in wanted.items()))


def needs_two(rows: pl.DataFrame, figure: str, title: str) -> None:
    """Raises PlotError where there is no row between two checkpoints."""
    if rows.is_empty():
        raise PlotError(f"{figure} of {title} needs two checkpoints; add steps to the series")


def draw_panel(axes: Axes, curves: Sequence[Curve], axis: str, title: str, wide: bool = False) -> None:
    """Those of the curves that have a value, under a title; the x axis reaches over the rows of all."""
    draw_curves(axes, present(curves), axis)
    course_axis(axes, curves, axis, wide)
    axes.set_title(title)


def draw_curves(axes: Axes, curves: Sequence[Curve], axis: str = "log") -> None:
    """The curves and their bands alone. A null value breaks its curve; what stands alone is a point with a bar."""
    for curve in curves:
        rows = curve.rows.sort("step")
        x, value = course_places(rows, axis), rows["value"].to_numpy()
        marker, width = (curve.marker, curve.width) if len(x) <= MARKED_POINTS else ("", 0.7 * curve.width)
        look = {"color": curve.colour, "marker": marker, "linestyle": curve.dash, "linewidth": width}
        axes.plot(x, value, label=curve.label, zorder=3, **look)
        band(axes, x, rows, curve.colour, curve.shade)
        if (alone := _alone(value)).any():
            low, high = (rows[end].to_numpy()[alone] for end in ("low", "high"))
            axes.vlines(x[alone], low, high, color=curve.colour, linewidth=curve.width)
            axes.plot(x[alone], value[alone], color=curve.colour, marker=curve.marker or "o", linestyle="", zorder=3)
    axes.yaxis.set_major_formatter(plain)


def _alone(values: np.ndarray) -> np.ndarray:
    """Which values have none beside them."""
    known = np.pad(np.isfinite(values), 1)
    return known[1:-1] & ~known[:-2] & ~known[2:]


def course_places(rows: pl.DataFrame, axis: str) -> np.ndarray:
    """Where the rows stand on the axis of a course: at their step, or at the tokens seen by then.

    Raises PlotError where tokens are asked for and not known.
    """
    if axis != "tokens":
        return rows["step"].to_numpy()
    if rows["tokens"].is_null().any():
        raise PlotError("the tokens of a checkpoint are not known; set axis: step (or log) in the section of the study")
    return rows["tokens"].to_numpy()


def course_axis(axes: Axes, curves: Sequence[Curve], axis: str, wide: bool = False) -> None:
    """The x axis of these curves: ``log`` (steps, log scale), ``step`` or ``tokens``.

    Raises PlotError on any other, and where tokens are asked for and not known.
    """
    if axis not in AXES:
        raise PlotError(f"{axis}: no such axis; set axis to one of {', '.join(AXES)}")
    places = np.unique(np.concatenate([course_places(curve.rows, axis) for curve in curves]))
    if axis == "log" and len(places) > 1:
        step_axis(axes, places, wide)
        return
    margin = 0.03 * float(places[-1] - places[0]) or 1.0
    axes.set_xlim(places[0] - margin, places[-1] + margin)
    several = MaxNLocator(nbins=8 if wide else 4, steps=[1, 2, 2.5, 5, 10])
    axes.xaxis.set_major_locator(several if len(places) > 1 else FixedLocator(places))
    if axis != "tokens":
        axes.set_xlabel("training step")
        axes.xaxis.set_major_formatter(short)
        return
    size, unit = next(((size, unit) for size, unit in TOKEN_UNITS if places[-1] >= size), (1, ""))
    axes.set_xlabel(f"training tokens ({unit})" if unit else "training tokens")
    axes.xaxis.set_major_formatter(lambda tokens, _: plain(tokens / size))


def points(
    axes: Axes,
    curves: Sequence[Curve],
    label: str,
    places: Sequence[float],
    limits: tuple[float, float] | None = None,
) -> None:
    """One value a group with its interval, at these heights counted from the top."""
    for place, curve in zip(places, curves, strict=True):
        axes.hlines(place, curve.rows["low"], curve.rows["high"], color=curve.colour, linewidth=1.4)
        axes.plot(curve.rows["value"], [place], color=curve.colour, marker=curve.marker, markersize=4.5, linestyle="")
    axes.set_yticks(places, [curve.label for curve in curves])
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(plain)
    if limits:
        axes.set_xlim(limits)
        axes.xaxis.set_major_locator(MultipleLocator(0.2))


def band(axes: Axes, x: np.ndarray, rows: pl.DataFrame, colour: str, shade: float = 0.2) -> None:
    low, high = rows["low"].to_numpy(), rows["high"].to_numpy()
    if not np.isnan(low).all():
        axes.fill_between(x, low, high, color=colour, alpha=shade, linewidth=0, zorder=1)


def reference(axes: Axes, value: float, label: str | None = None) -> None:
    """A dotted line at a value that means nothing, chance, or no change."""
    axes.axhline(value, color=GREY, linewidth=0.8, linestyle=(0, (1, 1)), zorder=0, label=label)


def from_zero(axes: Axes) -> None:
    """The range of a share: from a little below zero, so that a line near it is seen, to 1 at most (bands reach on)."""
    top = min(axes.get_ylim()[1], 1.03)
    axes.set_ylim(-0.03 * top, top)


def correlation_axes(panels: Sequence[Axes]) -> None:
    """Panels with one scale, from below the smallest value to 1, stretched towards 1, where correlations crowd."""
    low = min(float(np.nanmin(line.get_ydata())) for axes in panels for line in axes.lines)
    for axes in panels:
        axes.set_yscale("function", functions=(stretch, unstretch))
        axes.yaxis.set_major_locator(FixedLocator([-1, 0, 0.5, 0.8, 0.9, 0.95, 0.99, 1]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(plain)
        axes.set_ylim(unstretch(stretch(min(0.8, low)) - 0.1), 1.0002)


def stretch(r: np.ndarray) -> np.ndarray:
    """Near 1 every further nine takes equal room; 1 itself stays finite."""
    return -np.log10(1.001 - np.minimum(r, 1.0005))


def unstretch(place: np.ndarray) -> np.ndarray:
    return 1.001 - 10.0**-place


def step_axis(axes: Axes, steps: np.ndarray, wide: bool = False) -> None:
    """A logarithmic axis of steps; with a step 0 it is linear up to the first positive step, and says so."""
    axes.set_xlabel("training step (log scale)")
    if steps[0] > 0:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=steps[1], linscale=0.4)
        axes.set_xlabel(f"training step (log scale, linear below {steps[1]:,})")
    transform = axes.xaxis.get_transform()
    first, last = transform.transform(steps[[0, -1]].astype(float))
    margin = 0.03 * (last - first)
    axes.set_xlim(*transform.inverted().transform(np.array([first - margin, last + margin])))
    gap = 0.08 if wide else 0.15
    ticks: dict[int, float] = {}
    for candidates, enough in zip(_tick_candidates(steps), (math.inf, 4), strict=True):
        for step in candidates:
            place = (transform.transform(np.array([float(step)]))[0] - first) / (last - first)
            if len(ticks) < enough and all(abs(place - other) >= gap for other in ticks.values()):
                ticks[step] = place
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_major_formatter(short)
    axes.xaxis.set_minor_locator(NullLocator())


def _tick_candidates(steps: np.ndarray) -> tuple[list[int], list[int]]:
    """Where a tick may stand, the most wanted first: the ends and round numbers; then the checkpoints themselves."""
    first, last = int(steps[0]), int(steps[-1])
    powers = [10**k for k in range(len(str(last)))]
    round_steps = [digit * power for digit in (1, 3, 5, 2) for power in powers]
    return [last, first, *(step for step in round_steps if int(steps[1]) <= step <= last)], steps[::-1].tolist()


def short(step: float, _: int | None = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if step >= size:
            return f"{step / size:.4g}{unit}"
    return f"{step:g}"


def plain(value: float, _: int | None = None) -> str:
    return f"{round(value, 12):g}".replace("-", "\N{MINUS SIGN}")


def estimate(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    """A number with its interval, where there is one, as in 0.97 [0.95, 0.98]; ``sign`` "+" signs it."""
    ends = [] if low is None else [low, high]
    places = 3 if max(map(abs, [value, *ends])) < 0.1 else 2
    interval = f" [{', '.join(f'{end:.{places}f}' for end in ends)}]" if ends else ""
    return f"{value:{sign}.{places}f}{interval}".replace("-", "\N{MINUS SIGN}")


def shared_legend(figure: Figure | SubFigure, panels: Iterable[Axes], note: str = "") -> None:
    """One legend of all panels below them, every label once; a note stands above it, in lines of its own."""
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    fitting = (n for n in range(len(handles), 1, -1) if _legend_width(list(handles), n) <= LINE)
    place = {"loc": "outside lower left", "alignment": "left", "borderaxespad": 0.4}
    legend = figure.legend(
        handles.values(), handles.keys(), ncols=next(fitting, 1), title=filled(note) or None, **place
    )
    legend.get_title().set_fontsize(7.5)


def _legend_width(labels: Sequence[str], columns: int) -> int:
    """Characters of a legend in so many columns, which are filled one after the other."""
    return sum(max(map(len, part)) + 8 for part in np.array_split(np.array(labels, dtype=object), columns))


def filled(note: str) -> str:
    """The note in lines that fit the page, its own line breaks kept."""
    return "\n".join(textwrap.fill(line, PROSE) for line in note.splitlines())


def suptitle(figure: Figure, title: str, table: pl.DataFrame, always: bool = False) -> None:
    """The title, with the step where the figure shows a single one."""
    steps = table["step"].unique()
    if len(steps) == 1 or always:
        title += ", main" if steps[0] is None else f", step {steps[0]:,}"
    headline(figure, title)


def headline(figure: Figure | SubFigure, title: str) -> None:
    figure.suptitle(textwrap.fill(title, 88), x=0.01, ha="left")
