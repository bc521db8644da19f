"""What a comparison of conditions says: paired tests of the whole table, and what must come out identical.

All conditions have the same samples in the same order, so every comparison is paired. Conditions that are *mathematically
identical* (they differ in padding alone) count as one condition here: the first of them is compared, and
``identical_conditions`` checks that the others agree with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cedkv.analysis.paired import holm, n_needed, paired_difference, sign_flip
from cedkv.analysis.quantities import KL_TO_TEACHER, OFF_DELTA, QUANTITIES, Quantity
from cedkv.analysis.results import ConditionResult
from cedkv.checks.effects import LEAST_FLOOR
from cedkv.core.values import Record

ALPHA = 0.05
PADDING = "prefix.padding_mode"


def series(condition: ConditionResult, quantity: Quantity, arm: str = "select") -> list[float]:
    """Return one value per sample that has the quantity (random: the mean over trials); NaN for a missing value."""
    records = condition.records.on if quantity.samples == "on" else condition.records.off
    return column_values(quantity.having(records), quantity.column(arm))


def paired_series(
    left: ConditionResult, right: ConditionResult, quantity: Quantity, right_arm: str = "select"
) -> tuple[list[float], list[float]]:
    """Return the values of two sides, one per sample; of a ``partial`` quantity, of the samples in which both sides have it.

    Args:
        right_arm: the arm of the right condition; the left one is always ``select``.
    """
    left_records, right_records = ((c.records.on if quantity.samples == "on" else c.records.off) for c in (left, right))
    left_column, right_column = quantity.column("select"), quantity.column(right_arm)
    pairs = [
        (left_record, right_record)
        for left_record, right_record in zip(left_records, right_records, strict=True)
        if quantity.is_in(left_record) and quantity.is_in(right_record, right_arm)
    ]
    return column_values([pair[0] for pair in pairs], left_column), column_values([pair[1] for pair in pairs], right_column)


def column_values(records: Sequence[Record], column: str) -> list[float]:
    """Return one value per record, the mean where the record holds a list; NaN for a missing value."""
    cells = (record.get(column) for record in records)
    return [math.nan if cell is None or cell == [] else float(np.mean(cell)) for cell in cells]


def settings_except(condition: ConditionResult, names: Sequence[str]) -> str:
    """Return the configuration without some dotted names, as a text that can be compared."""
    settings = {name: value for name, value in condition.config.by_key().items() if name not in names}
    return json.dumps(settings, sort_keys=True)


def setting(condition: ConditionResult, name: str) -> Any:
    """Return the value of a dotted name in the condition's configuration."""
    return condition.config.by_key()[name]


def groups_differing_in(results: Sequence[ConditionResult], *names: str) -> list[list[ConditionResult]]:
    """Return groups of at least two conditions that agree in everything but these dotted names, in the grid's order."""
    groups: dict[str, list[ConditionResult]] = {}
    for condition in results:
        groups.setdefault(settings_except(condition, names), []).append(condition)
    return [group for group in groups.values() if len(group) > 1]


def unique_up_to_padding(results: Sequence[ConditionResult]) -> list[ConditionResult]:
    """Return the conditions without those that are mathematically identical to an earlier one."""
    unique: dict[str, ConditionResult] = {}
    for condition in results:
        unique.setdefault(settings_except(condition, [PADDING]), condition)
    return list(unique.values())


def largest_floor(results: Sequence[ConditionResult]) -> float:
    """Return the largest numerical floor of the conditions, in nats: smaller differences of KLs have no meaning."""
    return max([LEAST_FLOOR, *(c.results.floor for c in results if c.results.floor is not None)])


def comparison_row(
    left_values: Sequence[float], right_values: Sequence[float], left: str, right: str, quantity: Quantity, seed: int
) -> dict[str, Any]:
    """Return a row of the table without its verdict: difference, interval, samples needed.

    Args:
        left_values, right_values: one value per sample.
        left, right: names of the two sides; the interval's resamples are drawn from them.

    Returns:
        A ``PairedDifference`` as a dictionary, with ``n_needed`` and the ``differences``. When a difference is not finite,
        nothing can be decided: difference, interval and p are then None, and ``differences`` is empty.
    """
    differences = [a - b for a, b in zip(left_values, right_values, strict=True)]
    if not differences or not np.isfinite(differences).all():
        row = {"left": left, "right": right, "quantity": quantity.name, "n": len(differences)}
        return {**row, **dict.fromkeys(("difference", "low", "high", "p", "n_needed")), "differences": []}
    pairs = list(zip(left_values, right_values, strict=True))
    row = asdict(paired_difference(left, right, quantity.name, pairs, seed))
    return {**row, "n_needed": n_needed(differences), "differences": differences}


def grid_comparisons(results: Sequence[ConditionResult], seed: int) -> list[dict[str, Any]]:
    """Return the table of paired comparisons.

    Each condition is compared with the grid's first one (by every quantity), and the selected spans of each candidate with
    base and with the condition's own random spans (by those that these arms have); reference points are compared with the
    first condition only. Samples without a value of a ``partial`` quantity on either side are left out. ``p`` is McNemar's
    exact test where outcomes are right or wrong, the sign-flip test elsewhere, and ``p_holm`` is Holm's correction over all
    rows. A row is resolved, ``left higher`` or ``right higher``, when p_holm < 0.05 and the 95 % interval excludes 0 (in
    nats, when the difference also exceeds the numerical floor); otherwise it is ``not resolved``. ``n_needed`` is the number
    of samples that a single test needs for this difference at 80 % power.
    """
    conditions = unique_up_to_padding(results)
    first, rows = conditions[0], []
    for i, condition in enumerate(conditions):
        arms = _compared_arms(condition)
        for quantity in QUANTITIES.values():
            values, of_first = paired_series(condition, first, quantity)
            if i > 0 and values:
                rows.append(comparison_row(values, of_first, condition.label, first.label, quantity, seed))
            for arm, arm_name in arms.items():
                select, of_arm = paired_series(condition, condition, quantity, arm) if arm in quantity.arms else ([], [])
                if select:  # named as in the condition's own report, so that both show the same interval
                    row = comparison_row(select, of_arm, "select", arm, quantity, seed)
                    rows.append(row | {"left": condition.label, "right": arm_name})
    return with_verdicts(rows, largest_floor(results), seed)


