"""What a comparison answers in words: relations that are known to hold, and the standing questions. Figures, not opinions.

Intervals are 95 %, paired where two things are compared, and not corrected for the number of answers; the table of
comparisons is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cedkv.analysis.comparison import best_condition, families, paired, series, setting, unique_up_to_padding
from cedkv.analysis.families import (
    BUDGET,
    MODE,
    PLACE,
    SINK,
    SOURCE,
    Family,
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
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import plural, sentence
from cedkv.metrics_phase2 import p99

SURE = (
    "Brackets hold 95 % bootstrap intervals over samples, paired where two things are compared; a difference counts where its "
    "interval leaves out 0. Each answer stands for itself. The table of comparisons corrects for their number, so that what "
    "counts here may not be resolved there."
)


def relations(results: Sequence[ConditionResult]) -> list[dict[str, Any]]:
    """Relations known from earlier work, as far as the grid has their conditions: {relation, here, figures}.

    ``here``: a relation ``holds`` where the interval of the difference lies on its side of 0, and ``does not hold`` where it
    lies on the other side. In between, one that says *more* or *farther* is ``not resolved``, and one that says *no better*
    or *at least as many* is ``not refuted``, which few samples can make of anything. Without an interval all are ``not
    resolved``.
    """
    chosen, found = unique_up_to_padding(results), []
    modes = {setting(c, MODE): c for c in reversed(chosen)}  # of several, the first
    attention, wrong, oracle = (modes.get(name) for name in ("attention_diversity_span", "wrong_demo", "oracle_span"))

    def add(relation: str, text: str, shown: bool | None, n: int, between: str = "not resolved") -> None:
        here = {True: "holds", False: "does not hold", None: between}[shown]
        found.append({"relation": relation, "here": here, "figures": f"{text}, n = {n}"})

    n = len(chosen[0].records.on) if chosen else 0
    if attention and any(record["correct_random"] for record in attention.records.on):
        text, low, high = contrast(attention, attention, "accuracy", arm="random")
        add("attention answers more than random spans", f"accuracy {text}", more(low, high), n)
        text, low, high = contrast(attention, attention, "kl_to_teacher", arm="random")
        add("random spans are farther from the teacher than attention's", f"KL {text}", _less(low, high), n)
    for group in families(chosen, SINK):
        first, last = min(group, key=lambda c: setting(c, SINK)), max(group, key=lambda c: setting(c, SINK))
        if setting(first, SOURCE) == "gather" and setting(first, SINK) == 0 and not first.reference:
            text, low, high = contrast(first, last, "kl_to_teacher")
            relation = f"gather without sinks is farther from the teacher than with {setting(last, SINK)} ({first.label})"
            add(relation, f"KL {text}", more(low, high), n)
            text, low, high = contrast(first, last, "off_delta")
            relation = f"gather without sinks moves OFF prompts more than with {setting(last, SINK)} ({first.label})"
            if first.records.off:
                add(relation, f"KL on OFF prompts {text}", more(low, high), len(first.records.off))
    if wrong:
        text, low, high = contrast(wrong, wrong, "accuracy", arm="base")
        relation = "the prefix of another episode is no better than base"
        add(relation, f"accuracy {text}", _less(low, high), n, _unrefuted(low))
    if oracle and attention:
        text, low, high = contrast(oracle, attention, "accuracy")
        add("the oracle answers at least as many as attention", f"accuracy {text}", more(low, high), n, _unrefuted(low))
    return found


def questions(results: Sequence[ConditionResult]) -> list[dict[str, str]]:
    """The standing questions this grid can answer: {question, answer}."""
    chosen = unique_up_to_padding(results)
    best, rule = best_condition(results)
    asked: list[tuple[str, Callable[[Sequence[ConditionResult]], str]]] = [
        ("How much do more spans help?", _budget),
        ("Do kept sinks matter, and does it depend on where the K/V come from?", _sinks),
        ("Compact or absolute positions?", _positions),
        ("Many short spans or few long ones, at the same number of tokens?", _lengths),
        ("Does a selection made for another query of the same demonstration serve?", _transfer),
        ("How far do OFF prompts move, against the whole demonstration as a prefix?", _off),
        ("Does attention rank spans as hiding them does?", _ranks),
    ]
    found = [{"question": "Which condition is best?", "answer": f"{best.label}: {rule}." if best else f"{sentence(rule)}."}]
    found += [{"question": question, "answer": answer} for question, how in asked if (answer := how(chosen))]
    if len(found) > 1:
        found.append({"question": "How sure are these answers?", "answer": SURE})
    return found


def contrast(
    left: ConditionResult, right: ConditionResult, quantity: str, arm: str = "select"
) -> tuple[str, float | None, float | None]:
    """``left - right`` in words, with the ends of its interval (as in the table); ``arm`` is the right one's."""
    mine, theirs = series(left, quantity), series(right, quantity, arm)
    names = (left.label, right.label, quantity) if arm == "select" else ("select", arm, quantity)
    row = paired(mine, theirs, names, left.config.seed)
    low, high = row["low"], row["high"]
    if low is None or high is None:
        return "too few samples to compare", None, None
    levels = f"{short(float(np.mean(mine)))} against {short(float(np.mean(theirs)))}"
    return f"{levels}, difference {signed(row['difference'])} [{signed(low)}, {signed(high)}]", low, high


