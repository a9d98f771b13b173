"""What the figures share: one style, colours, axes of training steps, bands, legends, titles, saving.

Every figure is drawn by the object interface under one fixed style, so nothing depends on a user's matplotlibrc or on
what was drawn before. Colours are those of Okabe and Ito (distinct to colour-blind readers); groups that have an order
take cividis. Bands and bars are the 95% intervals of the table; where it has none (one subject) none is drawn.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, MaxNLocator, MultipleLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

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
#: Characters of the small print that fit on a line of the page.
LINE = 112
COMPONENTS = {"attn": ("attention", BLUE, "o"), "ffn": ("FFN", VERMILLION, "s")}

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


@dataclass(frozen=True)
class Curve:
    """One group: rows with step, value, low and high, and how it is drawn."""

    label: str
    rows: pl.DataFrame
    colour: str
    marker: str = ""
    dash: str = "-"
    width: float = 1.4


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
    axes.yaxis.set_major_formatter(plain)
    if limits:
        axes.set_ylim(limits)
        axes.yaxis.set_major_locator(MultipleLocator(0.2))
    legend(axes, wide)


def draw_curves(axes: Axes, curves: Sequence[Curve], axis: str = "log") -> None:
    """The curves and their bands alone. A null value breaks its curve; what stands alone is a point with a bar."""
    for curve in curves:
        rows = curve.rows.sort("step")
        x, value = course_places(rows, axis), rows["value"].to_numpy()
        marker, width = (curve.marker, curve.width) if len(x) <= MARKED_POINTS else ("", 0.7 * curve.width)
        look = {"color": curve.colour, "marker": marker, "linestyle": curve.dash, "linewidth": width}
        axes.plot(x, value, label=curve.label, zorder=3, **look)
        band(axes, x, rows, curve.colour)
        if (alone := _alone(value)).any():
            low, high = (rows[end].to_numpy()[alone] for end in ("low", "high"))
            axes.vlines(x[alone], low, high, color=curve.colour, linewidth=curve.width)
            axes.plot(x[alone], value[alone], color=curve.colour, marker=curve.marker or "o", linestyle="", zorder=3)


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


def band(axes: Axes, x: np.ndarray, rows: pl.DataFrame, colour: str) -> None:
    low, high = rows["low"].to_numpy(), rows["high"].to_numpy()
    if not np.isnan(low).all():
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, zorder=1)


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
    return "\n".join(textwrap.fill(line, LINE) for line in note.splitlines())


def trajectory(table: pl.DataFrame, name: str) -> pl.DataFrame:
    if table.is_empty():
        raise PlotError(f"{name} is empty: there is no checkpoint to draw")
    return table if table["step"].is_null().all() else table.filter(pl.col("step").is_not_null())


def suptitle(figure: Figure, title: str, table: pl.DataFrame, always: bool = False) -> None:
    """The title, with the step where the figure shows a single one."""
    steps = table["step"].unique()
    if len(steps) == 1 or always:
        title += ", main" if steps[0] is None else f", step {steps[0]:,}"
    figure.suptitle(textwrap.fill(title, 88), x=0.01, ha="left")


def wrapped(name: str, width: int) -> str:
    """A name in lines of at most ``width`` characters, its underscores read as spaces."""
    return textwrap.fill(name.replace("_", " "), width, break_long_words=True)
