"""Plots as SVG, by matplotlib, for files and for pages.

In a page an SVG takes the page's colours of text and lines, so that it can be read on light and on dark ground, and
needs nothing of the network.
"""

import colorsys
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from infusion.methods import method_names

INK, LINE = "#23262c", "#c6cad2"  # stand for the page's own colours
PALETTE = ("#8a63c9", "#2f9e73", "#d4641f", "#2f7fc4", "#b8902a", "#c4497f", "#4f9aa8", "#7d9a2b", "#a8523f", "#5f6fd8",
           "#b06fc0", "#937053")  # legible on both grounds  # fmt: skip
GREY = "#7a828f"  # of what the others are held against
STYLE = {
    "font.size": 10,
    "text.parse_math": False,  # names come from anyone
    "svg.fonttype": "none",
    "svg.hashsalt": "infusion",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.family": ["DejaVu Sans"],
}
DPI = 72  # so that a pixel is a point, as in matplotlib's SVGs
SIZE = (5.2, 3.7)  # inches; a page shows two side by side, or one across a phone


@dataclass(frozen=True)
class Point:
    """A measurement on the plane: a value and its standard error (0 where there is none) in each direction."""

    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0


@dataclass(frozen=True)
class Series:
    """Points of one name and colour.

    Attributes:
        small: single measurements behind the points, without bars.
    """

    name: str
    colour: str
    points: tuple[Point, ...]
    small: tuple[Point, ...] = ()


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: a method has the same in every plot, anything else one that no other name here has."""
    names = list(names)
    methods = dict(zip(method_names(), _hues(), strict=False))
    taken = {methods[name] for name in names if name in methods}
    free = (hue for hue in _hues() if hue not in taken)
    return {name: methods[name] if name in methods else next(free) for name in names}


def _hues() -> Iterator[str]:
    """The palette, and then turns of the colour wheel by the golden section, of which none comes back."""
    yield from PALETTE
    for turn in count(1):
        red, green, blue = colorsys.hls_to_rgb(turn * 0.618034 % 1, 0.5, 0.45)
        yield f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def plane(
    series: Sequence[Series], x_label: str, y_label: str, lines: Mapping[str, float] | None = None, x_low: float = 0.0
) -> str:
    """A trade-off: each series one point with bars of two standard errors; dashed `lines` are levels of y."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(x_label, y_label)
        for one in series:
            for point in one.small:
                axes.plot(point.x, point.y, "o", color=one.colour, alpha=0.35, markersize=4)
            for point in one.points:
                bars = {"xerr": 2 * point.x_error, "yerr": 2 * point.y_error}
                axes.errorbar(point.x, point.y, **bars, fmt="o", color=one.colour, elinewidth=1.2, markersize=7)
        for name, level in (lines or {}).items():
            axes.axhline(level, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(name, (1, level), (0, 3), ("axes fraction", "data"), "offset points", ha="right", fontsize=9)
        axes.margins(0.16, 0.14)
        high = axes.get_xlim()[1]
        axes.set_xlim(x_low - 0.04 * (high - x_low), high)
        _label(axes, series)
        return _svg(figure)


def curves(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Lines with bands of two standard errors; an axis that reaches 0."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(x_label, y_label)
        for one in series:
            xs, ys = [point.x for point in one.points], [point.y for point in one.points]
            axes.plot(xs, ys, "o-", color=one.colour, markersize=4, linewidth=1.6, label=one.name)
            low, high = ([p.y + sign * 2 * p.y_error for p in one.points] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=one.colour, alpha=0.16, linewidth=0)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0] if any(p.y < 0 for s in series for p in s.points) else 0))
        axes.margins(x=0.04)
        if len(series) > 1:
            axes.legend(fontsize=9, labelcolor="linecolor", handlelength=1.4)
        return _svg(figure)


def inline(svg: str) -> str:
    """An SVG file as part of a page: without a header, as wide as its place, in the page's colours."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    tag, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', tag)[0]
    rest = rest.replace(INK, "var(--ink)").replace(LINE, "var(--line)").replace("xlink:href", "href")
    return f'<svg class="drawing" {box} role="img">{rest}'.strip()


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(SIZE, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.grid(True)
    axes.locator_params(axis="x", nbins=5)  # labels as long as 0.0025 stand apart
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _label(axes: Axes, series: Sequence[Series]) -> None:
    """Names beside the points, where least is in the way: points and other names above all, then bars, small points."""
    axes.figure.draw_without_rendering()  # lays out
    taken = []  # boxes and what it costs to cover them
    for one in series:
        taken += [(_box(axes, (p.x, p.y), (p.x, p.y), 5), 8) for p in one.points]
        taken += [(_box(axes, (p.x, p.y), (p.x, p.y), 3), 1) for p in one.small]
        for p in one.points:
            taken.append((_box(axes, (p.x - 2 * p.x_error, p.y), (p.x + 2 * p.x_error, p.y), 1), 3))
            taken.append((_box(axes, (p.x, p.y - 2 * p.y_error), (p.x, p.y + 2 * p.y_error), 1), 3))
    edges = axes.get_window_extent()
    for one in series:
        for p in one.points:
            text = axes.annotate(one.name, (p.x, p.y), (0, 0), textcoords="offset points", color=one.colour)
            text.set_in_layout(False)
            x, y = axes.transData.transform((p.x, p.y))
            width, height = text.get_window_extent().width, 12
            sides = [(dx, dy) for dy in (5, -5 - height, 18, -18 - height, 31) for dx in (8, -8 - width, -width / 2)]
            boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in sides]
            costs = [sum(price for other, price in taken if _meet(box, other)) + _beyond(box, edges) for box in boxes]
            best = costs.index(min(costs))
            taken.append((boxes[best], 8))
            text.xyann = sides[best]


def _beyond(box: Sequence[float], edges: Bbox) -> float:
    """Pixels by which a box reaches over the edges to the left and right, and below and above."""
    left, bottom, right, top = box
    return max(edges.x0 - left, 0) + max(right - edges.x1, 0) + max(edges.y0 - bottom, 0) + max(top - edges.y1, 0)


def _box(axes: Axes, low: Sequence[float], high: Sequence[float], margin: float) -> tuple[float, float, float, float]:
    """The pixels between two points of the plane: left, bottom, right, top."""
    (left, bottom), (right, top) = axes.transData.transform([low, high])
    return left - margin, bottom - margin, right + margin, top + margin


def _meet(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) overlap."""
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