def more(low: float | None, high: float | None) -> bool | None:
    """Whether a difference is above 0; None where its interval holds 0 or is not known."""
    if low is None or high is None:
        return None
    return True if low > 0 else False if high < 0 else None


def _less(low: float | None, high: float | None) -> bool | None:
    """Whether a difference is below 0; None as in ``more``."""
    above = more(low, high)
    return None if above is None else not above


def _unrefuted(low: float | None) -> str:
    """What *no better* is where the interval does not decide, if there is one."""
    return "not resolved" if low is None else "not refuted"


def level(condition: ConditionResult, quantity: str) -> str:
    """A condition's mean with its interval: ``0.188 [0.09, 0.28]``."""
    mine = series(condition, quantity)
    low, high = interval(mine, condition.config.seed, f"{condition.label}-{quantity}")
    mean = float(np.mean(mine)) if mine else math.nan
    return short(mean) + ("" if low is None or high is None else f" [{short(low)}, {short(high)}]")


def short(value: float | None) -> str:
    """Three significant digits, or a dash."""
    return f"{value:.3g}" if value is not None and math.isfinite(value) else "–"


def signed(value: float) -> str:
    """Three significant digits with a sign."""
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def _each(groups: Sequence[Family], answer: Callable[[Family], str]) -> str:
    """The answer of every family, named by its first condition where there are several."""
    if len(groups) == 1:
        return sentence(answer(groups[0])) + "."
    return " ".join(f"{group[0].label}: {answer(group)}." for group in groups)


def _both(left: ConditionResult, right: ConditionResult) -> str:
    """What KL to the teacher and accuracy say of ``left`` against ``right``, verdict first."""
    parts = []
    for quantity, name, words in (
        ("kl_to_teacher", "KL", ("farther from the teacher", "nearer to the teacher")),
        ("accuracy", "accuracy", ("more right answers", "fewer right answers")),
    ):
        text, low, high = contrast(left, right, quantity)
        verdict = {True: words[0], False: words[1], None: f"no resolved difference in {name}"}[more(low, high)]
        parts.append(f"{verdict} ({name} {text})")
    return " and ".join(parts)


def _levels(group: Family, name: Callable[[ConditionResult], str]) -> str:
    return "; ".join(f"{name(c)}: KL {level(c, 'kl_to_teacher')}, accuracy {level(c, 'accuracy')}" for c in group)


def _budget(results: Sequence[ConditionResult]) -> str:
    def answer(group: Family) -> str:
        last, first = group[-1], group[0]
        curve = _levels(group, lambda c: plural(setting(c, BUDGET), "span"))
        return f"{plural(setting(last, BUDGET), 'span')} against {setting(first, BUDGET)}: {_both(last, first)}. All: {curve}"

    return _each(found, answer) if (found := budgets(results)) else ""


