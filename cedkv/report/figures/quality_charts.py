"""The charts of how good selections and scores are: gold coverage against accuracy, attention to gold tokens by head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from cedkv.analysis.best import by_group
from cedkv.analysis.comparison import column_values
from cedkv.analysis.paired import interval
from cedkv.analysis.quantities import ACCURACY, GOLD_COVERAGE, Quantity
from cedkv.analysis.results import GROUPS, ConditionResult
from cedkv.core.text import wrapped
from cedkv.core.values import Record
from cedkv.report.figures.plotting import (
    BLUE,
    GREY,
    PAPER,
    VERMILION,
    Mark,
    finite,
    legend,
    legend_entry,
    level_line,
    new_figure,
    share_axis,
)

LOOKS = dict(zip(GROUPS, ((BLUE, "o", False), (VERMILION, "^", False), (GREY, "o", True)), strict=True))
"""Group of conditions -> colour, marker, and whether the marker is hollow."""
NEAR = 0.025
"""Share of an axis below which two points share one label."""
LINE = 9.0
"""Points of a line of the key."""
STEPS = 24
"""Steps of the colour bar."""
FAINTEST = 0.01
"""Share of the largest value below which a cell is left blank."""


@dataclass(frozen=True)
class CoveragePoint:
    """A condition in the chart of coverage against accuracy, both over the ON samples that say where their answer is."""

    number: int
    condition: ConditionResult
    coverage: Mark
    accuracy: Mark
    n: int


def coverage_points(conditions: Sequence[ConditionResult]) -> list[CoveragePoint]:
    """Return the conditions that have a gold coverage, numbered group by group."""
    having = [(c, records) for c in by_group(conditions) if (records := GOLD_COVERAGE.having(c.records.on))]
    return [
        CoveragePoint(number, c, _mark(c, records, GOLD_COVERAGE), _mark(c, records, ACCURACY), len(records))
        for number, (c, records) in enumerate(having, 1)
    ]


def _mark(condition: ConditionResult, records: Sequence[Record], quantity: Quantity, arm: str = "select") -> Mark:
    values = finite(column_values(records, quantity.column(arm)))
    low, high = interval(values, condition.config.seed, f"{condition.label}-{quantity.name}-{arm}-with-gold")
    return Mark(float(np.mean(values)) if values else math.nan, low, high)


def coverage_against_accuracy(points: Sequence[CoveragePoint]) -> Figure:
    """Draw a numbered point per condition with its intervals both ways; its name is in the key at the right."""
    names = [(point, wrapped(point.condition.label)) for point in points]
    groups = len({point.condition.group for point in points})
    key_height = LINE / 72 * (sum(len(lines) for _, lines in names) + 1.5 * groups)
    figure, (axes, key) = new_figure(
        "coverage_accuracy", max(4.4, key_height + 1.0), columns=2, gridspec_kw={"width_ratios": [1.75, 1]}
    )
    axes.set_box_aspect(1)
    axes.set_anchor("N")
    share_axis(axes, "x", [1.0])
    first = points[0].condition
    levels = [(_mark(first, GOLD_COVERAGE.having(first.records.on), ACCURACY, arm).value, arm) for arm in ("base", "teacher")]
    ends = [end for point in points for end in (point.accuracy.high, point.accuracy.value) if end is not None]
    share_axis(axes, "y", [*ends, *(level for level, _ in levels)])
    for (level, _), line in zip(levels, (":", "--"), strict=True):
        level_line(axes, Mark(level), line, upright=False, colour=GREY)  # type: ignore[arg-type]  # a Line
    for point in reversed(points):  # candidates lie above points of reference
        _draw_point(axes, point)
    for x, y, label in _labels(axes, points):
        axes.annotate(label, (x, y), xytext=(3.5, 3), textcoords="offset points", fontsize=6.8)
    axes.set(xlabel=GOLD_COVERAGE.axis_title, title=ACCURACY.axis_title)
    _draw_key(key, names)
    shown = list(dict.fromkeys(point.condition.group for point in points))
    entries = [legend_entry(name, colour, marker, hollow=hollow) for name in shown for colour, marker, hollow in [LOOKS[name]]]
    legend(figure, [*entries, legend_entry("base", GREY, line=":"), legend_entry("teacher", GREY, line="--")])
    return figure


def _draw_point(axes: Axes, point: CoveragePoint) -> None:
    colour, marker, hollow = LOOKS[point.condition.group]
    x, y = point.coverage, point.accuracy
    for mark, other, along_x in ((x, y.value, True), (y, x.value, False)):
        if mark.low is not None and mark.high is not None:
            ends, level = (mark.low, mark.high), (other, other)
            axes.plot(*((ends, level) if along_x else (level, ends)), color=colour, linewidth=1, alpha=0.4, clip_on=False)
    face = PAPER if hollow else colour
    axes.plot([x.value], [y.value], marker, color=colour, markerfacecolor=face, markersize=5, clip_on=False, zorder=3)


def _labels(axes: Axes, points: Sequence[CoveragePoint]) -> list[tuple[float, float, str]]:
    """Return where to write which numbers; points that lie on one another share a label."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places: list[tuple[float, float, list[str]]] = []
    for point in points:
        x, y = point.coverage.value, point.accuracy.value
        near = (p for p in places if abs(p[0] - x) < NEAR * (right - left) and abs(p[1] - y) < NEAR * (top - bottom))
        place = next(near, None)
        if place is None:
            places.append((x, y, [str(point.number)]))
        else:
            place[2].append(str(point.number))
    return [(x, y, ", ".join(numbers)) for x, y, numbers in places]


