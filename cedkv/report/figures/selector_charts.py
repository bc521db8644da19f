"""The charts that compare selectors: accuracy and KL by their budget, accuracy by where the answer is in the demo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cedkv.analysis.best import ranked
from cedkv.analysis.comparison import column_values, series, setting
from cedkv.analysis.families import BUDGET, LENGTH, MODE, Family, selector_name, selectors_like_the_first
from cedkv.analysis.paired import interval, ratio_interval, share_interval
from cedkv.analysis.quantities import ACCURACY, KL_TO_TEACHER
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import plural
from cedkv.core.values import Record
from cedkv.metrics_phase2 import relative_kl
from cedkv.report.figures.charts import has_random, mark_of
from cedkv.report.figures.plotting import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MARKERS,
    OCHRE,
    PURPLE,
    VERMILION,
    Line,
    Mark,
    finite,
    interval_mark,
    legend,
    legend_entry,
    level_line,
    nats_axis,
    new_figure,
    share_axis,
)

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, OCHRE)
"""Of candidates; points of reference are grey, and those in ``BOUNDS`` have the text's colour."""
BOUNDS = ("oracle_span", "greedy_teacher")
"""Selectors that know more than a selector may, drawn dashed: the answer's place, and the teacher's distribution."""
MAX_WITH_INTERVALS = 10
"""Lines up to which intervals are drawn; more of them would cover each other."""
MAX_CANDIDATES = 8
"""Candidates in the chart of accuracy by depth."""
DEPTHS = ("first quarter", "second", "third", "last quarter")


@dataclass(frozen=True)
class Style:
    """How a line is drawn."""

    colour: str
    marker: str
    line: Line = "-"
    hollow: bool = False


RANDOM, TEACHER = Style(GREY, "x", ":"), Style(INK, "^", "--")


def styles(conditions: Sequence[ConditionResult]) -> list[Style]:
    """Return a style for each condition's line that tells it from the others, by its selector and its role."""
    found, candidates, references = [], 0, 0
    for c in conditions:
        if (mode := setting(c, MODE)) in BOUNDS:
            found.append(Style(INK, ("D", "s")[BOUNDS.index(mode)], "--", hollow=True))
        elif c.reference:
            found.append(Style(GREY, MARKERS[references % len(MARKERS)], hollow=True))
            references += 1
        else:
            lap, i = divmod(candidates, len(COLOURS))
            found.append(Style(COLOURS[i], MARKERS[(i + lap) % len(MARKERS)]))
            candidates += 1
    return found


@dataclass(frozen=True)
class BudgetLine:
    """An arm of one selector's conditions, by budget."""

    name: str
    group: Family
    arm: str
    style: Style


def budget_lines(selectors: Sequence[Family]) -> list[BudgetLine]:
    """Return a line per selector, candidates first, and the random arm in place of the selector that draws a single trial.

    Args:
        selectors: of ``selectors_by_budget``.
    """
    with_random = max((group for group in selectors if all(has_random(c) for c in group)), key=len, default=None)
    shown = [group for group in selectors if with_random is None or setting(group[0], MODE) != "random_span"]
    shown.sort(key=lambda group: (setting(group[0], MODE) in BOUNDS, group[0].reference))
    looks = styles([group[0] for group in shown])
    lines = [BudgetLine(selector_name(g[0]), g, "select", style) for g, style in zip(shown, looks, strict=True)]
    return lines if with_random is None else [*lines, BudgetLine("random spans", with_random, "random", RANDOM)]


