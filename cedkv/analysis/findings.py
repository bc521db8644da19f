"""A comparison in words: the relations known from earlier work, and the answers to the standing questions. No opinions.

Intervals are 95 %, paired where two things are compared, and not corrected for the number of answers; the table of
comparisons is corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cedkv.analysis.best import Best, best_condition
from cedkv.analysis.comparison import (
    grid_comparisons,
    identical_conditions,
    series,
    setting,
    unique_up_to_padding,
)
from cedkv.analysis.contrasts import Contrast, contrast, mean_with_interval, short, sign_of, signed, signed_interval, verdict_of
from cedkv.analysis.families import (
    BUDGET,
    MODE,
    POSITIONING,
    SINK,
    SOURCE,
    Family,
    budgets,
    families,
    lengths,
    positions,
    selectors_with_full_demo,
    sinks,
    spans_by_tokens,
    transfers,
    with_causal_drops,
)
from cedkv.analysis.paired import interval, rank_agreement
from cedkv.analysis.quantities import ACCURACY, KL_TO_TEACHER, OFF_DELTA, Quantity
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import plural, sentence
from cedkv.metrics_phase2 import p99

HOW_SURE = (
    "Brackets hold 95 % bootstrap intervals over samples, paired where two things are compared; a difference counts where its "
    "interval excludes 0. The answers are not corrected for their number. The table of comparisons is, so that a difference "
    "that counts here may not be resolved there."
)


@dataclass(frozen=True)
class ComparisonResult:
    """A finished comparison: its conditions, and all that is said about them, computed once.

    comparisons: rows of the table of paired comparisons. identical: results that must agree. best: with its rule and lead.
    """

    name: str
    conditions: list[ConditionResult]
    best: Best
    comparisons: list[dict[str, Any]]
    questions: list[dict[str, str]]
    relations: list[dict[str, Any]]
    identical: list[dict[str, Any]]

    @property
    def undecided(self) -> list[str]:
        """What the conditions' verdicts do not decide and why, each reason once."""
        return list(dict.fromkeys(note for c in self.conditions for note in c.results.undecided))


def compare_conditions(name: str, results: Sequence[ConditionResult]) -> ComparisonResult:
    """Compare finished conditions; the first one is what all others are compared with.

    Raises:
        ValueError: there is no condition.
    """
    if not results:
        raise ValueError("a comparison needs at least one condition")
    best = best_condition(results)
    return ComparisonResult(
        name=name,
        conditions=list(results),
        best=best,
        comparisons=grid_comparisons(results, results[0].config.seed),
        questions=questions(results, best),
        relations=relations(results),
        identical=identical_conditions(results),
    )


def relations(results: Sequence[ConditionResult]) -> list[dict[str, Any]]:
    """Return the relations known from earlier work, as far as the grid has their conditions: {relation, here, figures}.

    ``here`` says how a relation stands in this grid: it ``holds`` where the interval of the difference lies on the side of 0
    that the relation claims, and ``does not hold`` where the interval lies on the other side. In between, a relation that
    says *more* or *farther* is ``not resolved``, and one that says *no better* or *at least as many* is ``not refuted``,
    which can also mean that there are too few samples. Without an interval every relation is ``not resolved``.
    """
    conditions = unique_up_to_padding(results)
    first_of_mode = {setting(c, MODE): c for c in reversed(conditions)}
    attention, wrong_demo, oracle = (
        first_of_mode.get(mode) for mode in ("attention_diversity_span", "wrong_demo", "oracle_span")
    )
    n = len(conditions[0].records.on) if conditions else 0
    rows = []
    if attention and any(record["correct_random"] for record in attention.records.on):
        accuracy = contrast(attention, attention, ACCURACY, arm="random")
        rows.append(_relation("attention answers more than random spans", ACCURACY, accuracy, 1, n))
        kl = contrast(attention, attention, KL_TO_TEACHER, arm="random")
        rows.append(_relation("random spans are farther from the teacher than attention's", KL_TO_TEACHER, kl, -1, n))
    for group in families(results, SINK):
        fewest, most = min(group, key=lambda c: setting(c, SINK)), max(group, key=lambda c: setting(c, SINK))
        if setting(fewest, SOURCE) == "gather" and setting(fewest, SINK) == 0 and not fewest.reference:
            kept = f"with {setting(most, SINK)} ({fewest.label})"
            kl = contrast(fewest, most, KL_TO_TEACHER)
            claim = f"gather without sinks is farther from the teacher than {kept}"
            rows.append(_relation(claim, KL_TO_TEACHER, kl, 1, n))
            if fewest.records.off:
                moved = contrast(fewest, most, OFF_DELTA)
                claim = f"gather without sinks moves OFF prompts more than {kept}"
                rows.append(_relation(claim, OFF_DELTA, moved, 1, len(fewest.records.off)))
    if wrong_demo:
        accuracy = contrast(wrong_demo, wrong_demo, ACCURACY, arm="base")
        claim = "the prefix of another episode is no better than base"
        rows.append(_relation(claim, ACCURACY, accuracy, -1, n, claims_no_more=True))
    if oracle and attention:
        accuracy = contrast(oracle, attention, ACCURACY)
        claim = "the oracle answers at least as many as attention"
        rows.append(_relation(claim, ACCURACY, accuracy, 1, n, claims_no_more=True))
    return rows


