"""What holds of every check: its names, its meaning, and that the certificate's digest covers what it computes with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cedkv
from cedkv.checks import base
from cedkv.checks.base import CHECKS, Check, CheckResult, MeasuredCheck, RunRecords, all_checks, check_providers
from cedkv.checks.gates import judge_gate
from cedkv.config.schema import Phase2Config, ThresholdsBlock
from cedkv.core.errors import ConfigError
from cedkv.core.source import CERTIFIED_CODE, RECORDS_CODE

EVERY = pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.key)


def test_registry_names_are_the_checks_own() -> None:
    """The name in the table is the tag of a run: a class with another name would be tagged under both."""
    assert [check.key for check in all_checks()] == list(CHECKS.builtin)


def test_every_check_of_the_package_is_registered() -> None:
    """A class that nobody registers is a check that never runs."""

    def concrete(cls: type[Check]) -> set[type[Check]]:
        below = {leaf for child in cls.__subclasses__() for leaf in concrete(child)}
        return below | ({cls} if hasattr(cls, "name") and cls.__module__.startswith("cedkv.") else set())

    assert concrete(Check) == {type(check) for check in all_checks()}


@EVERY
def test_says_what_it_means(check: Check) -> None:
    assert check.meaning
    assert len(check.meaning) < 100
    assert "\n" not in check.meaning
    assert type(check).__doc__ is not None, "the meaning is the class's own"
    assert check.unit
    assert check.relation in ("<=", ">=")
    assert not check.threshold or check.threshold in ThresholdsBlock.model_fields


@EVERY
def test_a_run_without_records_passes_nothing(check: Check) -> None:
    metrics = dict.fromkeys(
        (getattr(each, "metric", "") for each in all_checks()), None
    ) | {"phase2_on_acc_student_random_mean": None}  # fmt: skip
    result = check.judge(RunRecords(Phase2Config(), metrics=metrics))
    assert result is None or result.verdict == "insufficient"


def test_two_checks_of_one_name_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Again(MeasuredCheck):
        """Another one."""

        name, threshold = "null_effect", "null_effect_kl_max"

        def observe(self, *_: object) -> None:
            return None

    monkeypatch.setitem(CHECKS._registered, "gateA.again", Again)
    with pytest.raises(ConfigError, match=r"calls itself gateA\.null_effect, which exists; rename it"):
        all_checks()


def test_one_value_per_sample_is_asked_for() -> None:
    class Short(MeasuredCheck):
        """Forgets the samples."""

        name = "short"

        def observe(self, *_: object) -> list[float]:
            return [0.0]

    class Inputs:
        samples = ("a", "b")

    with pytest.raises(ConfigError, match=r"check gateA\.short gives 1 values for 2 samples"):
        base.run_checks(None, Phase2Config(), Inputs(), [Short()])  # type: ignore[arg-type]


def test_results_are_plain_values() -> None:
    result = CheckResult("A", "x", 1.0, "<=", 2.0, 3, "nats", "x = y")
    assert (result.verdict, result.limit) == ("pass", 2.0)


@pytest.mark.parametrize(
    ("module", "parts"), [("cedkv.checks.certificate", CERTIFIED_CODE), ("cedkv.execution.worker", RECORDS_CODE)]
)
def test_digests_of_code_cover_all_that_is_imported(module: str, parts: tuple[str, ...]) -> None:
    """A module that is left out could change what is computed, and old certificates and journals would stay valid."""
    program = f"import sys, {module}; print(*(m for m in sys.modules if m.startswith('cedkv.')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    covered = {name.removesuffix(".py") for name in parts}
    assert {name.split(".")[1] for name in done.stdout.split()} <= covered
    root = Path(cedkv.__file__).parent
    assert all((root / name).exists() for name in parts)


class Extra(Check):
    """A check of another package."""

    gate, name, unit = "B", "extra", "accuracy"

    def judge(self, run: RunRecords) -> None:
        return None


class WithoutLimit(MeasuredCheck):
    """Has nothing to compare with."""

    name = "without_limit"

    def observe(self, *_: object) -> None:
        return None


@pytest.mark.parametrize(
    ("name", "check", "message"),
    [
        ("gateB.other", Extra, r"'gateB\.other' of .* calls itself gateB\.extra: its tag would be another"),
        ("gateA.without_limit", WithoutLimit, "has neither a threshold nor a limit of its own"),
    ],
)
def test_a_check_that_cannot_be_used_is_rejected_before_anything_is_computed(
    name: str, check: type[Check], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHECKS._registered, name, check)
    monkeypatch.setattr(CHECKS, "_loaded", {})
    with pytest.raises(ConfigError, match=message):
        check_providers()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [({}, "TypeError: judge returned True, not self.result"), ({"a": 1.0}, "KeyError: 'no_such_metric'")],
)
def test_an_error_in_a_check_of_another_package_names_the_check(
    metrics: dict[str, float], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHECKS._registered, "gateB.extra", Extra)
    monkeypatch.setattr(CHECKS, "_loaded", {})
    named = dict.fromkeys((getattr(each, "metric", "") for each in all_checks()), None)
    named |= {"phase2_on_acc_student_random_mean": None}
    monkeypatch.setattr(Extra, "judge", lambda self, run: metrics["no_such_metric"] if metrics else True)
    with pytest.raises(ConfigError, match=rf"check 'gateB\.extra' of .* raised {message}"):
        judge_gate("B", RunRecords(Phase2Config(), metrics=named))