def _draw_key(axes: Axes, names: Sequence[tuple[CoveragePoint, list[str]]]) -> None:
    """Write the numbers and names of the points, group by group, from the top down."""
    axes.set_axis_off()
    down = 0.0

    def write(x: float, text: str, size: float, **style: Any) -> None:
        at: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(text, (x, 1), xytext=(0, -down), fontsize=size, va="center_baseline", in_layout=False, **at, **style)

    for group, members in groupby(names, key=lambda named: named[0].condition.group):
        write(0, group, 7.2, style="italic")
        for point, lines in members:
            for i, line in enumerate(lines):
                down += LINE
                write(0.11, line, 6.2 if i else 6.8)
                if not i:
                    write(0.08, str(point.number), 6.8, ha="right")
        down += 1.5 * LINE


@dataclass(frozen=True)
class GoldAttention:
    """Attention of a query's rows to all gold tokens of its demo, mean over ``n`` samples.

    window: last rows of the query over which the mean is taken; None for all. layers: all layers, by their
    number in the model. mass: (layers, H), shares of the attention of a head.
    """

    window: int | None
    layers: list[int]
    mass: NDArray[np.float64]
    n: int

    @property
    def rows(self) -> str:
        """The query's rows in words."""
        if self.window is None:
            return "all query tokens"
        return f"the last {self.window} query tokens" if self.window > 1 else "the last query token"

    def largest(self, count: int) -> list[tuple[int, int, float]]:
        """Return layer, head and mass of the heads with the largest mass, the largest first."""
        order = np.argsort(-self.mass, axis=None, kind="stable")[:count]
        cells = zip(*np.unravel_index(order, self.mass.shape), strict=True)
        return [(self.layers[row], int(head), float(self.mass[row, head])) for row, head in cells]


def gold_attention(heads: Sequence[Record]) -> GoldAttention | None:
    """Return the attention to gold tokens over all units of a condition; None where it has none.

    Args:
        heads: its records of type ``heads``, all of the same rows and layers.
    """
    if not heads:
        return None
    n = sum(record["n"] for record in heads)
    return GoldAttention(heads[0]["window"], heads[0]["layers"], np.sum([record["total"] for record in heads], axis=0) / n, n)


def gold_attentions(conditions: Sequence[ConditionResult]) -> list[GoldAttention]:
    """Return the attention to gold tokens of the rows that conditions read, once per rows."""
    by_rows: dict[int | None, GoldAttention] = {}
    for condition in conditions:
        found = gold_attention(condition.records.heads)
        if found is not None:
            by_rows.setdefault(found.window, found)
    return list(by_rows.values())


def attention_by_head(attention: GoldAttention) -> Figure:
    """Draw a cell per layer and head, the more opaque the larger its share of attention to gold tokens."""
    n_layers, n_heads = attention.mass.shape
    height = min(4.2, max(1.0, 0.16 * n_heads))
    name = "gold_attention" if attention.window is None else f"gold_attention_{attention.window}"
    figure, (axes, bar) = new_figure(name, height + 0.75, columns=2, gridspec_kw={"width_ratios": [40, 1]})
    largest = float(attention.mass.max()) or 1.0
    cells = [
        (layer, head, value / largest) for (layer, head), value in np.ndenumerate(attention.mass) if value >= FAINTEST * largest
    ]
    _fill(axes, [(layer - 0.5, head - 0.5, 1.0, 1.0) for layer, head, _ in cells], [share for *_, share in cells])
    axes.set(xlim=(-0.5, n_layers - 0.5), ylim=(n_heads - 0.5, -0.5), xlabel="layer", title="head")
    every = max(1, math.ceil(n_layers / 20))
    axes.set_xticks(range(0, n_layers, every), [str(layer) for layer in attention.layers[::every]])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.spines[["top", "right"]].set_visible(True)
    axes.grid(visible=False)
    step = largest / STEPS
    _fill(bar, [(0.0, i * step, 1.0, step) for i in range(STEPS)], [(i + 0.5) / STEPS for i in range(STEPS)])
    bar.set(xlim=(0, 1), ylim=(0, largest))
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.yaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.3g}"))
    bar.grid(visible=False)
    return figure


def _fill(axes: Axes, boxes: Sequence[tuple[float, float, float, float]], opacities: Sequence[float]) -> None:
    """Fill boxes (left, bottom, width, height) at the given opacities, so that they can be told on light and on dark."""
    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in boxes]
    colours = [(*to_rgb(BLUE), opacity) for opacity in opacities]
    axes.add_collection(PolyCollection(corners, facecolors=colours, linewidths=0))
