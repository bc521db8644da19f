"""How figures look and how they are written: one style, a few kinds of panels, SVG for the page and PNG for everything else.

A figure's label (``figure.get_label()``) is its short name. Nothing here uses pyplot or keeps state. Text is black in a PNG
and takes the page's own colour in an SVG; the other colours stand out from white and from black alike (3:1 and more) and
can be told apart without telling red from green.
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

BLUE, GREEN, VERMILION, PURPLE, OCHRE, GREY = "#0072b2", "#009e73", "#d55e00", "#b4609b", "#a47b00", "#808080"
INK, PAPER = "#1c2026", "#fffffe"
"""Text, and the inside of hollow marks: in an SVG the page's own colours."""

Along = Literal["x", "y"]
Line = Literal["-", "--", "-.", ":", "none"]
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, OCHRE, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH = 6.2
"""Inches: a column of the page, where 8.5 point are read at their own size."""

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
    """A mean with its interval; ``dots`` are single values around it (random trials)."""

    value: float
    low: float | None = None
    high: float | None = None
    dots: tuple[float, ...] = ()

    def at_least(self, least: float) -> Mark:
        """The mark with what is below an axis moved to its lower end."""
        low, high = (None if v is None else max(v, least) for v in (self.low, self.high))
        return Mark(max(self.value, least), low, high, tuple(max(v, least) for v in self.dots))


@dataclass(frozen=True)
class Row:
    """A line of a chart of rows: its label, its mark, and further values, each with the marker and colour to show it."""

    label: str
    mark: Mark
    colour: str = BLUE
    hollow: bool = False
    strong: bool = False
    others: tuple[tuple[float, str, str], ...] = ()


def style() -> AbstractContextManager[None]:
    """The settings everything is drawn under, whatever the user's own are."""
    plain: Any = mpl.rcParamsDefault  # matplotlib's own, whatever the user has set
    kept = {name: value for name, value in plain.items() if not name.startswith(("backend", "date.epoch"))}
    settings: Any = {**kept, **_STYLE}
    return mpl.rc_context(settings)


