"""What a comparison of conditions says: paired tests of the whole table, the best condition, what must come out equal.

All conditions have the same samples in the same order, so every comparison is paired. Conditions that are *equal on paper*
(they differ in padding alone) are one condition here: the first of them is compared, the others are held to be equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cedkv.analysis.paired import compare, holm, n_needed, sign_flip
from cedkv.analysis.results import ConditionResult
from cedkv.checks.gates import LEAST_FLOOR
from cedkv.core.values import Record

ALPHA = 0.05
PADDING = "prefix.padding_mode"
QUANTITIES = {"accuracy": "correct_{}", "kl_to_teacher": "kl_{}_teacher", "off_delta": "phase2_delta_off_{}"}
"""What is compared, and the record it is read from, for an arm."""


def series(condition: ConditionResult, quantity: str, arm: str = "select") -> list[float]:
    """One value a sample (random: the mean over trials); NaN for what is missing."""
    records = condition.records.off if quantity == "off_delta" else condition.records.on
    return values(records, QUANTITIES[quantity].format(arm))


def values(records: Sequence[Record], name: str) -> list[float]:
    """One value a record, lists by their mean; NaN for what is missing."""
    found = (record.get(name) for record in records)
    return [math.nan if value is None or value == [] else float(np.mean(value)) for value in found]


def settings(condition: ConditionResult, without: Sequence[str]) -> str:
    """The configuration but for some dotted names, as a text to compare."""
    flat = {name.removeprefix("phase2."): value for name, value in condition.config.dotted().items()}
    return json.dumps({name: value for name, value in flat.items() if name not in without}, sort_keys=True)


def setting(condition: ConditionResult, name: str) -> Any:
    """The value of a dotted name in a condition's configuration."""
    return condition.config.dotted()[f"phase2.{name}"]


def families(results: Sequence[ConditionResult], *names: str) -> list[list[ConditionResult]]:
    """Groups of two and more conditions that agree in everything but these dotted names, in the grid's order."""
    groups: dict[str, list[ConditionResult]] = {}
    for condition in results:
        groups.setdefault(settings(condition, names), []).append(condition)
    return [group for group in groups.values() if len(group) > 1]


def unique_up_to_padding(results: Sequence[ConditionResult]) -> list[ConditionResult]:
    """The conditions without those that are equal on paper to an earlier one."""
    found: dict[str, ConditionResult] = {}
    for condition in results:
        found.setdefault(settings(condition, [PADDING]), condition)
    return list(found.values())


def floor_of(results: Sequence[ConditionResult]) -> float:
    """The largest numerical floor among conditions, in nats: no smaller difference of KLs means anything."""
    return max([LEAST_FLOOR, *(c.results.floor for c in results if c.results.floor is not None)])


def paired(left: Sequence[float], right: Sequence[float], names: tuple[str, str, str], seed: int) -> dict[str, Any]:
    """A row of the table without its verdict: difference, interval, samples needed. Numbers that are not finite decide
    nothing: difference, interval and p are then None.

    Args:
        names: left, right and quantity; intervals are drawn from them.
    """
    differences = [a - b for a, b in zip(left, right, strict=True)]
    if not differences or not np.isfinite(differences).all():
        unknown = dict.fromkeys(("difference", "low", "high", "p"))
        named = dict(zip(("left", "right", "quantity"), names, strict=True))
        return {**named, "n": len(differences), **unknown, "n_needed": None, "differences": []}
    row = asdict(compare(*names, list(zip(left, right, strict=True)), seed))
    return {**row, "n_needed": n_needed(differences), "differences": differences}


def grid_comparisons(results: Sequence[ConditionResult], seed: int) -> list[dict[str, Any]]:
    """The table of paired comparisons.

    Compared are each condition with the grid's first (accuracy, KL to teacher, OFF delta), and each candidate's selected
    spans with base and with its own random spans (accuracy, KL to teacher); reference points are compared with the first
    condition only. ``p`` is McNemar's exact test where outcomes are right or wrong, the sign-flip test elsewhere, and
    ``p_holm`` is Holm's correction over all rows. A row is resolved, ``left higher`` or ``right higher``, when p_holm <
    0.05 and the 95 % interval excludes 0 (KLs: and the difference is beyond the numerical floor); it is ``not resolved``
    otherwise. ``n_needed`` are the samples a single test would need for this difference at 80 % power.
    """
    chosen = unique_up_to_padding(results)
    rows = []
    for at, condition in enumerate(chosen):
        wanted = [] if condition.reference else [("base", "base")]
        random = condition.config.select.mode != "random_span" and any(r["correct_random"] for r in condition.records.on)
        wanted += [("random", "its random spans")] if random and not condition.reference else []
        for quantity in QUANTITIES:
            mine = series(condition, quantity)
            if at and mine:
                names = (condition.label, chosen[0].label, quantity)
                rows.append(paired(mine, series(chosen[0], quantity), names, seed))
            for arm, name in wanted if mine and quantity != "off_delta" else ():
                # the same interval as in the condition's own report
                row = paired(mine, series(condition, quantity, arm), ("select", arm, quantity), seed)
                rows.append(row | {"left": condition.label, "right": name})
    return _decided(rows, floor_of(results), seed)