def _compared_arms(condition: ConditionResult) -> dict[str, str]:
    """Return the arms that the selected spans of a condition are compared with, and their names in the table."""
    if condition.reference:
        return {}
    has_random = condition.config.select.mode != "random_span" and any(r["correct_random"] for r in condition.records.on)
    return {"base": "base"} | ({"random": "its random spans"} if has_random else {})


def with_verdicts(rows: list[dict[str, Any]], floor: float, seed: int) -> list[dict[str, Any]]:
    """Return the rows with p, p_holm (Holm's correction over all of them) and verdict, and without their ``differences``."""
    untested: dict[int, list[dict[str, Any]]] = {}  # by number of samples: rows of one length share their sign flips
    for row in rows:
        if row["p"] is None and len(row["differences"]) > 1:
            untested.setdefault(row["n"], []).append(row)
    for same_length in untested.values():
        p_values = sign_flip([row["differences"] for row in same_length], seed)
        for row, p in zip(same_length, p_values, strict=True):
            row["p"] = p
    tested = [row for row in rows if row["p"] is not None]
    corrected = {id(row): p for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True)}
    return [_with_verdict(row, corrected.get(id(row)), floor) for row in rows]


def _with_verdict(row: dict[str, Any], p_holm: float | None, floor: float) -> dict[str, Any]:
    difference = row["difference"]
    interval_excludes_0 = row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
    resolved = p_holm is not None and p_holm < ALPHA and interval_excludes_0
    samples = row["n_needed"]
    smallest = floor if QUANTITIES[row["quantity"]].unit == "nats" else 0.0
    if difference is not None and abs(difference) <= smallest:
        resolved, samples = False, None
    higher = "left higher" if (difference or 0) > 0 else "right higher"
    columns = {name: row[name] for name in ("left", "right", "quantity", "n", "difference", "low", "high", "p")}
    return {**columns, "p_holm": p_holm, "verdict": higher if resolved else "not resolved", "n_needed": samples}


def identical_conditions(results: Sequence[ConditionResult]) -> list[dict[str, Any]]:
    """Return the results that must come out identical, and whether they do.

    Two conditions that differ in padding alone are mathematically identical: null slots are masked and take no position.
    So are the teacher and ``full_demo`` injected into every layer, at either positioning: no token is left out or moved.

    Returns:
        ``largest`` is, for the teacher, the largest KL of a sample in nats; for a pair of conditions the largest difference
        of a sample's KLs and log-probabilities, whose limit is ``sqrt(2 x KL limit)``: a KL of d moves log-probabilities by
        about sqrt(2 d). ``floor`` is the numerical floor in the same unit.
    """
    rows = []
    for group in groups_differing_in(results, PADDING):
        first = group[0]
        for repeated in group[1:]:
            columns = (KL_TO_TEACHER.column("select"), "phase2_delta_on_select", "answer_logprob_select")
            gaps = [gap for column in columns for gap in _absolute_gaps(first.records.on, repeated.records.on, column)]
            gaps += _absolute_gaps(first.records.off, repeated.records.off, OFF_DELTA.column("select"))
            floor = max(_floors(first, repeated), default=None)
            rows.append(
                _identity_row(
                    first,
                    repeated.label,
                    quantity="largest difference of KLs and log-probabilities",
                    deviations=gaps,
                    limit=first.config.difference_limit("padding_kl_max"),
                    floor=None if floor is None else math.sqrt(2 * floor),
                )
            )
    for condition in results:
        if setting(condition, "select.mode") == "full_demo" and setting(condition, "layer_scope.injection") == "all":
            rows.append(
                _identity_row(
                    condition,
                    "teacher",
                    quantity="largest KL(select || teacher)",
                    deviations=series(condition, KL_TO_TEACHER),
                    limit=condition.config.kl_limit("keep_all_kl_max"),
                    floor=max(_floors(condition), default=None),
                )
            )
    return rows


def _absolute_gaps(left: Sequence[Record], right: Sequence[Record], column: str) -> list[float]:
    if not any(column in record for record in left):
        return []
    return [abs(a - b) for a, b in zip(column_values(left, column), column_values(right, column), strict=True)]


def _floors(*conditions: ConditionResult) -> list[float]:
    return [c.results.floor for c in conditions if c.results.floor is not None]


def _identity_row(
    left: ConditionResult, right: str, *, quantity: str, deviations: list[float], limit: float, floor: float | None
) -> dict[str, Any]:
    largest = float(np.max(deviations)) if deviations else math.nan
    return {
        "left": left.label,
        "right": right,
        "quantity": quantity,
        "n": len(left.records.on),
        "largest": largest if math.isfinite(largest) else None,
        "floor": floor,
        "limit": limit,
        "verdict": "pass" if largest <= limit else "fail" if math.isfinite(largest) else "insufficient",
    }
