"""The command lines: their options, what they hand to a run, and their exit codes."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cedkv.cli import app
from cedkv.config.options import OPTIONS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ModelError, RunInterrupted, TrackingError
from cedkv.runs.resolved import ResolvedRun
from entrypoints import phase2_eval
from tests.support import patch_points as points

PHASE2_NAMES = {
    "--phase2-model-id", "--phase2-device", "--phase2-max-on", "--phase2-max-off", "--phase2-prefix-len",
    "--phase2-select-mode", "--phase2-dtype", "--phase2-strict-hf",
}  # fmt: skip
COMMON = {"--config", "--set", "--resume", "--debug"}
COMMANDS = pytest.mark.parametrize("command", [app.main, phase2_eval.main], ids=["cedkv", "phase2_eval"])


def names(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    """Running a command installs handlers; the tests' own process gets its old ones back."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for each in before:
        signal.signal(each, signal.SIG_DFL)  # under nohup some are ignored, and that would be respected
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the driver that notes what it was asked for, and answers with ``verdicts``."""
    noted = SimpleNamespace(calls=[], verdicts={"gateA": True, "gateB": True, "phase2": True})

    def run(resolved: ResolvedRun) -> Any:
        noted.calls.append((resolved.config, resolved.phase))
        return [SimpleNamespace(results=SimpleNamespace(verdicts=noted.verdicts))]

    points.RUN.replace(run, monkeypatch)
    return noted


def invoke(command: click.Command, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_flags_have_the_agreed_names() -> None:
    assert {name for name in names(app.main) if name.startswith("--phase2-")} == PHASE2_NAMES
    assert names(app.main) - PHASE2_NAMES == {"--phase", "--shard", "--version", *COMMON}
    assert names(phase2_eval.main) == {f"--{name}" for name in OPTIONS} | {"--phase", *COMMON}


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
        (app.main, "--phase2-selct-mode", "--phase2-select-mode"),
        (app.main, "--phase2-max_on", "--phase2-max-on"),
        (phase2_eval.main, "--selct_mode", "--select_mode"),
        (phase2_eval.main, "--span-len", "--span_len"),
    ],
)
def test_misspelled_option_has_a_near_match(command: click.Command, wrong: str, near: str) -> None:
    found = invoke(command, wrong, "1")
    assert found.exit_code == 2
    assert wrong in found.output
    assert near in found.output.replace(wrong, "")


def test_without_arguments_there_is_help_and_no_run(runs: SimpleNamespace) -> None:
    found = invoke(app.main)
    assert found.exit_code == 0
    assert found.output == invoke(app.main, "--help").output
    assert runs.calls == []


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (["list"], "Choose from: selectors, tasks, models, checks"),
        (["completion"], "Choose from: bash, zsh, fish"),
    ],
)
def test_a_missing_choice_is_told_in_one_line(arguments: list[str], choices: str) -> None:
    found = invoke(app.main, *arguments)
    assert found.exit_code == 2
    assert choices in found.output


@pytest.mark.parametrize("value", ["false", "False", "0", "no", "off", ""])
def test_strict_cannot_be_switched_off(value: str, runs: SimpleNamespace) -> None:
    found = invoke(app.main, "--phase2-strict-hf", value)
    assert found.exit_code == 2
    assert f"--phase2-strict-hf {value!r} is rejected" in found.output
    assert "smollm2-135m" in found.output
    assert runs.calls == []


@pytest.mark.parametrize(
    "arguments", [["--phase", "2"], ["--phase2-strict-hf", "true"], ["--phase2-strict-hf"], ["--phase2-strict-hf", "TRUE"]]
)
def test_strict_is_the_default(arguments: list[str], runs: SimpleNamespace) -> None:
    assert invoke(app.main, *arguments).exit_code == 0
    assert runs.calls == [(Phase2Config(), "2")]


def test_options_reach_the_run_above_file_and_overrides(runs: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("phase2: {seed: 1, eval: {on_samples: 5, off_samples: 6}}")
    found = invoke(
        app.main, "--phase", "1.5", "--config", str(path), "--set", "seed=2,eval.on_samples=7", "--set", "select.span_len=3",
        "--phase2-max-on", "6", "--phase2-select-mode", "random_span", "--phase2-model-id", "123", "--phase2-dtype", "bfloat16",
        "--phase2-device", "cpu", "--phase2-prefix-len", "50", "--phase2-max-off", "8", "--phase2-strict-hf",
    )  # fmt: skip
    assert found.exit_code == 0
    ((config, phase),) = runs.calls
    assert phase == "1.5"
    assert (config.seed, config.eval.on_samples, config.eval.off_samples, config.select.span_len) == (2, 6, 8, 3)
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


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ModelError("no such model"), 2, "Error: no such model\n"),
        (RunInterrupted("disk full"), 3, "Error: disk full\n"),
        (TrackingError("results are safe"), 4, "Error: results are safe\n"),
        (ZeroDivisionError("by\nzero"), 3, "Error: unexpected error: ZeroDivisionError: by zero\nUse --debug"),
    ],
)
def test_error_of_a_run_is_told_in_words(monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, told: str) -> None:
    """And a traceback is for who asks for it."""

    def run(_: object) -> None:
        raise error

    points.RUN.replace(run, monkeypatch)
    found = invoke(app.main, "--phase", "2")
    assert found.exit_code == code
    assert found.output.startswith(told)
    assert "Traceback" not in found.output
    again = invoke(app.main, "--debug")
    assert again.exit_code == code
    assert f"{type(error).__name__}: " in again.output.partition("Traceback")[2]


def test_no_secret_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of libraries quote addresses and headers in full."""
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")

    def run(_: object) -> None:
        raise ValueError("401 for https://me:pass@word@host/x with Bearer hf_abcdefgh")

    points.RUN.replace(run, monkeypatch)
    for arguments in (["--phase", "2"], ["--debug"]):
        told = invoke(app.main, *arguments).output
        assert "401 for https://host/x with Bearer ***" in told
        assert not [word for word in ("hf_abc", "me:pass", "word@") if word in told]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_ended_run_unwinds(runs: SimpleNamespace, number: signal.Signals, code: int) -> None:
    """A signal as an exception lets the run end as KILLED; by default the process just vanishes. A second one is ignored:
    Ctrl-C under ``mlflow run`` comes as SIGINT, and then again as SIGTERM."""
    assert invoke(app.main, "--phase", "2").exit_code == 0
    handler = signal.getsignal(number)
    assert callable(handler)
    with pytest.raises(SystemExit) as ended:
        handler(number, None)
    assert ended.value.code == code
    assert {signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)} == {signal.SIG_IGN}


def test_named_option_fail_on_gate(runs: SimpleNamespace) -> None:
    runs.verdicts = {"gateA": False}
    assert invoke(phase2_eval.main, "--phase", "1.5", "--fail_on_gate", "true").exit_code == 1
