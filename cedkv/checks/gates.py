"""Gates: named conditions with an observed value, a limit and a verdict. Pure.

Gate A is the plumbing (does the cache pipeline hold), Gate B the effect (does the state help, and do no harm). What cannot
be decided, for want of samples or of a finite number, is ``insufficient`` and never counts as a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record
from cedkv.metrics_phase2 import largest, mean, repro_accuracies

Verdict = Literal["pass", "fail", "insufficient"]

EQUAL_ON_PAPER = ("teacher_incremental", "padding_equivalence", "batch_consistency", "left_alone", "off_alone")
"""Checks whose two sides are equal on paper: the largest KL among them is the numerical floor of this model and dtype."""

LEAST_FLOOR = 1e-12
"""Stands in for a floor of 0 nats (both sides came out the same to the last bit), which no effect at all would reach."""

EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
ROUNDINGS = 8
"""Roundings of a dtype that a sum of products may be away from float64, over the sum of their sizes (seen: 1 at most)."""


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
    """The plumbing checks; what does not apply (keys that cannot be rotated, no OFF prompts, no random arm) is left out."""
    limits = config.thresholds
    floor = numerical_floor(plumbing)
    over = None if floor is None else max(floor, LEAST_FLOOR) * limits.nonzero_effect_over_floor_min
    effect = mean(record["phase2_delta_on_select"] for record in on)
    accuracies = repro_accuracies(on, repeats)
    repeated = len(repeats) == len(on) * (config.eval.repro_runs - 1)
    drift = max(accuracies) - min(accuracies) if accuracies and repeated else None

    def largest_of(name: str, limit: float, unit: str, meaning: str, observation: str | None = None) -> Check:
        what = observation or name
        n = sum(what in record for record in plumbing)
        return Check("A", name, largest(plumbing, what), "<=", limit, n, unit, meaning)

    def there(observation: str) -> bool:
        return any(observation in record for record in plumbing)

    checks = [
        largest_of("teacher_incremental", config.kl_limit("teacher_incremental_kl_max"), "nats",
                   "demo cached, then query = one uncached pass"),
        largest_of("null_effect", config.kl_limit("null_effect_kl_max"), "nats", "an all-null prefix = base"),
        Check("A", "nonzero_effect", effect, ">=", over, len(on), "nats",
              f"the selected prefix moves the output by {limits.nonzero_effect_over_floor_min:g} x the numerical floor"),
        largest_of("roundtrip_rel_kl", limits.roundtrip_rel_kl_max, "ratio", "prefix saved, loaded, injected = as it was",
                   "roundtrip"),
        largest_of("roundtrip_exact", 0.0, "tensors", "prefix saved and loaded = as it was, bit by bit"),
        Check("A", "repro_tolerance", drift, "<=", limits.repro_acc_tol, len(on) if repeated else 0, "accuracy",
              f"{config.eval.repro_runs} runs of the select arm in other batches agree"),
        largest_of("keep_all_absolute", config.kl_limit("keep_all_kl_max"), "nats",
                   "every token kept in its place, or moved with the query = teacher"),
        largest_of("padding_equivalence", config.kl_limit("padding_kl_max"), "nats", "null_pad = shrink_to_selected"),
        largest_of("batch_consistency", config.kl_limit("batch_kl_max"), "nats", "a batch of N = N batches of 1"),
        largest_of("attention_alone", math.sqrt(2 * config.kl_limit("batch_kl_max")), "relative",
                   "attention scores of a sample alone = those selected by"),
        largest_of("selection_rules", 0.0, "samples", "kept are BOS, sinks and what the evidence gives, where the modes say"),
        largest_of("kv_precision", 0.5, "share", "K/V would lose by a narrower dtype"),
        largest_of("source_cache_unchanged", limits.source_cache_diff_max, "absolute",
                   "demo cache and prefix are the same after use"),
    ]  # fmt: skip
    if there("arithmetic"):
        checks.append(largest_of("arithmetic", ROUNDINGS * EPSILON[config.runtime.torch_dtype], "relative",
                                 f"linear layers = float64 to {ROUNDINGS} roundings"))  # fmt: skip
    if there("left_alone") or (config.prefix.kv_source == "prefill" and config.layer_scope.injection == "all"):
        checks.append(largest_of("left_alone", config.kl_limit("batch_kl_max"), "nats",
                                 "select = kept tokens and query in one uncached pass of the model left alone"))  # fmt: skip
    if config.prefix.kv_source == "gather":
        checks.append(largest_of("first_layer", config.kl_limit("rotation_rel_error_max"), "relative",
                                 "gathered K/V of the first layer = the model's own at those positions"))  # fmt: skip
    if there("unseen_layers"):
        checks.append(largest_of("unseen_layers", config.kl_limit("batch_kl_max"), "nats",
                                 "what layers outside layer_scope.injection hold changes nothing"))  # fmt: skip
    if there("off_alone"):
        checks.append(largest_of("off_alone", config.kl_limit("batch_kl_max"), "nats",
                                 "an OFF prompt runs under the state of its ON sample"))  # fmt: skip
    if there("rotation_equivariance"):
        checks.append(largest_of("rotation_equivariance", config.kl_limit("rotation_rel_error_max"), "relative",
                                 "keys run at p + d = keys at p, rotated by d"))  # fmt: skip
    if any(record["correct_random"] for record in on):
        moved = [abs(kl - record["phase2_delta_on_select"]) for record in on for kl in _other_randoms(record)]
        checks.append(Check("A", "random_is_another", float(np.max(moved)) if moved else None, ">=", over, len(moved), "nats",
                            "random spans that differ from the selected ones move the output otherwise"))  # fmt: skip
    return checks


def _other_randoms(record: Record) -> list[float]:
    """KL(random || base) of the trials that keep other tokens than select does."""
    trials = zip(record.get("kl_random_base", []), record.get("random_same", []), strict=True)
    return [value for value, same in trials if not same]


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