def _decided(rows: list[dict[str, Any]], floor: float, seed: int) -> list[dict[str, Any]]:
    """The rows with p, p_holm and verdict; ``differences`` go."""
    by_length: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["p"] is None and len(row["differences"]) > 1:
            by_length.setdefault(row["n"], []).append(row)
    for alike in by_length.values():
        for row, p in zip(alike, sign_flip([row["differences"] for row in alike], seed), strict=True):
            row["p"] = p
    tested = [row for row in rows if row["p"] is not None]
    corrected = {id(row): p for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True)}
    found = []
    for row in rows:
        least = 0.0 if row["quantity"] == "accuracy" else floor
        p_holm = corrected.get(id(row))
        clear = p_holm is not None and p_holm < ALPHA and row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
        if row["difference"] is not None and abs(row["difference"]) <= least:
            clear, row["n_needed"] = False, None
        higher = "left higher" if (row["difference"] or 0) > 0 else "right higher"
        order = {name: row[name] for name in ("left", "right", "quantity", "n", "difference", "low", "high", "p")}
        found.append({**order, "p_holm": p_holm, "verdict": higher if clear else "not resolved", "n_needed": row["n_needed"]})
    return found


def best_condition(results: Sequence[ConditionResult]) -> tuple[ConditionResult | None, str]:
    """The best condition, if there is one, and the rule in words with what it is not resolved from (500 characters at most).

    Rule: among conditions that are no reference point and pass Gate A, and Gate B where any of them does, the smallest
    mean KL(select || teacher). It is resolved from another of them as in ``grid_comparisons``, Holm's correction over
    these comparisons.
    """
    ready = [c for c in unique_up_to_padding(results) if not c.reference and not c.oracle and c.results.verdicts.get("gateA")]
    good = [c for c in ready if c.results.verdicts.get("gateB")]
    pool = good or ready
    means = {c.key: float(np.mean(series(c, "kl_to_teacher"))) for c in pool if c.records.on}
    pool = [c for c in pool if math.isfinite(means.get(c.key, math.nan))]
    if not pool:
        return None, "no winner: no condition that is a candidate (not a reference point) passes Gate A"
    best = min(pool, key=lambda c: means[c.key])
    gates = "gates A and B" if good else "Gate A (none of them Gate B)"
    among = f"of {len(pool)} candidates that pass" if len(pool) > 1 else "the only candidate that passes"
    rule = f"smallest mean KL(select||teacher), {means[best.key]:.4g} nats, {among} {gates}"
    others = [c for c in pool if c is not best]
    seed, mine = best.config.seed, series(best, "kl_to_teacher")
    rows = [paired(mine, series(c, "kl_to_teacher"), (best.label, c.label, "kl_to_teacher"), seed) for c in others]
    open_ = [row["right"] for row in _decided(rows, floor_of(pool), seed) if row["verdict"] == "not resolved"]
    if not others:
        return best, f"{rule}; there is no other to compare it with"
    if not open_:
        return best, f"{rule}; resolved from all others"
    return best, f"{rule}; not resolved from: {listed(open_, 490 - len(rule) - len('; not resolved from: '))}"


def listed(names: Sequence[str], room: int) -> str:
    """Names in a row, as many as there is room for, and how many more there are."""
    for shown in range(len(names), 0, -1):
        more = f", and {len(names) - shown} more" if shown < len(names) else ""
        text = ", ".join(names[:shown]) + more
        if len(text) <= room:
            return text
    return f"{len(names)} other{'s' * (len(names) > 1)}"


def equal_on_paper(results: Sequence[ConditionResult]) -> list[dict[str, Any]]:
    """Conditions that must come out the same, and whether they do.

    Two conditions that differ in padding alone: nulls are masked and take no position. And ``full_demo`` where every layer
    sees it, against the teacher: nothing is left out, so nothing moves, at either positioning. ``largest`` is, for the
    teacher, the largest KL of a sample; for a pair the largest difference of a sample's KLs and log-probabilities, whose
    limit is ``sqrt(2 x KL limit)``: a KL of d moves log-probabilities by about sqrt(2 d). ``floor`` is the numerical floor in
    the same unit.
    """
    rows = []
    for group in families(results, PADDING):
        first = group[0]
        for other in group[1:]:
            names = ("kl_select_teacher", "phase2_delta_on_select", "answer_logprob_select")
            moved = [abs(a - b) for name in names for a, b in _both(first.records.on, other.records.on, name)]
            moved += [abs(a - b) for a, b in _both(first.records.off, other.records.off, "phase2_delta_off_select")]
            limit = math.sqrt(2 * first.config.kl_limit("padding_kl_max"))
            row = _equal(first, other.label, "largest difference of KLs and log-probabilities", moved, limit, other)
            rows.append(row | {"floor": None if row["floor"] is None else math.sqrt(2 * row["floor"])})
    for condition in results:
        if setting(condition, "select.mode") == "full_demo" and setting(condition, "layer_scope.injection") == "all":
            limit = condition.config.kl_limit("keep_all_kl_max")
            kls = values(condition.records.on, "kl_select_teacher")
            rows.append(_equal(condition, "teacher", "largest KL(select || teacher)", kls, limit, condition))
    return rows


def _both(left: Sequence[Record], right: Sequence[Record], name: str) -> list[tuple[float, float]]:
    return list(zip(values(left, name), values(right, name), strict=True)) if any(name in record for record in left) else []


def _equal(
    left: ConditionResult, right: str, quantity: str, moved: list[float], limit: float, other: ConditionResult
) -> dict[str, Any]:
    largest = float(np.max(moved)) if moved else math.nan
    floors = [c.results.floor for c in (left, other) if c.results.floor is not None]
    return {
        "left": left.label, "right": right, "quantity": quantity, "n": len(left.records.on),
        "largest": largest if math.isfinite(largest) else None, "floor": max(floors, default=None), "limit": limit,
        "verdict": "pass" if largest <= limit else "fail" if math.isfinite(largest) else "insufficient",
    }  # fmt: skip
