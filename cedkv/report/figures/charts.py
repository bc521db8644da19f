"""The charts of a comparison, each from its conditions; the captions are in ``figures``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cedkv.analysis.comparison import best_condition, series, setting
from cedkv.analysis.families import MODE, PLACE, SINK, SOURCE
from cedkv.analysis.paired import interval
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import number, plural
from cedkv.metrics_phase2 import p99
from cedkv.report.figures.plotting import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    MARKERS,
    PURPLE,
    VERMILION,
    Line,
    Mark,
    Row,
    cumulative,
    finite,
    interval_mark,
    key,
    legend,
    level_line,
    nats_axis,
    new,
    rows_height,
    rows_panel,
    share_axis,
)

AXIS = {"accuracy": "accuracy", "kl_to_teacher": "KL to teacher, nats"}
"""What is drawn of a condition, and the axis' title."""


def by_condition(results: Sequence[ConditionResult], quantity: str) -> Figure:
    """A row a condition: its mean and interval, its random spans; base and teacher as lines across."""
    rows = _ordered(results, lambda c: Row(
        c.label, mark_of(c, quantity), GREY if c.reference else BLUE, c.reference, c is results[0],
        ((mark_of(c, quantity, "random").value, "x", GREY),) if _has_random(c) else (),
    ))  # fmt: skip
    levels: dict[str, tuple[Mark, Line]] = {"base": (mark_of(results[0], quantity, "base"), ":")}
    if quantity == "accuracy":
        levels["teacher"] = mark_of(results[0], quantity, "teacher"), "--"
    marks = [row.mark for row in rows if row.label] + [m for m, _ in levels.values()]
    shown = [v for m in marks for v in (m.value, m.low, m.high) if v is not None] + [v for row in rows for v, *_ in row.others]
    figure, (axes,) = new(f"{quantity}_by_condition", rows_height(rows) + 0.9)
    least = -math.inf
    if quantity == "accuracy":
        share_axis(axes, "x", shown)
    else:
        least = nats_axis(axes, "x", shown)
    rows_panel(axes, rows, least)
    for mark, line in levels.values():
        level_line(axes, mark, line)
    handles = [key("candidate", BLUE, "o", "-")]
    if any(c.reference for c in results):
        handles.append(key("reference point", GREY, "o", "-", hollow=True))
    if any(row.others for row in rows):
        handles.append(key("its random spans", GREY, "x"))
    handles += [key(f"{name} {number(m.value)}", INK, line=line) for name, (m, line) in levels.items()]
    legend(figure, handles)
    axes.set_xlabel(AXIS[quantity])
    return figure


