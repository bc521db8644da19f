"""Gates: a gate passes when every one of its checks does. Pure.

Gate A is the plumbing (does the cache pipeline hold), Gate B the effect (does the prefix help, and do no harm). What cannot
be decided, for want of samples, of a finite number or of a precondition, is ``insufficient`` and never counts as a pass.
Preconditions are judged like a gate's checks and are part of no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence

from cedkv.checks.base import CHECKS, CheckResult, Gate, RunRecords, all_checks


def all_pass(results: Sequence[CheckResult]) -> bool:
    """Return True when there are results and every one is a pass."""
    return bool(results) and all(result.verdict == "pass" for result in results)


def judge_gate(gate: Gate, run: RunRecords) -> list[CheckResult]:
    """Return the results of a gate's checks; those that do not apply to the run are left out."""
    results = []
    for check in all_checks():
        if check.gate != gate:
            continue
        with CHECKS.errors_named(check.key):
            result = check.judge(run)
            if not isinstance(result, CheckResult | None):
                raise TypeError(f"judge returned {result!r}, not self.result(observed, limit, n)")
        if result is not None:
            results.append(result)
    return results
