"""Preconditions: when the gates can say what they are asked, and what is said where they cannot."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cedkv.analysis.results import Records, Results, decide
from cedkv.checks.base import CheckResult
from cedkv.checks.effects import OffEntropy, TeacherGain
from cedkv.checks.gates import judge_gate
from cedkv.config.resolve import resolve
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record
from tests.support import making

CONFIG = Phase2Config()
TAUGHT = [making.on(sample_id=f"on-{i}") for i in range(10)]
UNTAUGHT = [record | {"correct_teacher": False} for record in TAUGHT]
CERTAIN = making.further(0.5, 0.6, entropy=0.001)


def results_of(on: list[Record], off: list[Record], config: Phase2Config = CONFIG, phase: str = "2") -> Results:
    repeats = making.repeats(on, config.eval.repro_runs)
    return decide(config, Records(on, off, [making.plumbing() for _ in on], repeats), phase)


def check(results: Results, name: str) -> CheckResult:
    (found,) = [result for result in results.checks if result.name == name]
    return found


def test_a_run_that_can_decide_says_so_and_nothing_else() -> None:
    results = results_of(TAUGHT, [making.off(**making.further(0.01))])
    assert [(c.tag, c.verdict) for c in results.checks if c.gate == "precondition"] == [
        ("teacher_gain", "pass"),
        ("off_entropy", "pass"),
    ]
    assert results.undecided == []
    assert results.verdicts == {"gateA": True, "gateB": True, "phase2": True}


def test_a_teacher_that_does_not_gain_decides_nothing_and_changes_no_verdict() -> None:
    taught, untaught = (results_of(on, [making.off()]) for on in (TAUGHT, UNTAUGHT))
    assert check(untaught, "teacher_gain").verdict == "fail"
    assert untaught.verdicts == taught.verdicts == {"gateA": True, "gateB": True, "phase2": True}
    assert untaught.undecided == [
        "the teacher itself gains 0 on base (limit 0.1): this model does not learn this task from the demonstration, so the "
        "verdict says nothing about the selection"
    ]


@pytest.mark.parametrize(("right", "verdict"), [(1, "pass"), (0, "fail")])
def test_the_teacher_must_gain_as_much_as_select_must(right: int, verdict: str) -> None:
    on = [record | {"correct_teacher": i < right} for i, record in enumerate(TAUGHT)]
    assert check(results_of(on, [making.off()]), "teacher_gain").verdict == verdict
    config = resolve(None, ["thresholds.on_gain_min=0.2"])
    assert check(results_of(on, [making.off()], config), "teacher_gain").verdict == "fail"


def test_a_base_that_knows_the_answers_is_not_called_a_model_that_does_not_learn() -> None:
    on = [record | {"correct_base": i > 0} for i, record in enumerate(TAUGHT * 2)]
    (note,) = results_of(on, [making.off()]).undecided
    assert note.startswith("the teacher itself gains 0.05 on base (limit 0.1): base answers 0.95 of the samples without any")
    assert "does not learn" not in note


def test_where_base_is_certain_a_small_off_delta_decides_nothing() -> None:
    """The chat template forces the first token: no prefix moves it, and no harm shows."""
    results = results_of(TAUGHT, [making.off(**CERTAIN)] * 3)
    assert check(results, "off_entropy").verdict == "fail"
    delta = check(results, "off_delta_p99")
    assert (delta.verdict, delta.observed, delta.n) == ("insufficient", 0.01, 3)
    assert results.verdicts == {"gateA": True, "gateB": False, "phase2": False}
    (note,) = results.undecided
    assert note == delta.note
    for word in ("0.001 nats", "model.chat_template=false", "model.template_kwargs", "data.off_path", "further positions"):
        assert word in note


def test_where_base_is_certain_a_large_off_delta_is_harm_all_the_same() -> None:
    harmed = making.off(phase2_delta_off_select=9.0, **CERTAIN)
    assert check(results_of(TAUGHT, [harmed]), "off_delta_p99").verdict == "fail"


@pytest.mark.parametrize(
    ("entropies", "verdict"),
    [([0.01, 0.05, 2.0], "pass"), ([0.01, 0.04, 2.0], "fail"), ([math.nan, 2.0, 2.0], "insufficient")],
)
def test_the_median_entropy_decides(entropies: list[float], verdict: str) -> None:
    off = [making.off(**making.further(entropy=entropy)) for entropy in entropies]
    results = results_of(TAUGHT, off)
    assert check(results, "off_entropy").verdict == verdict
    assert check(results, "off_delta_p99").verdict == ("pass" if verdict == "pass" else "insufficient")


def test_records_without_entropy_are_judged_as_they_were() -> None:
    run = making.judged(CONFIG, TAUGHT, [making.off()])
    assert OffEntropy().judge(run) is None
    assert [c.name for c in judge_gate("precondition", run)] == ["teacher_gain"]
    assert check(results_of(TAUGHT, [making.off()]), "off_delta_p99").verdict == "pass"


def test_gate_a_alone_has_no_preconditions() -> None:
    results = results_of(UNTAUGHT, [], phase="1.5")
    assert {c.gate for c in results.checks} == {"A"}
    assert results.undecided == []


def test_what_decides_nothing_never_passes() -> None:
    result = TeacherGain().judge(making.judged(CONFIG, TAUGHT, []))
    assert result.verdict == "pass"
    assert replace(result, decides=False).verdict == "insufficient"
