"""Charts as SVG text that stands inside an HTML page and follows its colours.

Matplotlib writes fixed colours, so each role has a colour of its own that nothing else uses, which is then replaced by
the page's CSS variable: the same chart fits a light and a dark page. Text stays text, in the page's font.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from utils.metrics import Curve

INK, MUTED, GRID, GOOD, BAD = "#010203", "#010204", "#010205", "#010206", "#010207"
ROLES = {INK: "ink", MUTED: "muted", GRID: "grid", GOOD: "good", BAD: "bad"}
SERIES = 10  # colours of lines on the page, --s0 .. --s9; more lines repeat them with other dashes
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
POINTS = 200  # of a thinned curve
BINS = 24

Points = tuple[ArrayLike, ArrayLike]  # x, y


def thinned(curve: Curve, limit: float = 1.0) -> Curve:
    """The part of a curve up to x = `limit`, in at most `POINTS` of its points plus the one at the limit."""
    if not len(curve.x):
        return curve
    inside = curve.x <= limit
    x = np.append(curve.x[inside], limit)
    y = np.append(curve.y[inside], np.interp(limit, curve.x, curve.y))
    length = np.append(0, (np.diff(x) + np.diff(y)).cumsum())
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], POINTS)))
    return Curve(x=x[kept], y=y[kept])


def series_color(number: int) -> str:
    return f"#02030{number % SERIES}"


def series_dash(number: int) -> int:
    """Which of the dashes the line of this number has."""
    return number // SERIES % len(DASHES)


def line_chart(
    lines: Mapping[str, Points], *, order: Sequence[str], labels: tuple[str, str],
    limits: tuple[float, float] | None = None, marks: bool = False, size: tuple[float, float] = (4.8, 3.1),
) -> str:  # fmt: skip
    """Named lines; a line's place in `order` chooses its colour, and is `data-series` of its group in the SVG.

    Args:
        labels: of x and y.
        limits: x and y run from 0 to these; else they fit the data.
        marks: show the points.
        size: width and height in units of 72 of the SVG's own.
    """
    figure, axes = new_figure(size, *labels)
    for name, (x, y) in lines.items():
        number = order.index(name)
        (line,) = axes.plot(
            x, y, color=series_color(number), linestyle=DASHES[series_dash(number)], linewidth=1.5,
            marker="o" if marks else "", markersize=3, solid_capstyle="round",
        )  # fmt: skip
        line.set_gid(f"series-{number}")
    if limits is not None:
        axes.set_xlim(0, limits[0])
        axes.set_ylim(0, limits[1] * 1.02)
    if marks:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.margins(x=0.06, y=0.12)
        axes.ticklabel_format(axis="y", useOffset=False)
    return to_svg(figure)


def histogram(good: Sequence[float], bad: Sequence[float], lines: Sequence[tuple[float, str]]) -> str:
    """Numbers of good and of defective images by score, with thresholds: their values and dashes."""
    figure, axes = new_figure((4.2, 2.3), "image score", "images")
    values = np.array([*good, *bad, *(v for v, _ in lines if v == v)])
    edges = np.histogram_bin_edges(values, BINS).tolist()
    for scores, color in ((good, GOOD), (bad, BAD)):
        if len(scores):
            axes.hist(scores, edges, color=color, alpha=0.45, histtype="stepfilled", linewidth=0)
            axes.hist(scores, edges, color=color, histtype="step", linewidth=1.1)
    for value, dash in lines:
        if value == value:
            axes.axvline(value, color=INK, linewidth=1.2, linestyle=dash)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    return to_svg(figure)


def new_figure(size: tuple[float, float], x: str, y: str) -> tuple[Figure, Axes]:
    """An empty chart in the page's colours."""
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x, color=MUTED, fontsize=9)
    axes.set_ylabel(y, color=MUTED, fontsize=9)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0, pad=4)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)
    return figure, axes


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element as wide as its surroundings."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    width, height = figure.get_size_inches() * 72
    text = re.sub(r"^.*?<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {height:g}">', out.getvalue(), flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<clipPath.*?</clipPath>", "", text, flags=re.DOTALL)
    text = re.sub(r' clip-path="[^"]*"| transform="rotate\(-0 [^"]*"|font-family: [^;]*; | version="1.1"', "", text)
    text = re.sub(r'<g id="series-(\d+)">', r'<g class="series" data-series="\1">', text)
    text = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", text)
    for color, role in (ROLES | {series_color(i): f"s{i}" for i in range(SERIES)}).items():
        text = text.replace(color, f"var(--{role})")
    unique = hashlib.sha256(text.encode()).hexdigest()[:8]  # ids count in the whole page
    text = re.sub(r'(id="|href="#)(m\w+)', rf"\1\2-{unique}", text)
    return re.sub(r"\s*\n\s*", " ", text)
