"""The figures of a run and of a comparison: caption -> figure. Captions say what is drawn, n, and what an interval is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cedkv.analysis.comparison import column_values, series, setting, unique_up_to_padding
from cedkv.analysis.families import (
    BUDGET,
    MODE,
    POSITIONING,
    SINK,
    SOURCE,
    Family,
    budgets,
    lengths,
    positions,
    selectors_by_budget,
    selectors_with_full_demo,
    sinks,
    spans_by_tokens,
    transfers,
    with_causal_drops,
)
from cedkv.analysis.findings import ComparisonResult
from cedkv.analysis.paired import interval, rank_agreement
from cedkv.analysis.quantities import ACCURACY, KL_TO_TEACHER, OFF_DELTA
from cedkv.analysis.results import ConditionResult, Records, Results
from cedkv.core.text import number, plural
from cedkv.core.values import Record
from cedkv.report.figures import charts, off_charts, quality_charts, selector_charts
from cedkv.report.figures.plotting import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    Mark,
    Row,
    figure_style,
    finite,
    legend,
    legend_entry,
    nats_axis,
    new_figure,
    rows_panel,
    save_png,
    share_axis,
    to_svg,
)
from cedkv.report.figures.selector_charts import DepthLine, depth_line

__all__ = ["comparison_figures", "run_figures", "save_main_figures", "save_png", "to_svg"]

MAIN_FIGURES = ("accuracy", "kl_by_sample", "off_delta", "accuracy_by_condition", "kl_to_teacher_by_condition")
"""Names of the figures that a run also leaves as PNG beside its page, where MLflow's UI shows them at once."""
INTERVAL = "95 % bootstrap intervals over samples"
SPANS_CHOSEN_FOR = {
    "attention_diversity_span": "the query\nitself",
    "transfer_span": "another query,\nsame demo",
    "wrong_demo": "another\nepisode",
}
ORDER = (
    "query-aware candidates, query-agnostic ones, then reference points (hollow), each from the most accurate down, equal ones "
    "by KL to the teacher; the first condition in bold"
)


def run_figures(records: Records, results: Results) -> dict[str, Figure]:
    """Return the figures of one run by caption: accuracy per arm, KL on OFF prompts and along base's answers, KL per sample."""
    figures: dict[str, Figure] = {}
    with figure_style():
        if records.on:
            trials = len(records.on[0]["correct_random"])
            random = f", with a tick for each of {trials} random trials" if trials else ""
            caption = f"Accuracy of each arm{random}. n = {len(records.on)} ON samples; {INTERVAL}."
            figures[caption] = _accuracy_by_arm(records)
        deltas = finite(column_values(records.off, OFF_DELTA.column("select")))
        limit = next((check.limit for check in results.checks if check.name == "off_delta_p99"), None)
        if deltas:
            caption = (
                "How far the prefix moves unrelated prompts: share of OFF prompts with KL(select || base) of at most x nats; "
                f"n = {len(deltas)}. The 99th percentile must not exceed the limit."
            )
            figures[caption] = off_charts.off_curve(deltas, limit)
        by_position = off_charts.kl_by_position(records.off)
        if len(by_position) > 1:
            first, last = len(by_position[0]), len(by_position[-1])
            caption = (
                "How far the prefix moves base's own greedy answers to OFF prompts: median and 99th percentile over prompts of "
                "KL(select || base) in nats, after 0, 1, 2, ... tokens of that answer, given to both. At 0 it is the next "
                f"token, which the limit is for. n = {first} prompts{f', {last} at the last position' * (last < first)}."
            )
            figures[caption] = off_charts.off_by_position(by_position, limit)
        samples = [
            _SampleKL(base, select, bool(record["correct_select"]))
            for record, base, select in zip(
                records.on,
                column_values(records.on, KL_TO_TEACHER.column("base")),
                column_values(records.on, KL_TO_TEACHER.column("select")),
                strict=True,
            )
            if math.isfinite(base) and math.isfinite(select)
        ]
        if samples:
            nearer = sum(sample.select < sample.base for sample in samples)
            caption = (
                f"KL to the teacher of each ON sample, in nats: select against base, n = {len(samples)}. Below the line select "
                f"is nearer to the teacher than base is ({nearer} of {len(samples)})."
            )
            figures[caption] = _kl_by_sample(samples)
        select = depth_line("select", records.on, "select", selector_charts.Style(BLUE, "o"))
        random_spans = depth_line("random spans", records.on, "random", selector_charts.RANDOM)
        figures |= _depth_figure(records.on, [select, random_spans])
        if (attention := quality_charts.gold_attention(records.heads)) is not None:
            figures |= _gold_attention_figure(attention)
    return figures