def by_budget(lines: Sequence[BudgetLine]) -> Figure:
    """Draw accuracy and KL to the teacher relative to base's, a line per selector over its budgets; base and teacher across."""
    budgets = sorted({setting(c, BUDGET) for line in lines for c in line.group})
    figure, (upper, lower) = new_figure("selectors_by_budget", 4.1 + 0.17 * -(-len(lines) // 3), rows=2, sharex=True)
    first = lines[0].group[0]
    accuracy = [[mark_of(c, ACCURACY, line.arm) for c in line.group] for line in lines]
    base, teacher = (mark_of(first, ACCURACY, arm).value for arm in ("base", "teacher"))
    share_axis(upper, "y", [*_extent(accuracy), base, teacher])
    level_line(upper, Mark(base), ":", upright=False, colour=GREY)
    level_line(upper, Mark(teacher), "--", upright=False, colour=GREY)
    rel_kl = [[_rel_kl_mark(c, line.arm) for c in line.group] for line in lines]
    axis_start = nats_axis(lower, "y", [*_extent(rel_kl), 1.0])
    rel_kl = [[mark.at_least(axis_start) for mark in of_line] for of_line in rel_kl]
    level_line(lower, Mark(1.0), ":", upright=False, colour=GREY)
    positions = [[budgets.index(setting(c, BUDGET)) for c in line.group] for line in lines]
    for axes, marks in ((upper, accuracy), (lower, rel_kl)):
        _draw_lines(axes, [line.style for line in lines], positions, marks)
        axes.set_xlim(-0.5, len(budgets) - 0.5)
        axes.grid(visible=False, axis="x")
    upper.set_title(ACCURACY.axis_title)
    lower.set_title("KL to teacher / base's KL to teacher")
    span_len = setting(first, LENGTH)
    lower.set_xticks(range(len(budgets)), [f"{plural(n, 'span')}\n{n * span_len} tokens" for n in budgets])
    entries = [_entry(line.name, line.style) for line in lines]
    legend(figure, [*entries, legend_entry("base", GREY, line=":"), legend_entry("teacher", GREY, line="--")])
    return figure


def _rel_kl_mark(condition: ConditionResult, arm: str) -> Mark:
    """Return KL(arm || teacher) relative to base's with its interval; random: the mean over trials."""
    kls, base = (series(condition, KL_TO_TEACHER, of) for of in (arm, "base"))
    value = relative_kl(kls, base)
    low, high = ratio_interval(kls, base, condition.config.seed, f"{condition.label}-rel_kl-{arm}")
    return Mark(math.nan if value is None else value, low, high)


def _extent(lines: Sequence[Sequence[Mark]]) -> list[float]:
    """Return the values that an axis must hold: means, and the ends of intervals where these are drawn."""
    marks = [mark for of_line in lines for mark in of_line]
    ends = [end for m in marks for end in (m.low, m.high) if end is not None] if len(lines) <= MAX_WITH_INTERVALS else []
    return finite([*(mark.value for mark in marks), *ends])


def _draw_lines(
    axes: Axes, looks: Sequence[Style], positions: Sequence[Sequence[float]], lines: Sequence[Sequence[Mark]]
) -> None:
    """Draw one line of marks per style, shifted sideways so that their intervals do not cover each other."""
    shift = min(0.09, 0.75 / len(lines))
    for i, (style, xs, marks) in enumerate(zip(looks, positions, lines, strict=True)):
        shifted = [x + shift * (i - (len(lines) - 1) / 2) for x in xs]
        axes.plot(shifted, [m.value for m in marks], color=style.colour, linestyle=style.line, linewidth=1.1, alpha=0.75)
        for x, mark in zip(shifted, marks, strict=True):
            drawn = mark if len(lines) <= MAX_WITH_INTERVALS else Mark(mark.value)
            interval_mark(axes, drawn, x, style.colour, style.hollow, style.marker, upright=True)


def _entry(name: str, style: Style) -> Line2D:
    return legend_entry(name, style.colour, style.marker, style.line, style.hollow)


@dataclass(frozen=True)
class DepthLine:
    """Outcomes by where the gold tokens start in the demo.

    outcomes: (depth from 0 to 1, right: 0 or 1, of random spans the mean over trials) of every sample that has a depth.
    """

    name: str
    outcomes: Sequence[tuple[float, float]]
    style: Style

    def marks(self) -> list[Mark]:
        """Return the accuracy in every quarter of the demo with its interval; NaN where no sample's answer lies."""
        return [_outcome_mark([right for depth, right in self.outcomes if _quarter(depth) == q]) for q in range(len(DEPTHS))]


def depth_line(name: str, on: Sequence[Record], arm: str, style: Style) -> DepthLine:
    """Return the line of an arm over the ON samples whose gold tokens are known."""
    known = [record for record in on if record.get("gold_depth") is not None]
    right = column_values(known, ACCURACY.column(arm))
    return DepthLine(name, [(r["gold_depth"], v) for r, v in zip(known, right, strict=True) if math.isfinite(v)], style)


def depth_lines(conditions: Sequence[ConditionResult]) -> list[DepthLine]:
    """Return the lines of the candidates that differ from the first condition in the selector alone (where there are none, of
    all candidates), the ``MAX_CANDIDATES`` best of them, and of random spans.
    """
    candidates = [c for c in ranked(selectors_like_the_first(conditions)) if not c.reference][:MAX_CANDIDATES]
    names = [selector_name(c) for c in candidates]
    if len(set(names)) < len(names):
        names = [c.label for c in candidates]
    looks = styles(candidates)
    lines = [depth_line(name, c.records.on, "select", look) for name, c, look in zip(names, candidates, looks, strict=True)]
    with_random = next((c for c in conditions if has_random(c)), None)
    return lines if with_random is None else [*lines, depth_line("random spans", with_random.records.on, "random", RANDOM)]


def quarters(on: Sequence[Record]) -> list[int]:
    """Return how many ON samples have their gold tokens start in each quarter of the demo."""
    counts = [0] * len(DEPTHS)
    for record in on:
        if record.get("gold_depth") is not None:
            counts[_quarter(record["gold_depth"])] += 1
    return counts


def _quarter(depth: float) -> int:
    return min(int(depth * len(DEPTHS)), len(DEPTHS) - 1)


def _outcome_mark(outcomes: Sequence[float]) -> Mark:
    if not outcomes:
        return Mark(math.nan)
    binary = all(value in (0, 1) for value in outcomes)
    low, high = share_interval([bool(v) for v in outcomes]) if binary else interval(outcomes, 0, "depth")
    return Mark(float(np.mean(outcomes)), low, high)


def by_depth(lines: Sequence[DepthLine], counts: Sequence[int]) -> Figure:
    """Draw accuracy over the quarter of the demo in which the gold tokens start.

    Args:
        counts: of ``quarters``; a quarter without samples is left empty.
    """
    figure, (axes,) = new_figure("accuracy_by_depth", 2.6 + 0.17 * -(-len(lines) // 3))
    filled = [q for q, n in enumerate(counts) if n]
    marks = [[of_line[q] for q in filled] for of_line in (line.marks() for line in lines)]
    share_axis(axes, "y", _extent(marks))
    _draw_lines(axes, [line.style for line in lines], [filled] * len(lines), marks)
    axes.set_xlim(-0.5, len(DEPTHS) - 0.5)
    axes.set_xticks(range(len(DEPTHS)), [f"{name}\nn = {n}" for name, n in zip(DEPTHS, counts, strict=True)])
    axes.grid(visible=False, axis="x")
    axes.set(title=ACCURACY.axis_title, xlabel="where the answer's pair starts in the demonstration")
    legend(figure, [_entry(line.name, line.style) for line in lines])
    return figure
