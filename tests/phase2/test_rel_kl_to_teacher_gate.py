"""Gate B's condition on the distance to the teacher: the formula, and the verdict at and around the limit."""

import math

import numpy as np
import pytest

from cedkv.checks.base import CheckResult as Check
from cedkv.checks.base import RunRecords
from cedkv.checks.gates import all_pass, judge_gate
from cedkv.config.schema import Phase2Config, ThresholdsBlock
from cedkv.metrics_phase2 import relative_kl, run_metrics
from tests.support import making

LIMIT = 0.75
CONFIG = Phase2Config(thresholds=ThresholdsBlock(rel_kl_to_teacher_max=LIMIT))


def check(observed: float | None, n: int = 4) -> Check:
    metrics = run_metrics([making.on()], [making.off()]) | {"phase2_rel_kl_to_teacher_select": observed}
    run = RunRecords(CONFIG, [making.on()] * n, [making.off()] * n, metrics=metrics)
    (found,) = [c for c in judge_gate("B", run) if c.name == "rel_kl_to_teacher"]
    return found


def test_formula_by_hand() -> None:
    assert relative_kl([0.2, 0.4], [1.0, 2.0]) == pytest.approx(0.3 / 1.500001, rel=1e-12)


def test_ratio_of_means_not_mean_of_ratios() -> None:
    """A sample on which base is already at the teacher must not decide the figure alone."""
    ratio = relative_kl([0.1, 1.0], [1e-9, 2.0])
    assert ratio == pytest.approx(0.55, rel=1e-5)


def test_base_equal_to_teacher_is_finite() -> None:
    assert relative_kl([0.5], [0.0]) == pytest.approx(0.5e6)
    assert relative_kl([0.0], [0.0]) == 0.0


def test_run_metric_uses_the_samples_of_both_arms() -> None:
    on = [making.on(kl_select_teacher=0.1, kl_base_teacher=1.0), making.on(kl_select_teacher=0.5, kl_base_teacher=3.0)]
    metrics = run_metrics(on, [])
    assert metrics["phase2_rel_kl_to_teacher_select"] == pytest.approx(0.3 / 2.000001)
    assert metrics["phase2_rel_kl_to_teacher_random"] == pytest.approx(1.25 / 2.000001)


@pytest.mark.parametrize(
    ("observed", "verdict"),
    [(0.0, "pass"), (math.nextafter(LIMIT, 0), "pass"), (LIMIT, "pass"), (math.nextafter(LIMIT, 1), "fail"), (9.0, "fail")],
)
def test_verdict_around_the_limit(observed: float, verdict: str) -> None:
    found = check(observed)
    assert found.verdict == verdict
    assert (found.observed, found.limit, found.relation, found.n) == (observed, LIMIT, "<=", 4)


@pytest.mark.parametrize("observed", [None, math.nan, math.inf, -math.inf, float(np.float32("nan"))])
def test_no_finite_number_never_passes(observed: float | None) -> None:
    """``nan <= limit`` is false but ``not nan > limit`` is true: whichever way it is written, NaN must not pass."""
    assert check(observed).verdict == "insufficient"
    assert not all_pass([check(observed)])
    assert not all_pass([check(0.0), check(observed)])


def test_no_samples_never_pass() -> None:
    assert check(0.0, n=0).verdict == "insufficient"
    assert relative_kl([], []) is None
    checks = making.gate_b(CONFIG, [], [])
    assert {c.verdict for c in checks} == {"insufficient"}
    assert not all_pass(checks)
    assert not all_pass([])


def test_one_nan_sample_spoils_the_figure() -> None:
    """A NaN that a mean skips would let the other samples pass in its place."""
    on = [making.on(), making.on(kl_select_teacher=math.nan)]
    verdicts = {c.name: c.verdict for c in making.gate_b(CONFIG, on, [making.off()])}
    assert verdicts["rel_kl_to_teacher"] == "insufficient"