def save_main_figures(folder: Path, figures: Iterable[Figure], prefix: str = "") -> None:
    """Write the main ones of a run's figures as PNG to its root; ``prefix``: of the files' names."""
    for figure in figures:
        if figure.get_label() in MAIN_FIGURES:
            save_png(figure, folder / f"{prefix}{figure.get_label()}.png")


def _depth_figure(on: Sequence[Record], lines: Sequence[DepthLine]) -> dict[str, Figure]:
    """Return the figure of accuracy by depth with the teacher's line, where the gold tokens lie in more than one quarter."""
    counts = selector_charts.quarters(on)
    if sum(n > 0 for n in counts) < 2:
        return {}
    drawn = [*(line for line in lines if line.outcomes), depth_line("teacher", on, "teacher", selector_charts.TEACHER)]
    caption = (
        "Accuracy by depth: in which quarter of the demonstration the pair that holds the answer starts. "
        f"n = {sum(counts)} ON samples; 95 % intervals by Wilson, of random spans (mean over trials) by bootstrap."
    )
    return {caption: selector_charts.by_depth(drawn, counts)}


def _gold_attention_figure(attention: quality_charts.GoldAttention) -> dict[str, Figure]:
    largest = ", ".join(f"layer {layer} head {head} ({number(mass, 2)})" for layer, head, mass in attention.largest(3))
    caption = (
        "Attention to the gold tokens, which hold the answer, by layer and head: the share of the attention of "
        f"{attention.rows} on all of them, mean over samples. Layers that were read; the largest: {largest}. n = {attention.n} "
        "ON samples."
    )
    return {caption: quality_charts.attention_by_head(attention)}


def comparison_figures(comparison: ComparisonResult) -> dict[str, Figure]:
    """Return the figures that a grid has the conditions for, by caption. Conditions that differ in padding alone are drawn
    once.
    """
    conditions, figures = unique_up_to_padding(comparison.conditions), dict[str, Figure]()
    if not any(c.records.on for c in conditions):
        return figures
    n = f"n = {len(conditions[0].records.on)} ON samples; {INTERVAL}"
    with figure_style():
        for quantity in (ACCURACY, KL_TO_TEACHER):
            caption = (
                f"{quantity.caption} by condition, {ORDER}. {n} of one condition: two conditions are compared in pairs, in the "
                "table."
            )
            figures[caption] = charts.by_condition(conditions, quantity)
        figures |= _selector_figures(conditions)
        points = quality_charts.coverage_points(conditions)
        if len(points) > 1:
            caption = (
                "Gold coverage (share of the gold tokens, which hold the answer, that are kept) against accuracy, a point per "
                f"condition, numbered in the key. n = {points[0].n} ON samples that say where their answer is; {INTERVAL} both "
                "ways."
            )
            figures[caption] = quality_charts.coverage_against_accuracy(points)
        for varied in _varied_settings(conditions):
            if varied.groups:
                caption = f"{varied.caption}: accuracy and mean KL to the teacher. {n}."
                figures[caption] = charts.varied(varied.name, varied.x_label, varied.groups, varied.tick, varied.with_random)
        figures |= _off_figures(conditions, comparison.best.condition)
        source = with_causal_drops(conditions)
        agreement = rank_agreement(source.records.on, source.config.seed) if source else {"n": 0}
        if source and agreement["n"]:
            caption = (
                "Attention against causal drop of the candidate spans. Left: ranks within a sample, in tenths, larger dots for "
                f"more of the {agreement['candidates']} candidates. Right: Spearman's correlation of each of "
                f"{plural(agreement['n'], 'sample')}, their mean and its 95 % bootstrap interval."
            )
            figures[caption] = charts.ranks(source, agreement)
        for attention in quality_charts.gold_attentions(conditions):
            figures |= _gold_attention_figure(attention)
    return figures


