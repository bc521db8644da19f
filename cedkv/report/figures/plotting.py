"""How figures look and how they are written: one style, a few kinds of panels, SVG for the page and PNG for everything else.

A figure's label (``figure.get_label()``) is its short name. Nothing here uses pyplot or keeps state. Text is black in a PNG
and takes the page's own colour in an SVG; the other colours have a contrast of at least 3:1 to both white and black and can
be distinguished without telling red from green.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cedkv.core.text import wrapped

BLUE, GREEN, VERMILION, PURPLE, OCHRE, GREY = "#0072b2", "#009e73", "#d55e00", "#b4609b", "#a47b00", "#808080"
INK, PAPER = "#1c2026", "#fffffe"
"""Text, and the inside of hollow marks; an SVG takes the page's own colours for both."""

Along = Literal["x", "y"]
Line = Literal["-", "--", "-.", ":", "none"]
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, OCHRE, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P")
_HEADING_HEIGHT = 1.15
"""Of the row of a heading, where that of a label on one line is 1."""
WIDTH = 6.2
"""Inches: a column of the page, so that text of 8.5 point is shown at this size."""

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8.5, "axes.titlesize": 8.5,
    "axes.titlelocation": "left", "axes.titlepad": 8, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "legend.handlelength": 1.6, "legend.columnspacing": 1.6,
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.linewidth": 0.8, "xtick.major.width": 0.8,
    "ytick.major.width": 0.8, "xtick.major.size": 3, "ytick.major.size": 3, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.22, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "lines.linewidth": 1.4, "lines.markersize": 5, "lines.solid_capstyle": "butt",
    "axes.unicode_minus": True, "svg.fonttype": "none", "svg.hashsalt": "cedkv", "figure.dpi": 100, "path.simplify": False,
    "text.parse_math": False,
}  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """A mean with its interval; ``dots`` are the values of single random trials."""

    value: float
    low: float | None = None
    high: float | None = None
    dots: tuple[float, ...] = ()

    def at_least(self, axis_start: float) -> Mark:
        """Return the mark with values below the start of an axis moved to it."""
        low, high = (None if v is None else max(v, axis_start) for v in (self.low, self.high))
        return Mark(max(self.value, axis_start), low, high, tuple(max(v, axis_start) for v in self.dots))


@dataclass(frozen=True)
class Row:
    """A row of a chart: its label, its mark, and further values, each with its marker and colour.

    A row with an empty label has the heading of the rows below it instead.
    """

    label: str
    mark: Mark
    colour: str = BLUE
    hollow: bool = False
    bold: bool = False
    extra_marks: tuple[tuple[float, str, str], ...] = ()
    heading: str = ""


def figure_style() -> AbstractContextManager[None]:
    """Return the context in which every figure is drawn, independent of the user's matplotlib settings."""
    defaults: Any = mpl.rcParamsDefault
    kept = {name: value for name, value in defaults.items() if not name.startswith(("backend", "date.epoch"))}
    settings: Any = {**kept, **_STYLE}
    return mpl.rc_context(settings)


def new_figure(name: str, height: float, columns: int = 1, rows: int = 1, **layout: Any) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of the page's width, and its panels from left to right.

    Args:
        height: in inches.
        layout: further arguments of ``Figure.subplots``.
    """
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05, wspace=0.06), label=name)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **layout).ravel())


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Draw a legend below the panels, in as many columns as fit."""
    lengths = [len(str(handle.get_label())) + 7 for handle in handles]

    def width(columns: int) -> int:
        return sum(max(lengths[i] for i in part) for part in np.array_split(range(len(lengths)), columns))

    columns = next((n for n in range(len(handles), 1, -1) if width(n) <= 100), 1)
    columns = -(-len(handles) // -(-len(handles) // columns))  # evenly, so that the last row does not hold a single entry
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)


def legend_entry(label: str, colour: str, marker: str = "", line: Line = "none", hollow: bool = False) -> Line2D:
    """Return an entry of a legend."""
    face = PAPER if hollow else colour
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=label, markerfacecolor=face)


