"""What a drawn figure says: its texts and where they stand, its curves, bands and intervals."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex


def laid_out(figure):
    """The figure with everything where it will be drawn, not drawn yet."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    return figure


def panels(figure):
    """All panels, without the scales of colours beside them."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def said(figure):
    """All that is written, in one line."""
    return " ".join(" ".join(text.split()) for text, _ in texts(figure))


def parts(figure):
    """The figure and what it is divided into, at every depth."""
    return [figure, *(part for one in figure.subfigs for part in parts(one))]


def legends(figure):
    """All legends: of panels, of the figure and of its parts."""
    of_panels = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    return of_panels + [legend for part in parts(figure) for legend in part.legends]


def texts(figure):
    """(text, bounding box in pixels) of everything that is written, tick labels only where their tick is in view."""
    renderer = figure.canvas.get_renderer()
    written = [part._suptitle for part in parts(figure) if part._suptitle]
    for axes in figure.axes:
        written += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            written += [tick.label1 for tick in axis._update_ticks() if tick.label1.get_visible()]
    for legend in legends(figure):
        written += [legend.get_title(), *legend.get_texts()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in written if text.get_text().strip()]


def assert_legible(figure):
    """No text overlaps another or leaves the page."""
    page, written = figure.bbox, texts(figure)
    assert len(written) > 5
    for text, box in written:
        assert box.x0 >= page.x0 - 1, text
        assert box.y0 >= page.y0 - 1, text
        assert box.x1 <= page.x1 + 1, text
        assert box.y1 <= page.y1 + 1, text
    for (one, first), (other, second) in itertools.combinations(written, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(width, height) < 1, f"{one!r} and {other!r} overlap by {width:.1f} x {height:.1f} pixels"


def assert_clear_of_data(figure):
    """No legend and no title reaches into the area of any panel."""
    renderer = figure.canvas.get_renderer()
    boxes = [legend.get_window_extent(renderer) for legend in legends(figure)]
    boxes += [axes._left_title.get_window_extent(renderer) for axes in figure.axes if axes._left_title.get_text()]
    for box, axes in itertools.product(boxes, figure.axes):
        area = axes.get_window_extent(renderer)
        width, height = min(box.x1, area.x1) - max(box.x0, area.x0), min(box.y1, area.y1) - max(box.y0, area.y0)
        assert min(width, height) < 1, axes.get_title(loc="left")


def assert_no_panel_is_empty(figure):
    """Every panel shows something and has room for it."""
    for axes in panels(figure):
        shown = any(line.get_label()[0] != "_" and np.isfinite(line.get_ydata()).any() for line in axes.lines)
        assert shown or axes.images or axes.collections
        inches = axes.get_window_extent().transformed(axes.get_figure(root=True).dpi_scale_trans.inverted())
        assert inches.width > 1.0
        assert inches.height > 0.8


def assert_named(figure, name):
    """The titles name the series and the axes their units."""
    assert name in "".join(part._suptitle.get_text() for part in parts(figure) if part._suptitle).replace("\n", "")
    below = {axes.get_xlabel() for axes in panels(figure)}
    assert any(unit in label for label in below for unit in ("step", "tokens", "%", "HIT@10", "nats"))


def assert_presentable(figure, name):
    """Nothing collides or leaves the page, no panel is empty or squeezed, titles and axes say what is shown."""
    assert_legible(figure)
    assert_clear_of_data(figure)
    assert_no_panel_is_empty(figure)
    assert_named(figure, name)


def lines(axes, label):
    """(x, y, colour) of the curve whose legend entry begins with the label."""
    (line,) = [line for line in axes.lines if line.get_label().startswith(label)]
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float), to_hex(line.get_color())


def bands(axes, colour):
    """x -> (low, high) of every band in this colour."""
    found = [c for c in axes.collections if len(c.get_facecolor()) and to_hex(c.get_facecolor()[0]) == colour]
    corners = [collection.get_paths()[0].vertices for collection in found]
    return [{x: (c[c[:, 0] == x, 1].min(), c[c[:, 0] == x, 1].max()) for x in c[:, 0]} for c in corners]


def panel(figure, title):
    (axes,) = [axes for axes in figure.axes if axes._left_title.get_text() == title]
    return axes


def assert_curve(axes, label, rows, over="step"):
    """The curve and its band are the rows' values and intervals."""
    rows = rows.sort(over)
    x, y, colour = lines(axes, label)
    assert x.tolist() == rows[over].to_list()
    assert y == pytest.approx(rows["value"].to_numpy())
    wanted = {x: pytest.approx(ends) for x, *ends in rows.select(over, "low", "high").iter_rows()}
    assert wanted in bands(axes, colour)


def bars(axes):
    """(x, low, high) of all vertical intervals."""
    lines = [collection for collection in axes.collections if hasattr(collection, "get_segments")]
    ends = [segment for collection in lines for segment in collection.get_segments()]
    return {(round(s[0, 0], 9), round(s[0, 1], 9), round(s[1, 1], 9)) for s in ends}


def segments(axes):
    """y -> (x0, x1) of the horizontal intervals."""
    ends = [segment for collection in axes.collections for segment in collection.get_segments()]
    return {round(segment[0, 1], 6): (segment[0, 0], segment[1, 0]) for segment in ends}
