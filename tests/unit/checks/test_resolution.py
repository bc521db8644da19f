"""Few samples: what n can resolve is said with each check of Gate B, and what nothing could have failed never passes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, sem, t

from cedkv.checks.base import CheckResult, relative
from cedkv.checks.precision import KvPrecision
from cedkv.checks.resolution import LEAST_DIFFERING, P_VALUE, accuracy_resolution, mean_resolution, tail_resolution
from cedkv.config.resolve import resolve
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record
from tests.support import making

RIGHT, WRONG = making.on(correct_select=True, correct_random=[False, False]), making.on(correct_select=False)


def gate_b(on: list[Record], *overrides: str) -> dict[str, CheckResult]:
    config = resolve(None, list(overrides)) if overrides else Phase2Config()
    return {check.name: check for check in making.gate_b(config, on, [making.off()])}


def test_fewest_samples_are_those_of_the_exact_test() -> None:
    assert (
        binomtest(LEAST_DIFFERING, LEAST_DIFFERING).pvalue
        < P_VALUE
        <= binomtest(LEAST_DIFFERING - 1, LEAST_DIFFERING - 1).pvalue
    )


@pytest.mark.parametrize(("n", "verdict"), [(4, "insufficient"), (5, "insufficient"), (6, "pass"), (64, "pass")])
def test_accuracy_that_n_cannot_resolve_never_passes(n: int, verdict: str) -> None:
    found = gate_b([RIGHT] * n)
    assert (found["on_gain"].verdict, found["select_vs_random"].verdict) == (verdict, verdict)
    assert found["delta_on"].verdict == "pass"
    assert (f"{n} samples resolve no difference" in found["on_gain"].note) == (n < 6)


def test_what_fails_on_few_samples_still_fails() -> None:
    assert gate_b([making.on(correct_select=False, correct_base=False)] * 4)["on_gain"].verdict == "fail"


def test_nothing_against_nothing_is_no_comparison() -> None:
    """Neither select nor random answers: 0 >= 0 holds and says nothing; one answer of select is a comparison."""
    none = [making.on(correct_select=False, correct_random=[False, False])] * 8
    assert gate_b(none)["select_vs_random"].verdict == "insufficient"
    assert gate_b(none)["select_vs_random"].note == "no outcome could have failed: 0 is the worst, and the limit is 0"
    assert gate_b([*none, RIGHT])["select_vs_random"].verdict == "pass"


@pytest.mark.parametrize(
    ("name", "threshold"), [("delta_on", "delta_on_min=0"), ("on_gain", "on_gain_min=-1"), ("on_gain", "on_gain_min=0")]
)
def test_a_limit_that_nothing_can_miss_decides_nothing(name: str, threshold: str) -> None:
    found = gate_b([RIGHT] * 8, f"thresholds.{threshold}")[name]
    assert found.verdict == "insufficient"
    assert "no outcome could have failed" in found.note


def test_every_check_of_gate_b_says_what_n_resolves() -> None:
    assert all(check.resolves for check in gate_b([RIGHT] * 8).values())
    assert accuracy_resolution(64).startswith("64 samples resolve differences of accuracy from 0.09375 on")
    assert (
        tail_resolution(128) == "128 with none beyond the limit would bound the share of all prompts at 0.02313 (95 %); "
        "0.01 takes 299"
    )


def test_interval_of_a_mean_is_students() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.5]
    half = float(t.ppf(0.975, 4) * sem(values))
    assert mean_resolution(np.mean, values) == f"5 samples give it to ± {half:.4g} (95 %, jackknife)"
    assert mean_resolution(np.mean, [0.1]) == "n = 1 has no interval"
    assert mean_resolution(np.mean, [0.1, math.nan]) == "n = 2 has no interval"


@pytest.mark.parametrize(
    ("difference", "scale", "error"),
    [(0.0, 0.0, 0.0), (1.0, 2.0, 0.5), (1e-30, 0.0, math.inf), (math.nan, 0.0, math.nan), (0.0, math.nan, math.nan)],
)
def test_zeros_that_agree_differ_by_nothing(difference: float, scale: float, error: float) -> None:
    assert relative(difference, scale) == pytest.approx(error, nan_ok=True)


def test_keys_and_values_that_are_all_zero_are_held_by_no_narrower_dtype() -> None:
    """No number is no evidence of rounding: the share is 0, not 0/0."""
    prefix = SimpleNamespace(keys=(torch.zeros(2, 1, 3, 4),), values=(torch.zeros(2, 1, 3, 4),))
    inputs = SimpleNamespace(samples=[0, 1], demo=prefix, prefix=prefix)
    assert KvPrecision().observe(None, Phase2Config(), inputs) == [0.0, 0.0]