def _relation(
    claim: str, quantity: Quantity, observed: Contrast, claimed_sign: int, n: int, claims_no_more: bool = False
) -> dict[str, str]:
    """Return a row of ``relations``.

    Args:
        claimed_sign: side of 0 on which the difference lies if the relation holds.
        claims_no_more: the relation says *no better* or *at least as many*, which a difference of 0 does not refute.
    """
    undecided = "not refuted" if claims_no_more and observed.low is not None else "not resolved"
    here = {claimed_sign: "holds", -claimed_sign: "does not hold", None: undecided}[observed.sign]
    return {"relation": claim, "here": here, "figures": f"{quantity.short_label} {observed.text}, n = {n}"}


def questions(results: Sequence[ConditionResult], best: Best) -> list[dict[str, str]]:
    """Return the standing questions that this grid can answer: {question, answer}."""
    conditions = unique_up_to_padding(results)
    best_answer = f"{best.condition.label}: {best.rule}." if best.condition else f"{sentence(best.rule)}."
    standing: dict[str, tuple[Callable[[Sequence[ConditionResult]], list[Family]], Callable[[Family], str]]] = {
        "How much do more spans help?": (budgets, _budget_answer),
        "Do kept sinks matter, and does it depend on where the K/V come from?": (sinks, _sink_answer),
        "Compact or absolute positions?": (positions, _positioning_answer),
        "Many short spans or few long ones, at the same number of tokens?": (lengths, _length_answer),
        "Does a selection made for another query of the same demonstration serve?": (transfers, _transfer_answer),
        "How far do OFF prompts move, against the whole demonstration as a prefix?": (selectors_with_full_demo, _off_answer),
    }
    answers = {"Which condition is best?": best_answer}
    for question, (groups_of, answer_of) in standing.items():
        if groups := groups_of(conditions):
            answers[question] = _answer_by_group(groups, answer_of)
    if (source := with_causal_drops(conditions)) and (rank_answer := _rank_answer(source)):
        answers["Does attention rank spans as hiding them does?"] = rank_answer
    if len(answers) > 1:
        answers["How sure are these answers?"] = HOW_SURE
    return [{"question": question, "answer": answer} for question, answer in answers.items()]


def _answer_by_group(groups: Sequence[Family], answer: Callable[[Family], str]) -> str:
    """Return the answer of every family, named by its first condition where there are several."""
    if len(groups) == 1:
        return sentence(answer(groups[0])) + "."
    return " ".join(f"{group[0].label}: {answer(group)}." for group in groups)


def _kl_and_accuracy(left: ConditionResult, right: ConditionResult) -> str:
    """Return what KL to the teacher and accuracy say of ``left`` against ``right``, each with its verdict first."""
    parts = []
    for quantity in (KL_TO_TEACHER, ACCURACY):
        difference = contrast(left, right, quantity)
        parts.append(f"{verdict_of(difference.sign, quantity)} ({quantity.short_label} {difference.text})")
    return " and ".join(parts)


def _means(group: Family, name_of: Callable[[ConditionResult], str]) -> str:
    """Return KL to the teacher and accuracy of every condition of a family."""
    return "; ".join(
        f"{name_of(c)}: KL {mean_with_interval(c, KL_TO_TEACHER)}, accuracy {mean_with_interval(c, ACCURACY)}" for c in group
    )