def varied(
    name: str, below: str, groups: Sequence[list[ConditionResult]], tick: Callable[[ConditionResult], str], random: bool
) -> Figure:
    """Panels of accuracy and KL; along x what varies within a group, one line a group, its random spans with it."""
    ticks = list(dict.fromkeys(tick(c) for group in groups for c in group))
    drawn = [(group, "select", COLOURS[i % 6], MARKERS[(i + i // 6) % 6]) for i, group in enumerate(groups)]
    if random and len(groups) == 1 and all(_has_random(c) for c in groups[0]):
        drawn.append((groups[0], "random", GREY, "x"))
    figure, panels = new(name, 2.7 + 0.12 * max(0, len(groups) - 3), columns=2)
    dodge = min(0.11, 0.5 / len(drawn))
    for axes, quantity in zip(panels, AXIS, strict=True):
        base = mark_of(groups[0][0], quantity, "base")
        marks = [[mark_of(c, quantity, arm) for c in group] for group, arm, _, _ in drawn]
        shown = [v for line in marks for m in line for v in (m.value, m.low, m.high) if v is not None] + [base.value]
        if quantity == "accuracy":
            teacher = mark_of(groups[0][0], quantity, "teacher")
            share_axis(axes, "y", [*shown, teacher.value])
            level_line(axes, Mark(teacher.value), "--", upright=False)
            least = -math.inf
        else:
            least = nats_axis(axes, "y", shown)
        level_line(axes, Mark(max(base.value, least)), ":", upright=False)
        for i, ((group, arm, colour, marker), line) in enumerate(zip(drawn, marks, strict=True)):
            at = [ticks.index(tick(c)) + dodge * (i - (len(drawn) - 1) / 2) for c in group]
            line = [m.at_least(least) for m in line]
            dash = ":" if arm == "random" else "-"
            axes.plot(at, [m.value for m in line], color=colour, linewidth=1, alpha=0.6, linestyle=dash)
            for x, m in zip(at, line, strict=True):
                interval_mark(axes, m, x, colour, False, marker, upright=True)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlim(-0.5, len(ticks) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set(title=AXIS[quantity], xlabel=below)
    handles = [key(label, colour, marker, "-") for (_, _, colour, marker), label in zip(drawn, names(groups), strict=False)]
    if len(drawn) > len(groups):
        handles.append(key("random spans", GREY, "x", ":"))
    legend(figure, [*handles, key("base", INK, line=":"), key("teacher", INK, line="--")])
    return figure


def off_rows(results: Sequence[ConditionResult], limit: float) -> Figure:
    """A row a condition: quartiles and 99th percentile of its OFF prompts, against the limit."""

    def row(c: ConditionResult) -> Row:
        deltas = finite(series(c, "off_delta"))
        low, middle, high = (float(v) for v in np.percentile(deltas, [25, 50, 75]))
        worst = ((p99(deltas) or 0.0, "|", INK),)
        return Row(c.label, Mark(middle, low, high), GREY if c.reference else BLUE, c.reference, c is results[0], worst)

    rows = _ordered(results, row)
    shown = [v for r in rows if r.label for v in (r.mark.value, r.mark.low, r.others[0][0]) if v is not None]
    figure, (axes,) = new("off_delta_by_condition", rows_height(rows) + 0.9)
    least = nats_axis(axes, "x", [*shown, limit])
    rows_panel(axes, rows, least)
    axes.axvline(limit, color=VERMILION, linestyle="--", linewidth=1.2)
    handles = [key("candidate", BLUE, "o", "-")]
    if any(c.reference for c in results):
        handles.append(key("reference point", GREY, "o", "-", hollow=True))
    legend(figure, [*handles, key("99th percentile", INK, "|"), key(f"limit {number(limit)}", VERMILION, line="--")])
    axes.set_xlabel("KL(select || base), nats")
    return figure


def off_curves(results: Sequence[ConditionResult], limit: float) -> Figure:
    """A curve for each condition; in colour the first, the best, the whole demonstration, and the candidate that moves most."""
    curves = [(c, finite(series(c, "off_delta"))) for c in results]
    figure, (axes,) = new("off_delta_curves", 3.1)
    least = nats_axis(axes, "x", [*(v for _, found in curves for v in found), limit])
    best = best_condition(results)[0]
    whole = next((c for c in results if setting(c, MODE) == "full_demo"), None)
    most = max(curves, key=lambda curve: (not curve[0].reference, p99(curve[1])))[0]
    named: list[tuple[ConditionResult | None, str, Line]] = [
        (results[0], BLUE, "-"), (best, PURPLE, "-."), (whole, GREEN, "--"), (most, INK, ":"),
    ]  # fmt: skip
    picked = {c.key: (colour, line) for c, colour, line in reversed(named) if c is not None}
    handles = []
    for condition, found in sorted(curves, key=lambda curve: curve[0].key in picked):
        colour, line = picked.get(condition.key, (GREY, "-"))
        coloured = condition.key in picked
        width, alpha = (1.8, 1.0) if coloured else (0.8, 0.55)
        cumulative(axes, found, least, color=colour, linestyle=line, linewidth=width, alpha=alpha)
        if coloured:
            handles.append(key(condition.label, colour, line=line))
    if len(picked) < len(curves):
        handles.append(key(plural(len(curves) - len(picked), "other condition"), GREY, line="-"))
    axes.axvline(limit, color=VERMILION, linestyle="--", linewidth=1.2)
    axes.set(title="share of OFF prompts", xlabel="KL(select || base), nats")
    legend(figure, [*handles, key(f"limit {number(limit)}", VERMILION, line="--")])
    return figure


def off_by_selector(group: Sequence[ConditionResult]) -> Figure:
    """A panel for each selector of a family: its curve, and in each the whole demonstration's own."""
    whole = next(c for c in group if setting(c, MODE) == "full_demo")
    others = [c for c in group if c is not whole]
    columns = 3 if len(others) > 2 else len(others)
    rows = -(-len(others) // columns)
    figure, panels = new("off_delta_by_selector", 0.75 + 1.3 * rows, columns, rows, sharex=True, sharey=True)
    curves = {c.key: finite(series(c, "off_delta")) for c in group}
    least = nats_axis(panels[0], "x", [v for found in curves.values() for v in found], sparse=True)
    for axes, condition in zip(panels, others, strict=False):
        colour = GREY if condition.reference else BLUE
        cumulative(axes, curves[whole.key], least, color=GREEN, linestyle="--", linewidth=1.2)
        cumulative(axes, curves[condition.key], least, color=colour, linewidth=1.8)
        axes.set_title(str(setting(condition, MODE)).removesuffix("_span"), fontsize=8, pad=4)
        axes.set_yticks([0, 0.5, 1])
    for axes in panels[len(others) :]:
        axes.remove()
    for at in range(max(0, len(others) - columns), len(others)):
        panels[at].tick_params(labelbottom=True)
        panels[at].set_xlabel("KL(select || base), nats", fontsize=8)
    handles = [key("candidate", BLUE, line="-"), key("reference point", GREY, line="-")]
    legend(figure, [*handles, key("the whole demonstration", GREEN, line="--")])
    return figure


def ranks(condition: ConditionResult, agreement: dict[str, Any]) -> Figure:
    """How candidates rank by attention and by causal drop within their sample, and the samples' correlations."""
    figure, (left, right) = new("attention_causal_drop", 3.0, columns=2)
    counts = np.zeros((10, 10))
    for record in condition.records.on:
        attention, drop = record.get("candidate_attention", []), record.get("candidate_causal_drop", [])
        if len(attention) > 1:
            x, y = ((10 * _rank_share(side)).astype(int) for side in (attention, drop))
            np.add.at(counts, (x, y), 1)
    x, y = np.nonzero(counts)
    found = counts[x, y]
    left.scatter(x / 10 + 0.05, y / 10 + 0.05, s=130 * found / found.max(), color=BLUE, linewidths=0)
    left.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, zorder=1)
    left.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="rank by attention", title="rank by causal drop", box_aspect=1)
    left.set_xticks([0, 0.5, 1], ["lowest", "middle", "highest"])
    left.set_yticks([0, 0.5, 1], ["lowest", "middle", "highest"])
    known = [value for value in agreement["per_sample"] if value is not None]
    right.hist(known, bins=np.arange(-1, 1.01, 0.1).tolist(), color=BLUE, alpha=0.55, edgecolor=BLUE, linewidth=0.6)
    right.axvline(0, color=GREY, linewidth=0.8)
    level_line(right, Mark(agreement["per_sample_mean"], agreement["low"], agreement["high"]), "-", colour=VERMILION)
    right.set(xlim=(-1.02, 1.02), xlabel="Spearman's correlation", title="samples")
    right.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    right.grid(visible=False, axis="x")
    pooled = "" if agreement["pooled"] is None else f"; all candidates pooled {agreement['pooled']:.2f}"
    legend(figure, [key(f"mean {agreement['per_sample_mean']:.2f}{pooled}", VERMILION, line="-")])
    return figure


def mark_of(condition: ConditionResult, quantity: str, arm: str = "select") -> Mark:
    """Mean and interval of an arm; random: of the mean over trials."""
    found = finite(series(condition, quantity, arm))
    low, high = interval(found, condition.config.seed, f"{condition.label}-{quantity}-{arm}")
    return Mark(float(np.mean(found)) if found else math.nan, low, high)


def _rank_share(found: Sequence[float]) -> Any:
    """Each value's place among all, from 0 to below 1; equal values keep their order."""
    order = np.argsort(np.argsort(found, kind="stable"), kind="stable")
    return order / len(found)


def _ordered(results: Sequence[ConditionResult], row: Callable[[ConditionResult], Row]) -> list[Row]:
    """Rows of the candidates, then of the reference points, each from the nearest to the teacher down; a gap between."""
    ranked_ = sorted(results, key=lambda c: np.nan_to_num(np.mean(series(c, "kl_to_teacher")), nan=np.inf))
    first, last = ([row(c) for c in ranked_ if c.reference is side] for side in (False, True))
    return [*first, Row("", Mark(math.nan)), *last] if first and last else first + last


def _has_random(condition: ConditionResult) -> bool:
    on, mode = condition.records.on, setting(condition, MODE)
    return bool(on and on[0]["correct_random"]) and mode != "random_span" and not condition.reference


def names(groups: Sequence[Sequence[ConditionResult]]) -> list[str]:
    """What tells groups of conditions apart: the factors that are the same within a group and not the same everywhere."""
    if len(groups) < 2:
        return ["selected spans"] * len(groups)
    own = [{k: c[0].factors[k] for k in c[0].factors if all(x.factors.get(k) == c[0].factors[k] for x in c)} for c in groups]
    telling = [k for k in own[0] if any(other.get(k) != own[0][k] for other in own)]
    short = {MODE: "{}", SOURCE: "{}", PLACE: "{}", SINK: "{} sinks"}
    found = []
    for its, group in zip(own, groups, strict=True):
        parts = [(short.get(k, k.rsplit(".", 1)[-1] + " {}"), str(its[k]).removesuffix("_span")) for k in telling if k in its]
        found.append(" · ".join(shape.format(value) for shape, value in parts) or group[0].label)
    return found
