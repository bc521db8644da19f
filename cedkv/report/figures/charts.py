"""The charts of a comparison, but for OFF prompts, each drawn from its conditions; the captions are in ``captions``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cedkv.analysis.best import by_group
from cedkv.analysis.comparison import series, setting
from cedkv.analysis.families import MODE, POSITIONING, SINK, SOURCE
from cedkv.analysis.paired import interval
from cedkv.analysis.quantities import ACCURACY, KL_TO_TEACHER, Quantity
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import number
from cedkv.report.figures.plotting import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    MARKERS,
    VERMILION,
    Line,
    Mark,
    Row,
    finite,
    interval_mark,
    legend,
    legend_entry,
    level_line,
    nats_axis,
    new_figure,
    rows_height,
    rows_panel,
    share_axis,
)


def by_condition(results: Sequence[ConditionResult], quantity: Quantity) -> Figure:
    """Draw a row per condition: its mean and interval, its random spans; base and teacher as lines across."""

    def row(c: ConditionResult) -> Row:
        random = ((mark_of(c, quantity, "random").value, "x", GREY),) if has_random(c) else ()
        return condition_row(c, mark_of(c, quantity), bold=c is results[0], extra_marks=random)

    rows = ordered_rows(results, row)
    levels: dict[str, tuple[Mark, Line]] = {"base": (mark_of(results[0], quantity, "base"), ":")}
    if quantity is ACCURACY:
        levels["teacher"] = mark_of(results[0], quantity, "teacher"), "--"
    marks = [row.mark for row in rows if row.label] + [mark for mark, _ in levels.values()]
    drawn = [v for m in marks for v in (m.value, m.low, m.high) if v is not None]
    drawn += [value for row in rows for value, *_ in row.extra_marks]
    figure, (axes,) = new_figure(f"{quantity.name}_by_condition", rows_height(rows) + 0.9)
    axis_start = -math.inf
    if quantity is ACCURACY:
        share_axis(axes, "x", drawn)
    else:
        axis_start = nats_axis(axes, "x", drawn)
    rows_panel(axes, rows, axis_start)
    for mark, line in levels.values():
        level_line(axes, mark, line)
    entries = row_entries(results)
    if any(row.extra_marks for row in rows):
        entries.append(legend_entry("its random spans", GREY, "x"))
    entries += [legend_entry(f"{arm} {number(mark.value)}", INK, line=line) for arm, (mark, line) in levels.items()]
    legend(figure, entries)
    axes.set_xlabel(quantity.axis_title)
    return figure


@dataclass(frozen=True)
class _Curve:
    """A line of ``varied``: an arm of a group of conditions."""

    group: Sequence[ConditionResult]
    arm: str
    colour: str
    marker: str


def varied(
    name: str, x_label: str, groups: Sequence[list[ConditionResult]], tick: Callable[[ConditionResult], str], with_random: bool
) -> Figure:
    """Draw panels of accuracy and KL to the teacher, with what varies within a group along x and one line per group.

    Args:
        tick: the label of a condition on the x axis.
        with_random: also draw the random spans, where there is a single group.
    """
    ticks = list(dict.fromkeys(tick(c) for group in groups for c in group))
    curves = [_Curve(group, "select", COLOURS[i % 6], MARKERS[(i + i // 6) % 6]) for i, group in enumerate(groups)]
    if with_random and len(groups) == 1 and all(has_random(c) for c in groups[0]):
        curves.append(_Curve(groups[0], "random", GREY, "x"))
    figure, panels = new_figure(name, 2.7 + 0.12 * max(0, len(groups) - 3), columns=2)
    for axes, quantity in zip(panels, (ACCURACY, KL_TO_TEACHER), strict=True):
        _varied_panel(axes, quantity, curves, lambda c: ticks.index(tick(c)))
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlim(-0.5, len(ticks) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set(title=quantity.axis_title, xlabel=x_label)
    labels = group_names(groups)
    entries = [legend_entry(label, c.colour, c.marker, "-") for c, label in zip(curves, labels, strict=False)]
    if len(curves) > len(groups):
        entries.append(legend_entry("random spans", GREY, "x", ":"))
    legend(figure, [*entries, legend_entry("base", INK, line=":"), legend_entry("teacher", INK, line="--")])
    return figure


def _varied_panel(
    axes: Axes, quantity: Quantity, curves: Sequence[_Curve], tick_index: Callable[[ConditionResult], int]
) -> None:
    """Draw the curves of one quantity, shifted sideways so that their intervals do not overlap; base and teacher as lines."""
    first = curves[0].group[0]
    base = mark_of(first, quantity, "base")
    marks = [[mark_of(c, quantity, curve.arm) for c in curve.group] for curve in curves]
    drawn = [v for line in marks for m in line for v in (m.value, m.low, m.high) if v is not None] + [base.value]
    axis_start = -math.inf
    if quantity is ACCURACY:
        teacher = mark_of(first, quantity, "teacher")
        share_axis(axes, "y", [*drawn, teacher.value])
        level_line(axes, Mark(teacher.value), "--", upright=False)
    else:
        axis_start = nats_axis(axes, "y", drawn)
    level_line(axes, Mark(max(base.value, axis_start)), ":", upright=False)
    shift = min(0.11, 0.5 / len(curves))
    for i, (curve, line) in enumerate(zip(curves, marks, strict=True)):
        positions = [tick_index(c) + shift * (i - (len(curves) - 1) / 2) for c in curve.group]
        visible = [mark.at_least(axis_start) for mark in line]
        dash = ":" if curve.arm == "random" else "-"
        axes.plot(positions, [m.value for m in visible], color=curve.colour, linewidth=1, alpha=0.6, linestyle=dash)
        for x, mark in zip(positions, visible, strict=True):
            interval_mark(axes, mark, x, curve.colour, False, curve.marker, upright=True)


def ranks(condition: ConditionResult, agreement: dict[str, Any]) -> Figure:
    """Draw ranks of candidate spans by attention and by causal drop within their sample, and the samples' correlations.

    Args:
        agreement: of ``rank_agreement``.
    """
    figure, (left, right) = new_figure("attention_causal_drop", 3.0, columns=2)
    counts = np.zeros((10, 10))
    for record in condition.records.on:
        attention, drop = record.get("candidate_attention", []), record.get("candidate_causal_drop", [])
        if len(attention) > 1:
            x, y = ((10 * _rank_share(scores)).astype(int) for scores in (attention, drop))
            np.add.at(counts, (x, y), 1)
    x, y = np.nonzero(counts)
    in_cell = counts[x, y]
    left.scatter(x / 10 + 0.05, y / 10 + 0.05, s=130 * in_cell / in_cell.max(), color=BLUE, linewidths=0)
    left.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, zorder=1)
    left.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="rank by attention", title="rank by causal drop", box_aspect=1)
    left.set_xticks([0, 0.5, 1], ["lowest", "middle", "highest"])
    left.set_yticks([0, 0.5, 1], ["lowest", "middle", "highest"])
    correlations = [value for value in agreement["per_sample"] if value is not None]
    right.hist(correlations, bins=np.arange(-1, 1.01, 0.1).tolist(), color=BLUE, alpha=0.55, edgecolor=BLUE, linewidth=0.6)
    right.axvline(0, color=GREY, linewidth=0.8)
    level_line(right, Mark(agreement["per_sample_mean"], agreement["low"], agreement["high"]), "-", colour=VERMILION)
    right.set(xlim=(-1.02, 1.02), xlabel="Spearman's correlation", title="samples")
    right.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    right.grid(visible=False, axis="x")
    pooled = "" if agreement["pooled"] is None else f"; all candidates pooled {agreement['pooled']:.2f}"
    legend(figure, [legend_entry(f"mean {agreement['per_sample_mean']:.2f}{pooled}", VERMILION, line="-")])
    return figure


def mark_of(condition: ConditionResult, quantity: Quantity, arm: str = "select") -> Mark:
    """Return mean and interval of an arm (random: of the mean over trials); NaN without a finite value."""
    values = finite(series(condition, quantity, arm))
    low, high = interval(values, condition.config.seed, f"{condition.label}-{quantity.name}-{arm}")
    return Mark(float(np.mean(values)) if values else math.nan, low, high)


def _rank_share(scores: Sequence[float]) -> Any:
    """Return each value's rank divided by their number, from 0 to below 1; equal values keep their order."""
    order = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    return order / len(scores)


