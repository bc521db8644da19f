"""Gates: a gate passes when every one of its checks does. Pure.

Gate A is the plumbing (does the cache pipeline hold), Gate B the effect (does the prefix help, and do no harm). What cannot
be decided, for want of samples or of a finite number, is ``insufficient`` and never counts as a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cedkv.checks.base import CheckResult, Gate, RunRecords, all_checks
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record


def all_pass(results: Sequence[CheckResult]) -> bool:
    """Return True when there are results and every one is a pass."""
    return bool(results) and all(result.verdict == "pass" for result in results)


def judge_gate(gate: Gate, run: RunRecords) -> list[CheckResult]:
    """Return the results of a gate's checks; those that do not apply to the run are left out."""
    results = (check.judge(run) for check in all_checks() if check.gate == gate)
    return [result for result in results if result is not None]


def gate_a(
    config: Phase2Config, on: Sequence[Record], plumbing: Sequence[Record], repro: Sequence[Record]
) -> list[CheckResult]:
    """Return the plumbing checks of a run, from its records."""
    return judge_gate("A", RunRecords(config, on, plumbing, repro, n_on=len(on)))


def gate_b(config: Phase2Config, metrics: Mapping[str, float | None], n_on: int, n_off: int) -> list[CheckResult]:
    """Return the effect checks of a run, from its metrics."""
    return judge_gate("B", RunRecords(config, metrics=metrics, n_on=n_on, n_off=n_off))


def numerical_floor(plumbing: Sequence[Record]) -> float | None:
    """Return the largest KL in nats between two mathematically identical computations; None of nothing finite."""
    return RunRecords(Phase2Config(), plumbing=plumbing).floor
