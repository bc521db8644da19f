"""The charts of OFF prompts: how far the injected prefix moves them, for one run and for the conditions of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cedkv.analysis.comparison import series, setting
from cedkv.analysis.families import MODE
from cedkv.analysis.quantities import OFF_DELTA, OFF_FURTHER
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import number, plural
from cedkv.core.values import Record
from cedkv.metrics_phase2 import median, p99
from cedkv.report.figures.charts import condition_row, ordered_rows, row_entries
from cedkv.report.figures.plotting import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PURPLE,
    VERMILION,
    Line,
    Mark,
    Row,
    cumulative_curve,
    finite,
    legend,
    legend_entry,
    nats_axis,
    new_figure,
    rows_height,
    rows_panel,
)


def off_curve(deltas: Sequence[float], limit: float | None) -> Figure:
    """Draw the distribution of one run's OFF deltas, with the 99th percentile and, where there is one, its limit."""
    figure, (axes,) = new_figure("off_delta", 2.7)
    axis_start = nats_axis(axes, "x", [*deltas, *([limit] if limit else [])])
    cumulative_curve(axes, deltas, axis_start, color=BLUE, linewidth=1.8)
    worst = p99(deltas) or 0.0
    axes.plot([max(worst, axis_start)], [float(np.mean(np.array(deltas) <= worst))], "o", color=BLUE, markersize=6)
    entries = [legend_entry("OFF prompts", BLUE, line="-"), legend_entry(f"99th percentile {number(worst)}", BLUE, "o")]
    if limit:
        entries.append(limit_line(axes, limit))
    axes.set(title="share of OFF prompts", xlabel=OFF_DELTA.axis_title)
    legend(figure, entries)
    return figure


def kl_by_position(off: Sequence[Record]) -> list[list[float]]:
    """Return KL(select || base) of each OFF prompt that has the position: the next token, then base's own answer."""
    rows = [[record[OFF_DELTA.column("select")], *record.get(OFF_FURTHER.column("select"), ())] for record in off]
    longest = max((len(row) for row in rows), default=0)
    return [[row[position] for row in rows if position < len(row)] for position in range(longest)]


