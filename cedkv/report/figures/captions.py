"""The figures of a run and of a comparison: caption -> figure. Captions say what is drawn, n, and what an interval is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from cedkv.analysis.comparison import QUANTITIES, series, setting, unique_up_to_padding, values
from cedkv.analysis.families import (
    BUDGET,
    MODE,
    PLACE,
    SINK,
    SOURCE,
    budgets,
    lengths,
    positions,
    ranked,
    selectors_with_whole,
    shape,
    sinks,
    transfers,
)
from cedkv.analysis.paired import interval, rank_agreement
from cedkv.analysis.results import ConditionResult, Records, Results
from cedkv.core.text import number, plural
from cedkv.metrics_phase2 import p99
from cedkv.report.figures import charts
from cedkv.report.figures.plotting import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    Mark,
    Row,
    cumulative,
    finite,
    key,
    legend,
    nats_axis,
    new,
    rows_panel,
    save_png,
    share_axis,
    style,
    to_svg,
)

__all__ = ["comparison_figures", "run_figures", "save_png", "to_svg"]

Families = list[list[ConditionResult]]
INTERVAL = "95 % bootstrap intervals over samples"
SHOWN = {
    "accuracy": "Accuracy (share of ON samples answered right)",
    "kl_to_teacher": "Mean KL(student || teacher) over ON samples",
}
CHOSEN_FOR = {
    "attention_diversity_span": "the query\nitself",
    "transfer_span": "another query,\nsame demo",
    "wrong_demo": "another\nepisode",
}
ORDER = "from the nearest to the teacher (smallest mean KL) down; reference points (hollow) below, the first condition in bold"


def run_figures(records: Records, results: Results) -> dict[str, Figure]:
    """Accuracy of the arms; how far OFF prompts move; for each sample, select's and base's KL to the teacher."""
    found: dict[str, Figure] = {}
    with style():
        if records.on:
            trials = len(records.on[0]["correct_random"])
            random = f", with a tick for each of {trials} random trials" if trials else ""
            found[f"Accuracy of each arm{random}. n = {len(records.on)} ON samples; {INTERVAL}."] = _arms(records)
        deltas = finite(values(records.off, QUANTITIES["off_delta"].format("select")))
        limit = next((check.limit for check in results.checks if check.name == "off_delta_p99"), None)
        if deltas:
            caption = (
                "How far the prefix moves unrelated prompts: share of OFF prompts with KL(select || base) of at most x nats; "
                f"n = {len(deltas)}. The 99th percentile must not be beyond the limit."
            )
            found[caption] = _off_curve(deltas, limit)
        kls = zip(values(records.on, "kl_base_teacher"), values(records.on, "kl_select_teacher"), strict=True)
        right = [bool(record["correct_select"]) for record in records.on]
        pairs = [(a, b, ok) for (a, b), ok in zip(kls, right, strict=True) if math.isfinite(a) and math.isfinite(b)]
        if pairs:
            nearer = sum(b < a for a, b, _ in pairs)
            caption = (
                f"KL to the teacher of each ON sample, in nats: select against base, n = {len(pairs)}. Below the line select "
                f"is nearer to the teacher than base is ({nearer} of {len(pairs)})."
            )
            found[caption] = _nearer(pairs)
    return found


def comparison_figures(results: Sequence[ConditionResult]) -> dict[str, Figure]:
    """The figures this grid has the conditions for. Conditions that differ in padding alone are drawn once."""
    chosen, found = unique_up_to_padding(results), dict[str, Figure]()
    if not any(c.records.on for c in chosen):
        return found
    n = f"n = {len(chosen[0].records.on)} ON samples; {INTERVAL}"
    with style():
        for quantity, shown in SHOWN.items():
            caption = (
                f"{shown} by condition, {ORDER}. {n} of one condition: two conditions are compared in pairs, in the table."
            )
            found[caption] = charts.by_condition(chosen, quantity)
        for caption, figure in _varied(chosen).items():
            found[f"{caption}: accuracy and mean KL to the teacher. {n}."] = figure
        moving = [c for c in chosen if finite(series(c, "off_delta"))]
        if moving:
            n_off, limit = len(moving[0].records.off), moving[0].config.thresholds.off_delta_p99_max
            caption = (
                "How far OFF prompts move, by condition: median, middle half (thick) and 99th percentile (tick) of "
                f"KL(select || base) in nats over OFF prompts; n = {n_off}. A 99th percentile beyond the limit "
                f"({number(limit)}) fails Gate B."
            )
            found[caption] = charts.off_rows(moving, limit)
            caption = f"Share of OFF prompts with KL(select || base) of at most x nats, by condition; n = {n_off}."
            found[caption] = charts.off_curves(moving, limit)
        groups = selectors_with_whole(chosen)
        for group, name in zip(groups, charts.names(groups), strict=True):
            where = f" ({name})" if len(groups) > 1 else ""
            caption = (
                "Share of OFF prompts with KL(select || base) of at most x nats, each selector against the whole demonstration "
                f"as a prefix{where}; n = {len(group[0].records.off)}. A curve to the left moves them less."
            )
            found[caption] = charts.off_by_selector(group)
        source = ranked(chosen)
        agreement = rank_agreement(source.records.on, source.config.seed) if source else {"n": 0}
        if source and agreement["n"]:
            caption = (
                "Attention against causal drop of the candidate spans. Left: ranks within a sample, in tenths, larger dots for "
                f"more of the {agreement['candidates']} candidates. Right: Spearman's correlation of each of "
                f"{plural(agreement['n'], 'sample')}, their mean and its 95 % bootstrap interval."
            )
            found[caption] = charts.ranks(source, agreement)
    return found


def _varied(results: Sequence[ConditionResult]) -> dict[str, Figure]:
    """What varies along x while all else is the same."""
    kinds: list[tuple[str, str, str, Families, Callable[[ConditionResult], str], bool]] = [
        ("budget", "spans kept at most", "More spans", budgets(results), lambda c: str(setting(c, BUDGET)), True),
        ("sinks", "", "Kept sinks, by where the keys and values come from",
         [part for group in sinks(results) for part in _by_source(group)], lambda c: plural(setting(c, SINK), "sink"), False),
        ("positioning", "", "Compact against absolute positions", positions(results), lambda c: str(setting(c, PLACE)), False),
        ("span_length", "", "Many short spans or few long ones, the same number of tokens", lengths(results),
         lambda c: shape(c).replace(" × ", "\n× "), True),
        ("transfer", "spans chosen for", "Spans chosen for the query itself, for another query of the same demonstration, "
         "and for another episode", transfers(results), lambda c: CHOSEN_FOR[setting(c, MODE)], False),
    ]  # fmt: skip
    found = {}
    for name, below, caption, groups, tick, random in kinds:
        if groups:
            found[caption] = charts.varied(name, below, groups, tick, random)
    return found


def _by_source(group: Sequence[ConditionResult]) -> Families:
    found: dict[str, list[ConditionResult]] = {}
    for c in sorted(group, key=lambda c: setting(c, SINK)):
        found.setdefault(setting(c, SOURCE), []).append(c)
    return list(found.values())


def _arms(records: Records) -> Figure:
    rows = []
    for arm, colour in (("base", VERMILION), ("random", GREY), ("select", BLUE), ("teacher", GREEN)):
        found = finite(values(records.on, f"correct_{arm}"))
        if found:
            low, high = interval(found, 0, f"accuracy-{arm}")
            trials = zip(*(r["correct_random"] for r in records.on), strict=True) if arm == "random" else ()
            dots = tuple(float(np.mean(trial)) for trial in trials)
            rows.append(Row(arm, Mark(float(np.mean(found)), low, high, dots), colour))
    figure, (axes,) = new("accuracy", 1.75)
    rows_panel(axes, rows)
    share_axis(axes, "x", [v for row in rows for v in (row.mark.value, row.mark.high or 0.0, *row.mark.dots)])
    for at, row in enumerate(rows):
        value, beside = number(row.mark.value), axes.get_yaxis_transform()
        axes.text(1.02, at + 0.5, value, transform=beside, va="center_baseline", fontsize=8)
    axes.set_xlabel("accuracy")
    return figure


def _off_curve(deltas: list[float], limit: float | None) -> Figure:
    figure, (axes,) = new("off_delta", 2.7)
    least = nats_axis(axes, "x", [*deltas, *([limit] if limit else [])])
    cumulative(axes, deltas, least, color=BLUE, linewidth=1.8)
    worst = p99(deltas) or 0.0
    axes.plot([max(worst, least)], [float(np.mean(np.array(deltas) <= worst))], "o", color=BLUE, markersize=6)
    handles = [key("OFF prompts", BLUE, line="-"), key(f"99th percentile {number(worst)}", BLUE, "o")]
    if limit:
        axes.axvline(limit, color=VERMILION, linestyle="--", linewidth=1.2)
        handles.append(key(f"limit {number(limit)}", VERMILION, line="--"))
    axes.set(title="share of OFF prompts", xlabel="KL(select || base), nats")
    legend(figure, handles)
    return figure


def _nearer(pairs: Sequence[tuple[float, float, bool]]) -> Figure:
    figure, (axes,) = new("kl_by_sample", 3.6)
    least_x = nats_axis(axes, "x", [a for a, _, _ in pairs])
    least_y = nats_axis(axes, "y", [v for a, b, _ in pairs for v in (a, b)])  # base's too, to have the line in the picture
    ends = max(least_x, least_y), min(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot(ends, ends, color=GREY, linewidth=1.2, linestyle="--", zorder=1)
    handles = [key("select = base", GREY, line="--")]
    for right, colour, name in ((True, BLUE, "select is right"), (False, VERMILION, "select is wrong")):
        some = [(max(a, least_x), max(b, least_y)) for a, b, ok in pairs if ok is right]
        if some:
            face = colour if right else "none"
            axes.plot(*zip(*some, strict=True), "o", color=colour, markerfacecolor=face, markersize=4.5)
            handles.append(key(f"{name} ({len(some)})", colour, "o", hollow=not right))
    axes.set(title="select: KL to teacher, nats", xlabel="base: KL to teacher, nats")
    legend(figure, handles)
    return figure