def rows_panel(axes: Axes, rows: Sequence[Row], axis_start: float = -math.inf) -> None:
    """Draw rows from top to bottom: the label at the left, a dot and its interval on a line of its own.

    Args:
        axis_start: lower end of the x axis; a mean below it is drawn as an arrow there, with its value.
    """
    heights = [_HEADING_HEIGHT if not row.label else 1 + 0.62 * (len(wrapped(row.label)) - 1) for row in rows]
    edges = np.concatenate([[0], np.cumsum(heights)])
    transform = axes.get_yaxis_transform()
    axes.set_ylim(edges[-1], 0)
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    for row, top, bottom in zip(rows, edges[:-1], edges[1:], strict=True):
        y = (top + bottom) / 2
        if not row.label:
            axes.text(-0.02, bottom - 0.45, row.heading, transform=transform, ha="right", va="center_baseline", style="italic")
            continue
        axes.plot([0, 1], [y, y], transform=transform, color=GREY, alpha=0.22, linewidth=0.6, zorder=0.5)
        _row_label(axes, row, y)
        for value, marker, colour in row.extra_marks:
            size = 4.5 if marker == "x" else 8
            axes.plot([max(value, axis_start)], [y], marker, color=colour, markersize=size, markeredgewidth=1.3)
        if row.mark.value < axis_start:
            face = PAPER if row.hollow else row.colour
            axes.plot([axis_start], [y], "<", color=row.colour, markerfacecolor=face, clip_on=False)
            axes.text(0.025, y, format_nats(row.mark.value), transform=transform, va="center_baseline", fontsize=7.2)
        elif math.isfinite(row.mark.value):
            interval_mark(axes, row.mark.at_least(axis_start), y, row.colour, row.hollow)


def _row_label(axes: Axes, row: Row, y: float) -> None:
    weight = "bold" if row.bold else "normal"
    lines = wrapped(row.label)
    for i, text in enumerate(lines):
        axes.text(
            -0.02,
            y + (i - (len(lines) - 1) / 2) * 0.62,
            text,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center_baseline",
            fontsize=8 if i == 0 else 7.2,
            fontweight=weight,
        )


def interval_mark(
    axes: Axes, mark: Mark, position: float, colour: str, hollow: bool, marker: str = "o", upright: bool = False
) -> None:
    """Draw a dot and its interval.

    Args:
        position: coordinate on the other axis.
        upright: draw the interval along y instead of x.
    """

    def draw(values: Sequence[float], **line_style: Any) -> None:
        positions = [position] * len(values)
        axes.plot(*((positions, values) if upright else (values, positions)), clip_on=False, color=colour, **line_style)

    if mark.low is not None and mark.high is not None:
        draw([mark.low, mark.high], linewidth=1.8, solid_capstyle="round")
    if mark.dots:
        draw(mark.dots, marker="|", linestyle="none", markersize=7, markeredgewidth=0.8)
    face = PAPER if hollow else colour
    draw([mark.value], marker=marker, markerfacecolor=face, markeredgewidth=1.3, linestyle="none", zorder=3)


def level_line(axes: Axes, mark: Mark, line: Line, upright: bool = True, colour: str = INK) -> None:
    """Draw a level across the panel with its interval as a band; ``upright`` for panels of rows."""
    draw, band = (axes.axvline, axes.axvspan) if upright else (axes.axhline, axes.axhspan)
    draw(mark.value, color=colour, linestyle=line, linewidth=1.2, zorder=1)
    if mark.low is not None and mark.high is not None and mark.high > mark.low:
        band(mark.low, mark.high, color=colour, alpha=0.13, linewidth=0, zorder=0.4)


def share_axis(axes: Axes, along: Along, values: Sequence[float]) -> None:
    """Scale an axis of a share from 0 to a little above the largest value, at most 1."""
    top = min(1.0, 1.12 * max([0.02, *finite(values)]))
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if top / s <= 7)
    axes.set(**{f"{along}lim": (-0.02 * top, 1.02 * top)})
    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(np.arange(0, top + 1e-9, step))))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))


