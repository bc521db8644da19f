"""Verdicts: each check of Gate A fails for its own reason alone, and nothing that is missing ever passes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cedkv.analysis.results import Records, decide
from cedkv.checks.base import CheckResult as Check
from cedkv.checks.base import RunRecords, floor_observations
from cedkv.checks.gates import all_pass, judge_gate
from cedkv.config.resolve import resolve
from cedkv.config.schema import KL_LIMIT, Phase2Config
from cedkv.core.values import Record
from tests.support import making

CONFIG = Phase2Config()
ON = [making.on(sample_id=f"on-{k}") for k in range(4)]
SIX = [making.on(sample_id=f"on-{k}") for k in range(6)]
"""As few as Gate B decides from."""
REPEATS = making.repeats(ON, CONFIG.eval.repro_runs)
GATE_A = {
    "teacher_incremental", "null_effect", "nonzero_effect", "roundtrip_rel_kl", "repro_tolerance", "keep_all_absolute",
    "padding_equivalence", "batch_consistency", "rotation_equivariance", "source_cache_unchanged", "roundtrip_exact",
    "attention_alone", "selection_rules", "kv_precision", "arithmetic", "left_alone", "off_alone", "random_is_another",
}  # fmt: skip
GATE_B = {"on_gain", "off_delta_p99", "delta_on", "rel_kl_to_teacher", "select_vs_random"}
CHECK_OF = {
    "teacher_incremental": "teacher_incremental",
    "null_effect": "null_effect",
    "roundtrip": "roundtrip_rel_kl",
    "keep_all_absolute": "keep_all_absolute",
    "padding_equivalence": "padding_equivalence",
    "batch_consistency": "batch_consistency",
    "rotation_equivariance": "rotation_equivariance",
    "source_cache_unchanged": "source_cache_unchanged",
    "roundtrip_exact": "roundtrip_exact",
    "attention_alone": "attention_alone",
    "selection_rules": "selection_rules",
    "kv_precision": "kv_precision",
    "arithmetic": "arithmetic",
    "left_alone": "left_alone",
    "off_alone": "off_alone",
}
APPLYING = {"rotation_equivariance", "arithmetic", "off_alone"}
"""Checks that are left out where no sample has the observation: the model or the run has nothing to observe."""  # fmt: skip


def verdicts(
    plumbing: list[Record], on: list[Record] = ON, repeats: list[Record] = REPEATS, config: Phase2Config = CONFIG
) -> dict[str, str]:
    return {check.name: check.verdict for check in judge_gate("A", RunRecords(config, on, plumbing=plumbing, repro=repeats))}


def good(n: int = 3) -> list[Record]:
    return [making.plumbing() for _ in range(n)]


def records(on: list[Record], off: list[Record], plumbing: list[Record]) -> Records:
    return Records(on, off, plumbing, making.repeats(on, CONFIG.eval.repro_runs))


def test_all_good() -> None:
    assert verdicts(good()) == dict.fromkeys(GATE_A, "pass")


@pytest.mark.parametrize("observation", CHECK_OF)
@pytest.mark.parametrize(("value", "verdict"), [(1.0, "fail"), (math.nan, "insufficient"), (math.inf, "insufficient")])
def test_one_bad_sample_is_enough(observation: str, value: float, verdict: str) -> None:
    """The largest observation decides: a mean over samples would hide the one that is broken."""
    found = verdicts([*good(), making.plumbing(**{observation: value}), *good()])
    moved = {name for name, is_ in found.items() if is_ != "pass"}
    assert found[CHECK_OF[observation]] == verdict
    assert moved <= {CHECK_OF[observation]} | (
        {"nonzero_effect", "random_is_another"} if observation in floor_observations() else set()
    )


@pytest.mark.parametrize("observation", sorted(set(CHECK_OF) - APPLYING))
def test_missing_observation_never_passes(observation: str) -> None:
    left = [{key: value for key, value in record.items() if key != observation} for record in good()]
    assert verdicts(left)[CHECK_OF[observation]] == "insufficient"


def test_rotation_is_left_out_only_where_keys_cannot_be_rotated() -> None:
    left = [{key: value for key, value in record.items() if key != "rotation_equivariance"} for record in good()]
    assert set(verdicts(left)) == GATE_A - {"rotation_equivariance"}


def test_nothing_to_decide_on() -> None:
    assert set(verdicts([], [], []).values()) == {"insufficient"}
    assert set(verdicts([], ON, REPEATS).values()) == {"insufficient", "pass"}
    assert not all_pass(judge_gate("A", RunRecords(CONFIG)))
    assert not all_pass([])


def test_limits_at_their_edge() -> None:
    limit = CONFIG.kl_limit("null_effect_kl_max")
    assert verdicts([making.plumbing(null_effect=limit)])["null_effect"] == "pass"
    assert verdicts([making.plumbing(null_effect=math.nextafter(limit, 1))])["null_effect"] == "fail"


def test_limits_follow_the_dtype_and_the_threshold() -> None:
    off = [making.plumbing(null_effect=KL_LIMIT["bfloat16"])]
    assert verdicts(off)["null_effect"] == "fail"
    assert verdicts(off, config=resolve(None, ["runtime.torch_dtype=bfloat16"]))["null_effect"] == "pass"
    assert verdicts(off, config=resolve(None, ["thresholds.null_effect_kl_max=0.06"]))["null_effect"] == "pass"


def floor(plumbing: list[Record]) -> float | None:
    return RunRecords(CONFIG, plumbing=plumbing).floor


def test_numerical_floor_is_the_largest_of_identical_computations() -> None:
    assert floor([making.plumbing(null_effect=1.0, keep_all_absolute=1.0)]) == 2e-7
    assert floor([making.plumbing(batch_consistency=math.nan)]) is None
    assert floor([]) is None


@pytest.mark.parametrize(("effect", "verdict"), [(2.1e-6, "pass"), (1.9e-6, "fail"), (0.0, "fail"), (math.nan, "insufficient")])
def test_effect_must_stand_above_the_floor(effect: float, verdict: str) -> None:
    """The floor is 2e-7, and the effect must be ten times that."""
    on = [making.on(phase2_delta_on_select=effect)]
    assert verdicts(good(), on, making.repeats(on, 3))["nonzero_effect"] == verdict


def test_no_effect_fails_even_without_a_floor() -> None:
    """Where nothing differs at all (batches of one on a CPU), an effect of zero is not "above" a floor of zero."""
    exact = [making.plumbing(**dict.fromkeys(floor_observations(), 0.0))]
    still, moved = ([making.on(phase2_delta_on_select=effect)] for effect in (0.0, 0.1))
    assert verdicts(exact, still, making.repeats(still, 3))["nonzero_effect"] == "fail"
    assert verdicts(exact, moved, making.repeats(moved, 3))["nonzero_effect"] == "pass"


@pytest.mark.parametrize(
    ("wrong", "tolerance", "verdict"), [(0, 0.0, "pass"), (1, 0.25, "pass"), (1, 0.2, "fail"), (2, 0.25, "fail")]
)
def test_repetitions_agree_to_the_tolerance(wrong: int, tolerance: float, verdict: str) -> None:
    config = resolve(None, ["eval.repro_runs=3", f"thresholds.repro_acc_tol={tolerance}"])
    assert verdicts(good(), repeats=making.repeats(ON, 3, wrong), config=config)["repro_tolerance"] == verdict


def test_missing_repetition_never_passes() -> None:
    """One accuracy agrees with itself."""
    assert verdicts(good(), repeats=[])["repro_tolerance"] == "insufficient"
    assert verdicts(good(), repeats=REPEATS[:-1])["repro_tolerance"] == "insufficient"


def test_gate_b_passes_and_each_condition_fails_alone() -> None:
    on, off = SIX, [making.off()]
    checks = making.gate_b(CONFIG, on, off)
    assert {c.name: c.verdict for c in checks} == dict.fromkeys(GATE_B, "pass")
    assert {c.name: c.n for c in checks} == {**dict.fromkeys(GATE_B, 6), "off_delta_p99": 1}
    bad: dict[str, tuple[Record, Record]] = {
        "on_gain": (making.on(correct_base=True), making.off()),
        "off_delta_p99": (making.on(), making.off(phase2_delta_off_select=1.1)),
        "delta_on": (making.on(phase2_delta_on_select=0.09), making.off()),
        "rel_kl_to_teacher": (making.on(kl_select_teacher=2.1), making.off()),
    }
    for name, (one, other) in bad.items():
        checks = making.gate_b(CONFIG, [one] * 6, [other])
        assert {c.name for c in checks if c.verdict != "pass"} == {name}
    worse = [making.on(correct_random=[True, True]), making.on(correct_select=False, correct_random=[True, True])]
    checks = making.gate_b(CONFIG, worse * 3, off)
    assert {c.name for c in checks if c.verdict != "pass"} == {"select_vs_random"}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(observed=st.floats() | st.none(), limit=st.floats() | st.none(), n=st.integers(0, 3), up=st.booleans())
def test_pass_means_that_the_condition_holds(observed: float | None, limit: float | None, n: int, up: bool) -> None:
    check = Check("A", "any", observed, ">=" if up else "<=", limit, n, "", "")
    known = observed is not None and limit is not None and math.isfinite(observed) and math.isfinite(limit) and n > 0
    holds = known and (observed >= limit if up else observed <= limit)  # type: ignore[operator]
    assert check.verdict == ("pass" if holds else "fail" if known else "insufficient")
    assert all_pass([check]) == holds


@pytest.mark.parametrize("a", [True, False])
@pytest.mark.parametrize("b", [True, False])
def test_the_final_verdict_needs_both_gates(a: bool, b: bool) -> None:
    made = records(
        SIX, [making.off(phase2_delta_off_select=0.0 if b else 9.0)], [making.plumbing(null_effect=0.0 if a else 9.0)]
    )
    results = decide(CONFIG, made, "2")
    assert results.verdicts == {"gateA": a, "gateB": b, "phase2": a and b}
    assert [results.metrics[f"phase2_{name}pass"] for name in ("gateA_", "gateB_", "")] == [a, b, a and b]
    alone = decide(CONFIG, made, "1.5")
    assert alone.verdicts == {"gateA": a}
    assert {check.gate for check in alone.checks} == {"A"}
    assert "phase2_pass" not in alone.metrics
