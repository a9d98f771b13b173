"""How figures draw lists and matrices: points with intervals, a line a name, ticks of chance, cells with words.

Points stand beside one another so that no interval hides another; hollow ones are readings that are not the default.
What is not available is left out, also of the legend.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from moescope.drawing import BLACK, GREY, MARKERS, PALETTE, PlotError, plain

Dash = tuple[int, tuple[int, int]]
DOTTED, DASHED = (0, (1, 1)), (0, (4, 2))
STRIPE = "#F2F2F2"


@dataclass(frozen=True)
class Mark:
    """How the points of one group look, and what the legend calls them."""

    label: str
    colour: str
    marker: str = "o"
    hollow: bool = False
    size: float = 4.0


def last(
    table: pl.DataFrame, figure: str, title: str, why: str = "the table is empty; there is no checkpoint to draw"
) -> pl.DataFrame:
    """The rows of the last checkpoint; one without a step (``main``) is drawn only where it stands alone.

    Raises PlotError where there is none, saying ``why``.
    """
    if table.is_empty():
        raise PlotError(f"{figure} of {title}: {why}")
    return table.filter(pl.col("step").eq_missing(table["step"].max()))


def spots(axes: Axes, rows: pl.DataFrame, places: np.ndarray, mark: Mark, of: str = "", upright: bool = False) -> None:
    """One value a row with its interval, at these heights (``upright``: at these places along x); nulls are left out.

    ``of`` is the beginning of the columns' names, as in ``control_value``.
    """
    value, low, high = (
        rows[name].to_numpy().astype(float) if (name := f"{of}{end}") in rows.columns else np.full(len(rows), np.nan)
        for end in ("value", "low", "high")
    )
    known, bounded = np.isfinite(value), np.isfinite(low)
    if not known.any():
        return
    bars = axes.vlines if upright else axes.hlines
    if bounded.any():
        bars(places[bounded], low[bounded], high[bounded], color=mark.colour, linewidth=1.1, zorder=2)
    look = {"color": mark.colour, "marker": mark.marker, "markersize": mark.size, "linestyle": "", "zorder": 3}
    if mark.hollow:
        look |= {"markerfacecolor": "white", "markeredgewidth": 0.9}
    x, y = (places[known], value[known]) if upright else (value[known], places[known])
    axes.plot(x, y, label=mark.label, **look)


def chance(
    axes: Axes,
    values: pl.Series,
    places: np.ndarray,
    reach: float,
    label: str,
    colour: str = BLACK,
    dash: Dash = DOTTED,
) -> None:
    """An upright tick in every line at what chance gives; without a label where another tick has it."""
    known = values.is_not_null().to_numpy()
    if known.any():
        ends = places[known] - reach, places[known] + reach
        look = {"color": colour, "linewidth": 1.0, "linestyle": dash, "zorder": 1}
        axes.vlines(values.drop_nulls().to_numpy(), *ends, label=label or None, **look)


def lines_of(axes: Axes, labels: Sequence[str], places: Sequence[float]) -> None:
    """One line a label, from the top."""
    axes.set_yticks(places, labels)
    axes.set_ylim(places[-1] + 0.6, places[0] - 0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.5, zorder=-1)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(plain)


def stripes(axes: Axes, number: int) -> None:
    """Every second line on grey, so that groups of points are told apart."""
    for line in range(0, number, 2):
        axes.axhspan(line - 0.5, line + 0.5, color=STRIPE, linewidth=0, zorder=-2)


def cells(axes: Axes, values: np.ndarray, words: np.ndarray, colours: str, limits: tuple[float, float]) -> AxesImage:
    """A matrix of colours with a word in each cell; what is not available stays white."""
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    for (i, j), word in np.ndenumerate(words):
        if word:
            axes.text(j, i, word, ha="center", va="center", fontsize=6, color=ink(image, values[i, j]))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    return image


def ink(image: AxesImage, value: float) -> str:
    """Black or white, whichever is seen on the colour of the value; grey where there is none."""
    if np.isnan(value):
        return GREY
    red, green, blue, _ = image.cmap(image.norm(value))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else BLACK


def series_mark(name: str, number: int) -> Mark:
    return Mark(name, PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)])


def apart(number: int, of: int, reach: float) -> float:
    """Where the n-th of several things stands in their common place, which reaches over ``reach``."""
    return (number - (of - 1) / 2) * reach / of


def folded(name: str, width: int) -> str:
    return textwrap.fill(name, width, break_long_words=True)


def words(name: str, width: int) -> str:
    """The name of a relation in lines, its underscores read as spaces."""
    return folded(name.replace("_", " "), width)