def _budget_answer(group: Family) -> str:
    most, fewest = group[-1], group[0]
    versus = f"{plural(setting(most, BUDGET), 'span')} against {setting(fewest, BUDGET)}"
    curve = _means(group, lambda c: plural(setting(c, BUDGET), "span"))
    return f"{versus}: {_kl_and_accuracy(most, fewest)}. All: {curve}"


def _sink_answer(group: Family) -> str:
    by_setting = {(setting(c, SOURCE), setting(c, SINK)): c for c in group}
    fewest, most = min(sink for _, sink in by_setting), max(sink for _, sink in by_setting)
    parts = []
    kl_changes: dict[str, list[float]] = {}  # by source: KL with the most sinks less that with the fewest, per sample
    for source in sorted({source for source, _ in by_setting}, reverse=True):
        without, kept = by_setting.get((source, fewest)), by_setting.get((source, most))
        if without and kept:
            parts.append(f"{source}, {most} sinks against {fewest}: {_kl_and_accuracy(kept, without)}")
            pairs = zip(series(kept, KL_TO_TEACHER), series(without, KL_TO_TEACHER), strict=True)
            kl_changes[source] = [a - b for a, b in pairs]
    if kl_changes.keys() >= {"gather", "prefill"}:
        extra = [a - b for a, b in zip(kl_changes["gather"], kl_changes["prefill"], strict=True)]
        low, high = interval(extra, group[0].config.seed, "sinks-by-source")
        if low is not None and high is not None:
            verdict = {
                1: "sinks help prefill more",
                -1: "sinks help gather more",
                None: "no resolved difference between the two sources",
            }[sign_of(low, high)]
            difference = signed_interval(float(np.mean(extra)), low, high)
            parts.append(f"{verdict} (change of KL in gather minus that in prefill: {difference} nats)")
    return "; ".join(parts)


def _positioning_answer(group: Family) -> str:
    reference = next((c for c in group if setting(c, POSITIONING) == "absolute"), group[-1])
    others = (c for c in group if c is not reference)
    return "; ".join(f"{_against(c, reference, POSITIONING)}: {_kl_and_accuracy(c, reference)}" for c in others)


def _against(condition: ConditionResult, reference: ConditionResult, name: str) -> str:
    return f"{setting(condition, name)} against {setting(reference, name)}"


def _length_answer(group: Family) -> str:
    shortest, longest = group[0], group[-1]
    versus = f"{spans_by_tokens(shortest)} against {spans_by_tokens(longest)}"
    return f"{versus}: {_kl_and_accuracy(shortest, longest)}. All: {_means(group, spans_by_tokens)}"


def _transfer_answer(group: Family) -> str:
    own_query, other_query = group[:2]
    return f"another query's spans against the query's own: {_kl_and_accuracy(other_query, own_query)}"


def _off_answer(group: Family) -> str:
    full_demo = next(c for c in group if setting(c, MODE) == "full_demo")
    by_sign: dict[int | None, list[str]] = {-1: [], 1: [], None: []}
    for c in group:
        if c is not full_demo:
            difference = contrast(c, full_demo, OFF_DELTA)
            moved = f"p99 {short(p99(series(c, OFF_DELTA)))}, change of the mean {difference.change}"
            by_sign[difference.sign].append(f"{c.label} ({moved})")
    deltas = series(full_demo, OFF_DELTA)
    mean = short(float(np.mean(deltas)))
    sentences = [f"the whole demonstration moves OFF prompts by {mean} nats on average, p99 {short(p99(deltas))}"]
    for sign, moved_by in by_sign.items():
        if moved_by:
            sentences.append(sentence(f"{verdict_of(sign, OFF_DELTA)} under {', '.join(moved_by)}"))
    return ". ".join(sentences)


def _rank_answer(condition: ConditionResult) -> str:
    agreement = rank_agreement(condition.records.on, condition.config.seed)
    mean, low, high = agreement["per_sample_mean"], agreement["low"], agreement["high"]
    if mean is None:
        return ""
    correlation = signed(mean) if low is None else signed_interval(mean, low, high)
    samples = plural(agreement["n"], "sample")
    return (
        f"Spearman's rank correlation of attention and causal drop is {correlation} on average over {samples}; "
        f"{signed(agreement['pooled'])} over all {agreement['candidates']} candidates pooled."
    )