def off_by_position(positions: Sequence[Sequence[float]], limit: float | None) -> Figure:
    """Draw median and 99th percentile of the KL at each position; position 0 is the next token, which the limit is for."""
    drawn = [(at, values) for at, values in enumerate(map(finite, positions)) if values]
    lines = {
        "99th percentile": [(at, p99(values) or 0.0) for at, values in drawn],
        "median": [(at, median(values) or 0.0) for at, values in drawn],
    }
    figure, (axes,) = new_figure("off_by_position", 2.7)
    shown = [value for line in lines.values() for _, value in line]
    axis_start = nats_axis(axes, "y", [*shown, *([limit] if limit else [])])
    entries = []
    for (name, line), marker, colour in zip(lines.items(), ("D", "o"), (INK, BLUE), strict=True):
        axes.plot([at for at, _ in line], [max(v, axis_start) for _, v in line], "-", marker=marker, color=colour)
        entries.append(legend_entry(name, colour, marker, line="-"))
    if limit:
        axes.plot([-0.35, 0.35], [limit, limit], color=VERMILION, linestyle="--", linewidth=1.2)
        entries.append(legend_entry(f"limit {number(limit)}", VERMILION, line="--"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.set(title=OFF_DELTA.axis_title, xlabel="tokens of base's own answer that are given", xlim=(-0.5, len(positions) - 0.5))
    legend(figure, entries)
    return figure


def off_rows(results: Sequence[ConditionResult], limit: float) -> Figure:
    """Draw a row per condition: quartiles and 99th percentile of its OFF prompts, against the limit."""

    def row(c: ConditionResult) -> Row:
        deltas = finite(series(c, OFF_DELTA))
        low, median, high = (float(v) for v in np.percentile(deltas, [25, 50, 75]))
        worst = ((p99(deltas) or 0.0, "|", INK),)
        return condition_row(c, Mark(median, low, high), bold=c is results[0], extra_marks=worst)

    rows = ordered_rows(results, row)
    drawn = [v for r in rows if r.label for v in (r.mark.value, r.mark.low, r.extra_marks[0][0]) if v is not None]
    figure, (axes,) = new_figure("off_delta_by_condition", rows_height(rows) + 0.9)
    rows_panel(axes, rows, nats_axis(axes, "x", [*drawn, limit]))
    entries = [*row_entries(results), legend_entry("99th percentile", INK, "|"), limit_line(axes, limit)]
    legend(figure, entries)
    axes.set_xlabel(OFF_DELTA.axis_title)
    return figure


def off_curves(results: Sequence[ConditionResult], best: ConditionResult | None, limit: float) -> Figure:
    """Draw a curve per condition; in colour the first, the best, the whole demonstration, and the candidate that moves most."""
    curves = [(c, finite(series(c, OFF_DELTA))) for c in results]
    figure, (axes,) = new_figure("off_delta_curves", 3.1)
    axis_start = nats_axis(axes, "x", [*(delta for _, deltas in curves for delta in deltas), limit])
    full_demo = next((c for c in results if setting(c, MODE) == "full_demo"), None)
    moves_most = max(curves, key=lambda curve: (not curve[0].reference, p99(curve[1])))[0]
    highlights: list[tuple[ConditionResult | None, str, Line]] = [
        (moves_most, INK, ":"),
        (full_demo, GREEN, "--"),
        (best, PURPLE, "-."),
        (results[0], BLUE, "-"),
    ]
    highlighted = {c.key: (colour, line) for c, colour, line in highlights if c is not None}  # the last role of several wins
    entries = []
    for condition, deltas in sorted(curves, key=lambda curve: curve[0].key in highlighted):
        colour, line = highlighted.get(condition.key, (GREY, "-"))
        width, alpha = (1.8, 1.0) if condition.key in highlighted else (0.8, 0.55)
        cumulative_curve(axes, deltas, axis_start, color=colour, linestyle=line, linewidth=width, alpha=alpha)
        if condition.key in highlighted:
            entries.append(legend_entry(condition.label, colour, line=line))
    if len(highlighted) < len(curves):
        entries.append(legend_entry(plural(len(curves) - len(highlighted), "other condition"), GREY, line="-"))
    axes.set(title="share of OFF prompts", xlabel=OFF_DELTA.axis_title)
    legend(figure, [*entries, limit_line(axes, limit)])
    return figure


def limit_line(axes: Axes, limit: float) -> Line2D:
    """Draw the limit of the OFF delta across a panel, and return its legend entry."""
    axes.axvline(limit, color=VERMILION, linestyle="--", linewidth=1.2)
    return legend_entry(f"limit {number(limit)}", VERMILION, line="--")


def off_by_selector(group: Sequence[ConditionResult]) -> Figure:
    """Draw a panel per selector of a family: its curve, and in each panel that of the whole demonstration."""
    full_demo = next(c for c in group if setting(c, MODE) == "full_demo")
    selected = [c for c in group if c is not full_demo]
    columns = 3 if len(selected) > 2 else len(selected)
    rows = -(-len(selected) // columns)
    figure, panels = new_figure("off_delta_by_selector", 0.75 + 1.3 * rows, columns, rows, sharex=True, sharey=True)
    deltas = {c.key: finite(series(c, OFF_DELTA)) for c in group}
    axis_start = nats_axis(panels[0], "x", [delta for of_condition in deltas.values() for delta in of_condition], sparse=True)
    for axes, condition in zip(panels, selected, strict=False):
        colour = GREY if condition.reference else BLUE
        cumulative_curve(axes, deltas[full_demo.key], axis_start, color=GREEN, linestyle="--", linewidth=1.2)
        cumulative_curve(axes, deltas[condition.key], axis_start, color=colour, linewidth=1.8)
        axes.set_title(str(setting(condition, MODE)).removesuffix("_span"), fontsize=8, pad=4)
        axes.set_yticks([0, 0.5, 1])
    for axes in panels[len(selected) :]:
        axes.remove()
    for axes in panels[max(0, len(selected) - columns) : len(selected)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(OFF_DELTA.axis_title, fontsize=8)
    entries = [legend_entry("candidate", BLUE, line="-"), legend_entry("reference point", GREY, line="-")]
    legend(figure, [*entries, legend_entry("the whole demonstration", GREEN, line="--")])
    return figure
