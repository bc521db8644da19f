"""Gates: named conditions with an observed value, a limit and a verdict. Pure.

Gate A is the plumbing (does the cache pipeline hold), Gate B the effect (does the state help, and do no harm). What cannot
be decided, for want of samples or of a finite number, is ``insufficient`` and never counts as a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cedkv.config import Phase2Config
from cedkv.metrics_phase2 import largest, mean, repro_accuracies
from cedkv.types import Record

Verdict = Literal["pass", "fail", "insufficient"]

EQUAL_ON_PAPER = ("teacher_incremental", "padding_equivalence", "batch_consistency")
"""Checks whose two sides are equal on paper: the largest KL among them is the numerical floor of this model and dtype."""

LEAST_FLOOR = 1e-12
"""Stands in for a floor of 0 nats (both sides came out the same to the last bit), which no effect at all would reach."""


@dataclass(frozen=True)
class Check:
    """One condition of a gate: ``observed <relation> limit``, over ``n`` samples."""

    gate: Literal["A", "B"]
    name: str
    observed: float | None
    relation: Literal["<=", ">="]
    limit: float | None
    n: int
    unit: str
    meaning: str

    @property
    def verdict(self) -> Verdict:
        if self.n < 1 or self.observed is None or self.limit is None:
            return "insufficient"
        if not (math.isfinite(self.observed) and math.isfinite(self.limit)):
            return "insufficient"
        holds = self.observed <= self.limit if self.relation == "<=" else self.observed >= self.limit
        return "pass" if holds else "fail"


def all_pass(checks: Sequence[Check]) -> bool:
    """True when there are checks and every one passes."""
    return bool(checks) and all(check.verdict == "pass" for check in checks)


def numerical_floor(plumbing: Sequence[Record]) -> float | None:
    """Largest KL in nats between two computations that are equal on paper."""
    found = [value for check in EQUAL_ON_PAPER if (value := largest(plumbing, check)) is not None]
    return max(found) if found and all(math.isfinite(value) for value in found) else None


def gate_a(config: Phase2Config, on: Sequence[Record], plumbing: Sequence[Record], repeats: Sequence[Record]) -> list[Check]:
    """The plumbing checks; ``rotation_equivariance`` only where keys can be rotated."""
    limits, n = config.thresholds, len(plumbing)
    floor = numerical_floor(plumbing)
    effect = mean(record["phase2_delta_on_select"] for record in on)
    accuracies = repro_accuracies(on, repeats)
    repeated = len(repeats) == len(on) * (config.eval.repro_runs - 1)
    drift = max(accuracies) - min(accuracies) if accuracies and repeated else None

    def largest_of(name: str, check: str, threshold: str, unit: str, meaning: str) -> Check:
        return Check("A", name, largest(plumbing, check), "<=", config.kl_limit(threshold), n, unit, meaning)

    checks = [
        largest_of("teacher_incremental", "teacher_incremental", "teacher_incremental_kl_max", "nats",
                   "demo cached, then query = one uncached pass"),
        largest_of("null_effect", "null_effect", "null_effect_kl_max", "nats", "an all-null prefix = base"),
        Check("A", "nonzero_effect", effect, ">=",
              None if floor is None else max(floor, LEAST_FLOOR) * limits.nonzero_effect_over_floor_min, len(on), "nats",
              f"the selected prefix moves the output by {limits.nonzero_effect_over_floor_min:g} x the numerical floor"),
        largest_of("roundtrip_rel_kl", "roundtrip", "roundtrip_rel_kl_max", "ratio",
                   "prefix saved, loaded, injected = as it was"),
        Check("A", "repro_tolerance", drift, "<=", limits.repro_acc_tol, len(on) if repeated else 0, "accuracy",
              f"{config.eval.repro_runs} runs of the select arm in other batches agree"),
        largest_of("keep_all_absolute", "keep_all_absolute", "keep_all_kl_max", "nats",
                   "every token kept in its place = teacher"),
        largest_of("padding_equivalence", "padding_equivalence", "padding_kl_max", "nats",
                   "null_pad = shrink_to_selected"),
        largest_of("batch_consistency", "batch_consistency", "batch_kl_max", "nats", "a batch of N = N batches of 1"),
    ]  # fmt: skip
    if any("rotation_equivariance" in record for record in plumbing):
        checks.append(
            largest_of("rotation_equivariance", "rotation_equivariance", "rotation_rel_error_max", "relative",
                       "keys run at p + d = keys at p, rotated by d")
        )  # fmt: skip
    checks.append(
        largest_of("source_cache_unchanged", "source_cache_unchanged", "source_cache_diff_max", "absolute",
                   "demo cache and prefix are the same after use")
    )  # fmt: skip
    return checks


def gate_b(config: Phase2Config, metrics: dict[str, float | None], n_on: int, n_off: int) -> list[Check]:
    """The effect: five conditions."""
    limits = config.thresholds
    return [
        Check("B", "on_gain", metrics["phase2_on_gain_select"], ">=", limits.on_gain_min, n_on, "accuracy",
              "select answers more ON samples than base"),
        Check("B", "off_delta_p99", metrics["phase2_off_delta_p99_select"], "<=", limits.off_delta_p99_max, n_off, "nats",
              "the state leaves OFF prompts alone"),
        Check("B", "delta_on", metrics["phase2_delta_on_mean_select"], ">=", limits.delta_on_min, n_on, "nats",
              "the state has an effect on ON samples"),
        Check("B", "rel_kl_to_teacher", metrics["phase2_rel_kl_to_teacher_select"], "<=", limits.rel_kl_to_teacher_max,
              n_on, "ratio", "select is nearer to the teacher than base is"),
        Check("B", "select_vs_random", metrics["phase2_on_acc_student_select"], ">=",
              metrics["phase2_on_acc_student_random_mean"], n_on, "accuracy", "select answers as many as random spans"),
    ]  # fmt: skip