def nats_axis(axes: Axes, along: Along, values: Sequence[float], sparse: bool = False) -> float:
    """Scale a logarithmic axis of nats, with round ticks; it starts two decades below the values' median at the earliest.

    Args:
        sparse: for a small panel: one tick per decade where there are at least one and a half decades.

    Returns:
        The start of the axis, in nats: smaller values are to be drawn there.
    """
    positive = [v for v in finite(values) if v > 0] or [1.0]
    start, end = 0.87 * min(v for v in positive if v >= np.median(positive) / 100), 1.15 * max(positive)
    if end / start < 2:
        start, end = start / 1.2, end * 1.2
    axes.set(**{f"{along}scale": "log", f"{along}lim": (start, end)})
    decades = np.log10(end / start)
    digits: tuple[float, ...] = (1, 2, 5) if decades < (1.5 if sparse else 3.2) else (1,)
    if decades < 1:
        digits = (1, 1.5, 2, 3, 4, 5, 7)
    exponents = range(int(np.floor(np.log10(start))), int(np.ceil(np.log10(end))) + 1)
    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator([d * 10.0**e for e in exponents for d in digits if start <= d * 10.0**e <= end]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: format_nats(v)))
    return float(start)


def cumulative_curve(axes: Axes, values: Sequence[float], axis_start: float, **line_style: Any) -> None:
    """Draw the share of values up to x in steps (the empirical distribution), from the left edge to the right one."""
    ordered = np.sort(values)
    x = np.concatenate([[axis_start], np.maximum(ordered, axis_start), [axes.get_xlim()[1]]])
    y = np.concatenate([[0], np.arange(1, len(ordered) + 1) / len(ordered), [1]])
    axes.step(x, y, where="post", **line_style)
    axes.set_ylim(-0.02, 1.02)


def finite(values: Sequence[float]) -> list[float]:
    """Return the finite values, the only ones that can be drawn."""
    return [value for value in values if math.isfinite(value)]


def format_nats(value: float) -> str:
    """Return a number of nats as an axis shows it."""
    return f"{value:.6g}" if value >= 1e-3 or value == 0 else f"{value:.0e}".replace("e-0", "e−").replace("e-", "e−")


def rows_height(rows: Sequence[Row]) -> float:
    """Return the height of a panel of rows in inches, at least what axis and legend need beside one or two rows."""
    return max(
        0.65, sum(0.21 * _HEADING_HEIGHT if not row.label else 0.21 + 0.13 * (len(wrapped(row.label)) - 1) for row in rows)
    )


def _lay_out(figure: Figure) -> None:
    """Give the panels of a figure their places, once for all its files: to lay out costs as much as to draw."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def to_svg(figure: Figure) -> str:
    """Return the figure as SVG for the inside of a page: no outside references, no background, the page's text colour and font.

    The same figure always gives the same text.
    """
    with figure_style(), io.StringIO() as file:
        _lay_out(figure)
        no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
        text = file.getvalue()
    name = re.sub(r"\W+", "-", str(figure.get_label())) or "figure"
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*|<!--.*?-->\s*|\sxmlns(:xlink)?=\"[^\"]*\"", "", text, flags=re.DOTALL)
    # clip paths are not needed: nothing is drawn outside its panel
    text = re.sub(r"\sclip-path=\"[^\"]*\"|<clipPath\b.*?</clipPath>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<defs>\s*</defs>|<g id=\"patch_1\">\s*<path[^>]*fill: none[^>]*/>\s*</g>\s*", "", text)
    text = re.sub(r'(\bid="|xlink:href="#)', lambda m: f"{m[1].replace('xlink:', '')}{name}-", text)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans, sans-serif)", text)
    text = re.sub(r"<[^>]*>", lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m[0]), text)  # a hundredth of a point is enough
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--page, Canvas)")
    attributes = f' role="img" aria-label="{name.replace("_", " ")}" style="stroke-linejoin: round; stroke-linecap: butt"'
    return text.replace("<svg", f"<svg{attributes}", 1).strip() + "\n"


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG on white, 150 dots per inch; the same figure always gives the same bytes."""
    with figure_style():
        _lay_out(figure)
        figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})