def ordered_rows(results: Sequence[ConditionResult], row: Callable[[ConditionResult], Row]) -> list[Row]:
    """Return the rows group by group; where there are several groups, each below a heading."""
    groups = [(name, [row(c) for c in group]) for name, group in groupby(by_group(results), key=lambda c: c.group)]
    if len(groups) == 1:
        return groups[0][1]
    return [drawn for name, rows in groups for drawn in (Row("", Mark(math.nan), heading=name), *rows)]


def condition_row(condition: ConditionResult, mark: Mark, bold: bool, extra_marks: tuple[tuple[float, str, str], ...]) -> Row:
    colour = GREY if condition.reference else BLUE
    return Row(condition.label, mark, colour, hollow=condition.reference, bold=bold, extra_marks=extra_marks)


def row_entries(results: Sequence[ConditionResult]) -> list[Line2D]:
    """Return the legend entries of ``condition_row``."""
    entries = [legend_entry("candidate", BLUE, "o", "-")]
    if any(c.reference for c in results):
        entries.append(legend_entry("reference point", GREY, "o", "-", hollow=True))
    return entries


def has_random(condition: ConditionResult) -> bool:
    on, mode = condition.records.on, setting(condition, MODE)
    return bool(on and on[0]["correct_random"]) and mode != "random_span" and not condition.reference


def group_names(groups: Sequence[Sequence[ConditionResult]]) -> list[str]:
    """Return names that tell groups of conditions apart: by the factors that vary between groups and not within one."""
    if len(groups) < 2:
        return ["selected spans"] * len(groups)
    constant_factors = [
        {name: value for name, value in group[0].factors.items() if all(c.factors.get(name) == value for c in group)}
        for group in groups
    ]
    first = constant_factors[0]
    varying = [name for name in first if any(factors.get(name) != first[name] for factors in constant_factors)]
    templates = {MODE: "{}", SOURCE: "{}", POSITIONING: "{}", SINK: "{} sinks"}
    names = []
    for factors, group in zip(constant_factors, groups, strict=True):
        parts = []
        for name in varying:
            if name in factors:
                template = templates.get(name, name.rsplit(".", 1)[-1] + " {}")
                parts.append(template.format(str(factors[name]).removesuffix("_span")))
        names.append(" · ".join(parts) or group[0].label)
    return names
