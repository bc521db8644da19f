"""The command lines: their options, what they hand to a run, and their exit codes."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cedkv import cli
from cedkv.config import Phase2Config
from cedkv.errors import ModelError
from cedkv.options import OPTIONS
from entrypoints import phase2_eval

PHASE2_NAMES = {
    "--phase2-model-id", "--phase2-device", "--phase2-max-on", "--phase2-max-off", "--phase2-prefix-len",
    "--phase2-select-mode", "--phase2-dtype", "--phase2-strict-hf",
}  # fmt: skip
COMMANDS = pytest.mark.parametrize("command", [cli.main, phase2_eval.main], ids=["cedkv", "phase2_eval"])


def names(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    """Running a command installs a handler; the tests' own process gets its old one back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the driver that notes what it was asked for, and answers with ``verdicts``."""
    noted = SimpleNamespace(calls=[], verdicts={"gateA": True, "gateB": True, "phase2": True})

    def run_phase2(config: Phase2Config, phase: str) -> Any:
        noted.calls.append((config, phase))
        return SimpleNamespace(verdicts=noted.verdicts)

    monkeypatch.setattr("cedkv.driver.run_phase2", run_phase2)
    return noted


def invoke(command: click.Command, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_flags_have_the_agreed_names() -> None:
    assert {name for name in names(cli.main) if name.startswith("--phase2-")} == PHASE2_NAMES
    assert names(cli.main) - PHASE2_NAMES == {"--phase", "--config", "--set", "--version"}
    assert names(phase2_eval.main) == {f"--{name}" for name in OPTIONS} | {"--phase", "--config", "--set"}


@COMMANDS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "select.span_lenn=6"], "did you mean 'select.span_len'?"),
        (["--set", "select.span_len"], "expected key=value"),
        (["--set", "prefix_len=8"], "cannot fit prefix_len = 8"),
        (["--config", "absent.yaml"], "cannot read configuration 'absent.yaml'"),
        (["--phase", "3"], "'3' is not one of '1.5', '2'"),
        (["stray"], "stray"),
    ],
)
def test_errors_of_the_user(command: click.Command, arguments: list[str], message: str, runs: SimpleNamespace) -> None:
    found = invoke(command, *arguments)
    assert found.exit_code == 2
    assert message in found.output
    assert runs.calls == []


@pytest.mark.parametrize(
    ("command", "wrong", "near"),
    [
        (cli.main, "--phase2-selct-mode", "--phase2-select-mode"),
        (cli.main, "--phase2-max_on", "--phase2-max-on"),
        (phase2_eval.main, "--selct_mode", "--select_mode"),
        (phase2_eval.main, "--span-len", "--span_len"),
    ],
)
def test_misspelled_option_has_a_near_match(command: click.Command, wrong: str, near: str) -> None:
    found = invoke(command, wrong, "1")
    assert found.exit_code == 2
    assert wrong in found.output
    assert near in found.output.replace(wrong, "")


@pytest.mark.parametrize("value", ["false", "False", "0", "no", "off", ""])
def test_strict_cannot_be_switched_off(value: str, runs: SimpleNamespace) -> None:
    found = invoke(cli.main, "--phase2-strict-hf", value)
    assert found.exit_code == 2
    assert f"--phase2-strict-hf {value} is refused" in found.output
    assert "smollm2-135m" in found.output
    assert runs.calls == []


@pytest.mark.parametrize(
    "arguments", [[], ["--phase2-strict-hf", "true"], ["--phase2-strict-hf"], ["--phase2-strict-hf", "TRUE"]]
)
def test_strict_is_the_default(arguments: list[str], runs: SimpleNamespace) -> None:
    assert invoke(cli.main, *arguments).exit_code == 0
    assert runs.calls == [(Phase2Config(), "2")]


def test_options_reach_the_run_above_file_and_overrides(runs: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("phase2: {seed: 1, eval: {on_samples: 5, off_samples: 6}}")
    found = invoke(
        cli.main, "--phase", "1.5", "--config", str(path), "--set", "seed=2,eval.on_samples=7", "--set", "select.span_len=3",
        "--phase2-max-on", "9", "--phase2-select-mode", "random_span", "--phase2-model-id", "123", "--phase2-dtype", "bfloat16",
        "--phase2-device", "cpu", "--phase2-prefix-len", "50", "--phase2-max-off", "8", "--phase2-strict-hf",
    )  # fmt: skip
    assert found.exit_code == 0
    ((config, phase),) = runs.calls
    assert phase == "1.5"
    assert (config.seed, config.eval.on_samples, config.eval.off_samples, config.select.span_len) == (2, 9, 8, 3)
    assert (config.select.mode, config.model.id, config.prefix_len) == ("random_span", "123", 50)
    assert (config.runtime.torch_dtype, config.runtime.device) == ("bfloat16", "cpu")


@pytest.mark.parametrize("fail_on_gate", [True, False])
@pytest.mark.parametrize(("gate_b", "code"), [(True, 0), (False, 1)])
@COMMANDS
def test_exit_code_of_a_gate(
    command: click.Command, gate_b: bool, code: int, fail_on_gate: bool, runs: SimpleNamespace
) -> None:
    """A failing gate is a finished run: only who asks for it gets exit code 1."""
    runs.verdicts = {"gateA": True, "gateB": gate_b, "phase2": gate_b}
    found = invoke(command, "--set", f"runtime.fail_on_gate={fail_on_gate}")
    assert found.exit_code == (code if fail_on_gate else 0)
    assert len(runs.calls) == 1


def test_error_of_a_run_is_told_and_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(error: Exception) -> Result:
        def run_phase2(*_: object) -> None:
            raise error

        monkeypatch.setattr("cedkv.driver.run_phase2", run_phase2)
        return invoke(cli.main)

    told = breaks(ModelError("no such model"))
    assert (told.exit_code, told.output) == (2, "Error: no such model\n")
    assert isinstance(breaks(ZeroDivisionError()).exception, ZeroDivisionError)


def test_terminated_run_unwinds(runs: SimpleNamespace) -> None:
    """SIGTERM as an exception lets MLflow end the run as FAILED; by default the process just vanishes."""
    assert invoke(cli.main).exit_code == 0
    handler = signal.getsignal(signal.SIGTERM)
    assert callable(handler)
    with pytest.raises(SystemExit) as ended:
        handler(signal.SIGTERM, None)
    assert ended.value.code == 143


def test_named_option_fail_on_gate(runs: SimpleNamespace) -> None:
    runs.verdicts = {"gateA": False}
    assert invoke(phase2_eval.main, "--phase", "1.5", "--fail_on_gate", "true").exit_code == 1
