"""The best condition of a grid: what it is chosen by, and how far it is ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cedkv.analysis.comparison import comparison_row, largest_floor, series, unique_up_to_padding, with_verdicts
from cedkv.analysis.quantities import ACCURACY, KL_AMONG_LABELS, KL_TO_TEACHER, Quantity
from cedkv.analysis.results import GROUPS, ConditionResult
from cedkv.core.text import plural
from cedkv.metrics_phase2 import mean

MAX_RULE_LENGTH = 490
"""Characters of the rule that names the best condition; it is a tag of the run in MLflow."""


@dataclass(frozen=True)
class Best:
    """The best condition of a grid, if there is one.

    rule: in words, ``MAX_RULE_LENGTH`` characters at most.
    lead: how far it is ahead: ``resolved`` from all other candidates, ``unresolved`` from some, the ``only`` candidate left, or
        ``none`` where there is no best condition.
    """

    condition: ConditionResult | None
    rule: str
    lead: Literal["resolved", "unresolved", "only", "none"]


def ranked(results: Sequence[ConditionResult]) -> list[ConditionResult]:
    """Return the conditions from the best down: by the accuracy of the select arm; equal accuracies by the smaller mean KL to
    the teacher, among labels where every condition has labels.
    """
    closeness = _closeness(results)

    def order(condition: ConditionResult) -> tuple[float, float]:
        return -_mean(condition, ACCURACY, missing=-1.0), _mean(condition, closeness, missing=math.inf)

    return sorted(results, key=order)


def by_group(results: Sequence[ConditionResult]) -> list[ConditionResult]:
    """Return the conditions group by group (``GROUPS``), each from the best down."""
    return sorted(ranked(results), key=lambda condition: GROUPS.index(condition.group))


def _closeness(results: Sequence[ConditionResult]) -> Quantity:
    """Return the KL that decides between equal accuracies."""
    return KL_AMONG_LABELS if all(series(c, KL_AMONG_LABELS) for c in results) else KL_TO_TEACHER


def _mean(condition: ConditionResult, quantity: Quantity, missing: float) -> float:
    value = mean(series(condition, quantity))
    return value if value is not None and math.isfinite(value) else missing


def best_condition(results: Sequence[ConditionResult]) -> Best:
    """Return the best condition with the rule that found it.

    Rule: among the conditions that are no reference point and pass Gate A (and Gate B, where any of them does), the first by
    ``ranked``: the highest accuracy. Conditions with a KL to the teacher that is not finite are left out. The rule says
    which other candidates the best one is not resolved from: McNemar's exact test of accuracy, as in ``grid_comparisons``,
    with Holm's correction over these comparisons; and where it is resolved from none, how many samples would be needed. Where
    the teacher does not gain on base, the rule begins with that.
    """
    unique = unique_up_to_padding(results)
    pass_a = [c for c in unique if not c.reference and c.results.verdicts.get("gateA")]
    pass_both = [c for c in pass_a if c.results.verdicts.get("gateB")]
    pool = ranked([c for c in pass_both or pass_a if math.isfinite(_mean(c, KL_TO_TEACHER, missing=math.inf))])
    if not pool:
        return Best(None, "no winner: no condition that is a candidate (not a reference point) passes Gate A", "none")
    best, *others = pool
    accuracy = _mean(best, ACCURACY, missing=math.nan)
    rule = f"{_caveat(best)}highest accuracy, {accuracy:.4g}"
    tied = 1 + sum(_mean(c, ACCURACY, missing=math.nan) == accuracy for c in others)
    if tied > 1:
        closeness = _closeness(pool)
        kl = f"mean {closeness.label}, {_mean(best, closeness, missing=math.nan):.4g} nats"
        rule += f" (of {tied} with this accuracy the smallest {kl})"
    gates = "gates A and B" if pass_both else "Gate A (none of them Gate B)"
    rule += f", {f'of {len(pool)} candidates that pass' if others else 'the only candidate that passes'} {gates}"
    if not others:
        return Best(best, f"{rule}; there is no other candidate to compare it with", "only")
    values, seed = series(best, ACCURACY), best.config.seed
    rows = [comparison_row(values, series(c, ACCURACY), best.label, c.label, ACCURACY, seed) for c in others]
    decided = with_verdicts(rows, largest_floor(pool), seed)
    unresolved = [row for row in decided if row["verdict"] == "not resolved"]
    test = f"McNemar's exact test, Holm over {plural(len(others), 'comparison')}"
    if not unresolved:
        return Best(best, f"{rule}; resolved from all others ({test})", "resolved")
    if len(unresolved) == len(others):
        return Best(best, f"{rule}; not resolved from any other candidate: {_too_few(unresolved, test)}", "unresolved")
    rule += f"; not resolved ({test}, n = {len(values)}) from: "
    names = [row["right"] for row in unresolved]
    return Best(best, rule + listed(names, MAX_RULE_LENGTH - len(rule)), "unresolved")


def _caveat(best: ConditionResult) -> str:
    """Return that the rule says nothing about the selection, where the teacher does not gain."""
    if not any(check.tag == "teacher_gain" and check.verdict == "fail" for check in best.results.checks):
        return ""
    gain = best.results.metrics["phase2_on_gain_teacher"]
    return f"nothing is decided about the selection, as the teacher itself gains {gain:.4g} on base; "


def _too_few(rows: Sequence[dict[str, Any]], test: str) -> str:
    """Return why no row is resolved, and the number of samples that would resolve it."""
    n, needed = rows[0]["n"], sorted({row["n_needed"] for row in rows} - {None})
    if not needed:
        return f"n = {n} samples show no difference in accuracy"
    span = f"{needed[0]} to {needed[-1]}" if len(needed) > 1 else str(needed[0])
    return f"n = {n} samples are too few to tell ({test}); a single test needs {span} of them"


def listed(names: Sequence[str], room: int) -> str:
    """Return names separated by commas, as many as fit into ``room`` characters, and the number of the remaining ones."""
    for shown in range(len(names), 0, -1):
        more = f", and {len(names) - shown} more" if shown < len(names) else ""
        text = ", ".join(names[:shown]) + more
        if len(text) <= room:
            return text
    return f"{len(names)} other{'s' * (len(names) > 1)}"