def _sinks(results: Sequence[ConditionResult]) -> str:
    def answer(group: Family) -> str:
        at = {(setting(c, SOURCE), setting(c, SINK)): c for c in group}
        few, many = min(n for _, n in at), max(n for _, n in at)
        parts, change = [], {}
        for source in sorted({source for source, _ in at}, reverse=True):
            if (source, few) in at and (source, many) in at:
                without, kept = at[source, few], at[source, many]
                parts.append(f"{source}, {many} sinks against {few}: {_both(kept, without)}")
                pairs = zip(series(kept, "kl_to_teacher"), series(without, "kl_to_teacher"), strict=True)
                change[source] = [a - b for a, b in pairs]
        if len(change) == 2:
            extra = [a - b for a, b in zip(change["gather"], change["prefill"], strict=True)]
            low, high = interval(extra, group[0].config.seed, "sinks-by-source")
            if low is not None and high is not None:
                word = {
                    True: "sinks help prefill more",
                    False: "sinks help gather more",
                    None: "no resolved difference in that",
                }
                away = f"{signed(float(np.mean(extra)))} [{signed(low)}, {signed(high)}]"
                parts.append(f"{word[more(low, high)]} (change of KL in gather less that in prefill: {away} nats)")
        return "; ".join(parts)

    return _each(found, answer) if (found := sinks(results)) else ""


def _positions(results: Sequence[ConditionResult]) -> str:
    def answer(group: Family) -> str:
        at = {setting(c, PLACE): c for c in group}
        return f"compact against absolute: {_both(at['compact'], at['absolute'])}"

    return _each(found, answer) if (found := positions(results)) else ""


def _lengths(results: Sequence[ConditionResult]) -> str:
    def answer(group: Family) -> str:
        curve = _levels(group, shape)
        return f"{shape(group[0])} against {shape(group[-1])}: {_both(group[0], group[-1])}. All: {curve}"

    return _each(found, answer) if (found := lengths(results)) else ""


def _transfer(results: Sequence[ConditionResult]) -> str:
    def answer(group: Family) -> str:
        return f"another query's spans against the query's own: {_both(group[1], group[0])}"

    return _each(found, answer) if (found := transfers(results)) else ""


def _off(results: Sequence[ConditionResult]) -> str:
    def answer(group: Family) -> str:
        whole = next(c for c in group if setting(c, MODE) == "full_demo")
        told: dict[bool | None, list[str]] = {False: [], True: [], None: []}
        for c in group:
            if c is not whole:
                text, low, high = contrast(c, whole, "off_delta")
                change = text.partition(", difference ")[2] or text  # the whole demonstration's own mean is said once
                told[more(low, high)].append(
                    f"{c.label} (p99 {short(p99(series(c, 'off_delta')))}, change of the mean {change})"
                )
        own = series(whole, "off_delta")
        parts = [f"the whole demonstration moves them by {short(float(np.mean(own)))} nats in the mean, p99 {short(p99(own))}"]
        words = {False: "less do", True: "more do", None: "not resolved from it are"}
        return ". ".join([*parts, *(sentence(f"{words[side]} {', '.join(names)}") for side, names in told.items() if names)])

    return _each(found, answer) if (found := selectors_with_whole(results)) else ""


def _ranks(results: Sequence[ConditionResult]) -> str:
    source = ranked(results)
    if source is None:
        return ""
    found = rank_agreement(source.records.on, source.config.seed)
    if found["per_sample_mean"] is None:
        return ""
    within = "" if found["low"] is None else f" [{signed(found['low'])}, {signed(found['high'])}]"
    return (
        f"Spearman's rank correlation of attention and causal drop is {signed(found['per_sample_mean'])}{within} in the mean "
        f"over {plural(found['n'], 'sample')}; {signed(found['pooled'])} over all {found['candidates']} candidates pooled."
    )