def _selector_figures(conditions: Sequence[ConditionResult]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    n = len(conditions[0].records.on)
    groups = selectors_by_budget(conditions)
    names = charts.group_names([[c for selector in group for c in selector] for group in groups])
    for group, name in zip(groups, names, strict=True):
        lines = selector_charts.budget_lines(group)
        family = f" ({name})" if len(groups) > 1 else ""
        intervals = f"; {INTERVAL}" if len(lines) <= selector_charts.MAX_WITH_INTERVALS else ", drawn without intervals"
        caption = (
            f"Every selector at several budgets{family}: accuracy, and mean KL(select || teacher) over mean KL(base || "
            "teacher), in which the teacher is 0. Dashed and hollow: what knows more than a selector may; grey and hollow: "
            f"other points of reference. n = {n} ON samples{intervals}."
        )
        figures[caption] = selector_charts.by_budget(lines)
    return figures | _depth_figure(conditions[0].records.on, selector_charts.depth_lines(conditions))


def _off_figures(conditions: Sequence[ConditionResult], best: ConditionResult | None) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    measured = [c for c in conditions if finite(series(c, OFF_DELTA))]
    if measured:
        n, limit = len(measured[0].records.off), measured[0].config.thresholds.off_delta_p99_max
        caption = (
            "How far OFF prompts move, by condition: median, middle half (thick) and 99th percentile (tick) of "
            f"KL(select || base) in nats over OFF prompts; n = {n}. A 99th percentile above the limit "
            f"({number(limit)}) fails Gate B."
        )
        figures[caption] = off_charts.off_rows(measured, limit)
        caption = f"Share of OFF prompts with KL(select || base) of at most x nats, by condition; n = {n}."
        figures[caption] = off_charts.off_curves(measured, best, limit)
    groups = selectors_with_full_demo(conditions)
    for group, name in zip(groups, charts.group_names(groups), strict=True):
        family = f" ({name})" if len(groups) > 1 else ""
        caption = (
            "Share of OFF prompts with KL(select || base) of at most x nats, each selector against the whole demonstration "
            f"as a prefix{family}; n = {len(group[0].records.off)}. A selector whose curve lies to the left moves OFF prompts "
            "less."
        )
        figures[caption] = off_charts.off_by_selector(group)
    return figures


@dataclass(frozen=True, kw_only=True)
class _VariedSetting:
    """A figure of one setting that varies along x while everything else is the same."""

    name: str
    x_label: str = ""
    caption: str
    groups: list[Family]
    tick: Callable[[ConditionResult], str]
    with_random: bool = False


def _varied_settings(conditions: Sequence[ConditionResult]) -> list[_VariedSetting]:
    with_selectors = {c.key for group in selectors_by_budget(conditions) for selector in group for c in selector}
    return [
        _VariedSetting(
            name="budget",
            x_label="spans kept at most",
            caption="More spans",
            groups=[group for group in budgets(conditions) if group[0].key not in with_selectors],
            tick=lambda c: str(setting(c, BUDGET)),
            with_random=True,
        ),
        _VariedSetting(
            name="sinks",
            caption="Kept sinks, by where the keys and values come from",
            groups=[of_source for group in sinks(conditions) for of_source in _by_source(group)],
            tick=lambda c: plural(setting(c, SINK), "sink"),
        ),
        _VariedSetting(
            name="positioning",
            caption="Compact against absolute positions",
            groups=positions(conditions),
            tick=lambda c: str(setting(c, POSITIONING)),
        ),
        _VariedSetting(
            name="span_length",
            caption="Many short spans or few long ones, the same number of tokens",
            groups=lengths(conditions),
            tick=lambda c: spans_by_tokens(c).replace(" × ", "\n× "),
            with_random=True,
        ),
        _VariedSetting(
            name="transfer",
            x_label="spans chosen for",
            caption="Spans chosen for the query itself, for another query of the same demonstration, and for another episode",
            groups=transfers(conditions),
            tick=lambda c: SPANS_CHOSEN_FOR[setting(c, MODE)],
        ),
    ]


def _by_source(group: Family) -> list[Family]:
    """Return a family split by the source of the K/V, each part sorted by the number of sinks."""
    by_source: dict[str, Family] = {}
    for c in sorted(group, key=lambda c: setting(c, SINK)):
        by_source.setdefault(setting(c, SOURCE), []).append(c)
    return list(by_source.values())


def _accuracy_by_arm(records: Records) -> Figure:
    rows = []
    for arm, colour in (("base", VERMILION), ("random", GREY), ("select", BLUE), ("teacher", GREEN)):
        correct = finite(column_values(records.on, ACCURACY.column(arm)))
        if correct:
            low, high = interval(correct, 0, f"accuracy-{arm}")
            trials = zip(*(r["correct_random"] for r in records.on), strict=True) if arm == "random" else ()
            dots = tuple(float(np.mean(trial)) for trial in trials)
            rows.append(Row(arm, Mark(float(np.mean(correct)), low, high, dots), colour))
    figure, (axes,) = new_figure("accuracy", 1.75)
    rows_panel(axes, rows)
    share_axis(axes, "x", [v for row in rows for v in (row.mark.value, row.mark.high or 0.0, *row.mark.dots)])
    for i, row in enumerate(rows):
        value = number(row.mark.value)
        axes.text(1.02, i + 0.5, value, transform=axes.get_yaxis_transform(), va="center_baseline", fontsize=8)
    axes.set_xlabel(ACCURACY.axis_title)
    return figure


@dataclass(frozen=True)
class _SampleKL:
    """KL to the teacher of one ON sample, in nats, and whether select is right."""

    base: float
    select: float
    select_right: bool


def _kl_by_sample(samples: Sequence[_SampleKL]) -> Figure:
    """Draw select's KL against base's, one dot per ON sample."""
    figure, (axes,) = new_figure("kl_by_sample", 3.6)
    x_start = nats_axis(axes, "x", [sample.base for sample in samples])
    both = [value for sample in samples for value in (sample.base, sample.select)]  # base too: the diagonal must be visible
    y_start = nats_axis(axes, "y", both)
    diagonal = max(x_start, y_start), min(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot(diagonal, diagonal, color=GREY, linewidth=1.2, linestyle="--", zorder=1)
    entries = [legend_entry("select = base", GREY, line="--")]
    for right, colour, name in ((True, BLUE, "select is right"), (False, VERMILION, "select is wrong")):
        dots = [(max(s.base, x_start), max(s.select, y_start)) for s in samples if s.select_right is right]
        if dots:
            face = colour if right else "none"
            axes.plot(*zip(*dots, strict=True), "o", color=colour, markerfacecolor=face, markersize=4.5)
            entries.append(legend_entry(f"{name} ({len(dots)})", colour, "o", hollow=not right))
    axes.set(title="select: KL to teacher, nats", xlabel="base: KL to teacher, nats")
    legend(figure, entries)
    return figure