def new(name: str, height: float, columns: int = 1, rows: int = 1, **layout: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of the page's width, and its panels from left to right."""
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05, wspace=0.06), label=name)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **layout).ravel())


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Below the panels, in as many columns as fit."""
    lengths = [len(str(handle.get_label())) + 7 for handle in handles]

    def width(columns: int) -> int:
        return sum(max(lengths[i] for i in part) for part in np.array_split(range(len(lengths)), columns))

    columns = next((n for n in range(len(handles), 1, -1) if width(n) <= 100), 1)
    columns = -(-len(handles) // -(-len(handles) // columns))  # no row with a single straggler
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)


def key(label: str, colour: str, marker: str = "", line: Line = "none", hollow: bool = False) -> Line2D:
    """An entry of a legend."""
    face = PAPER if hollow else colour
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=label, markerfacecolor=face)


def rows_panel(axes: Axes, rows: Sequence[Row], least: float = -math.inf) -> None:
    """Rows from top to bottom: a dot and its interval on a line of its own, the label at the left. An empty label is a gap.

    What is below ``least``, the axis' lower end, becomes an arrow there, with its value.
    """
    heights = [0.5 if not row.label else 1 + 0.62 * (len(wrapped(row.label)) - 1) for row in rows]
    edges = np.concatenate([[0], np.cumsum(heights)])
    transform = axes.get_yaxis_transform()
    axes.set_ylim(edges[-1], 0)
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    for row, top, bottom in zip(rows, edges[:-1], edges[1:], strict=True):
        y = (top + bottom) / 2
        if not row.label:
            continue
        axes.plot([0, 1], [y, y], transform=transform, color=GREY, alpha=0.22, linewidth=0.6, zorder=0.5)
        lines = wrapped(row.label)
        for at, text in enumerate(lines):
            offset = (at - (len(lines) - 1) / 2) * 0.62
            axes.text(
                -0.02, y + offset, text, transform=transform, ha="right", va="center_baseline",
                fontsize=8 if at == 0 else 7.2, fontweight="bold" if row.strong else "normal",
            )  # fmt: skip
        for value, marker, colour in row.others:
            axes.plot(
                [max(value, least)], [y], marker, color=colour, markersize=4.5 if marker == "x" else 8, markeredgewidth=1.3
            )
        if row.mark.value < least:
            axes.plot([least], [y], "<", color=row.colour, markerfacecolor=PAPER if row.hollow else row.colour, clip_on=False)
            axes.text(0.025, y, nats(row.mark.value), transform=transform, va="center_baseline", fontsize=7.2)
        elif math.isfinite(row.mark.value):
            interval_mark(axes, row.mark.at_least(least), y, row.colour, row.hollow)


def interval_mark(
    axes: Axes, mark: Mark, at: float, colour: str, hollow: bool, marker: str = "o", upright: bool = False
) -> None:
    """A dot and its interval, along x, or along y if ``upright``."""

    def draw(values: Sequence[float], places: Sequence[float], **how: Any) -> None:
        axes.plot(*((places, values) if upright else (values, places)), clip_on=False, **how)

    if mark.low is not None and mark.high is not None:
        draw([mark.low, mark.high], [at, at], color=colour, linewidth=1.8, solid_capstyle="round")
    if mark.dots:
        draw(mark.dots, [at] * len(mark.dots), color=colour, marker="|", linestyle="none", markersize=7, markeredgewidth=0.8)
    face = PAPER if hollow else colour
    draw([mark.value], [at], color=colour, marker=marker, markerfacecolor=face, markeredgewidth=1.3, linestyle="none", zorder=3)


def level_line(axes: Axes, mark: Mark, line: Line, upright: bool = True, colour: str = INK) -> None:
    """A level across the panel with its interval as a band; ``upright`` for panels of rows."""
    draw, band = (axes.axvline, axes.axvspan) if upright else (axes.axhline, axes.axhspan)
    draw(mark.value, color=colour, linestyle=line, linewidth=1.2, zorder=1)
    if mark.low is not None and mark.high is not None and mark.high > mark.low:
        band(mark.low, mark.high, color=colour, alpha=0.13, linewidth=0, zorder=0.4)


def share_axis(axes: Axes, along: Along, values: Sequence[float]) -> None:
    """A share from 0 to a little above the largest value, or to 1."""
    top = min(1.0, 1.12 * max([0.02, *finite(values)]))
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if top / s <= 7)
    axes.set(**{f"{along}lim": (-0.02 * top, 1.02 * top)})
    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(np.arange(0, top + 1e-9, step))))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))


def nats_axis(axes: Axes, along: Along, values: Sequence[float], sparse: bool = False) -> float:
    """A logarithmic axis of nats with ticks that are read at once; it ends two decades below the values' median.

    ``sparse`` is for a small panel: a tick a decade where there are two of them.

    Returns:
        Its lower end: smaller values are to be drawn there.
    """
    there = [v for v in finite(values) if v > 0] or [1.0]
    top, least = 1.15 * max(there), 0.87 * min(v for v in there if v >= np.median(there) / 100)
    if top / least < 2:
        least, top = least / 1.2, top * 1.2
    axes.set(**{f"{along}scale": "log", f"{along}lim": (least, top)})
    decades = np.log10(top / least)
    digits: tuple[float, ...] = (1, 2, 5) if decades < (1.5 if sparse else 3.2) else (1,)
    if decades < 1:
        digits = (1, 1.5, 2, 3, 4, 5, 7)
    exponents = range(int(np.floor(np.log10(least))), int(np.ceil(np.log10(top))) + 1)
    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator([d * 10.0**e for e in exponents for d in digits if least <= d * 10.0**e <= top]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: nats(v)))
    return float(least)


def cumulative(axes: Axes, found: Sequence[float], least: float, **how: Any) -> None:
    """Share of values up to x, in steps, from the left edge to the right one."""
    ordered = np.sort(found)
    x = np.concatenate([[least], np.maximum(ordered, least), [axes.get_xlim()[1]]])
    y = np.concatenate([[0], np.arange(1, len(ordered) + 1) / len(ordered), [1]])
    axes.step(x, y, where="post", **how)
    axes.set_ylim(-0.02, 1.02)


def finite(values: Sequence[float]) -> list[float]:
    """The numbers that can be drawn."""
    return [value for value in values if math.isfinite(value)]


def nats(value: float) -> str:
    """A number of nats on an axis."""
    return f"{value:.6g}" if value >= 1e-3 or value == 0 else f"{value:.0e}".replace("e-0", "e−").replace("e-", "e−")


def wrapped(label: str, width: int = 36) -> list[str]:
    """A label on one line where it fits, else its first part and below it the others, broken between settings."""
    first, *parts = label.split(" · ")
    if len(label) <= width:
        return [label]
    lines = [first]
    for part in parts:
        if len(lines) > 1 and len(lines[-1]) + 3 + len(part) <= width + 4:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines


def rows_height(rows: Sequence[Row]) -> float:
    """Inches for a panel of rows; with less than two or three of them, axis and legend would leave it no room."""
    return max(0.65, sum(0.1 if not row.label else 0.21 + 0.13 * (len(wrapped(row.label)) - 1) for row in rows))


def to_svg(figure: Figure) -> str:
    """The figure as SVG to go inside a page: no outside references, no background, the page's own colour and type for text.

    The same figure always gives the same text.
    """
    with style(), io.StringIO() as file:
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        text = file.getvalue()
    name = re.sub(r"\W+", "-", str(figure.get_label())) or "figure"
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*|<!--.*?-->\s*|\sxmlns(:xlink)?=\"[^\"]*\"", "", text, flags=re.DOTALL)
    text = re.sub(r"\sclip-path=\"[^\"]*\"|<clipPath\b.*?</clipPath>\s*", "", text, flags=re.DOTALL)  # nothing leaves its panel
    text = re.sub(r"\s*<defs>\s*</defs>|<g id=\"patch_1\">\s*<path[^>]*fill: none[^>]*/>\s*</g>\s*", "", text)
    text = re.sub(r'(\bid="|xlink:href="#)', lambda m: f"{m[1].replace('xlink:', '')}{name}-", text)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans, sans-serif)", text)
    text = re.sub(r"<[^>]*>", lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m[0]), text)  # a hundredth of a point is enough
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--page, Canvas)")
    about = f' role="img" aria-label="{name.replace("_", " ")}" style="stroke-linejoin: round; stroke-linecap: butt"'
    return text.replace("<svg", f"<svg{about}", 1).strip() + "\n"


def save_png(figure: Figure, path: Path) -> None:
    """The figure as a PNG on white, 150 dots an inch; the same figure always gives the same bytes."""
    with style():
        figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})
