"""The commands as processes of their own: nothing heavy is imported before a run is really asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cedkv.cli import app
from entrypoints import phase2_eval
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "mlflow", "pandas", "scipy", "pydantic", "numpy"}


def module(*arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run ``python -m ...``; with it, the top-level packages it imported."""
    asked = [sys.executable, "-X", "importtime", "-m", *arguments]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return found, {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in found.stderr.splitlines() if "|" in line}


@pytest.mark.parametrize("name", ["cedkv", "cedkv_mvp", "entrypoints.phase2_eval"])
def test_help_is_light_and_complete(name: str) -> None:
    found, imported = module(name, "--help")
    assert found.returncode == 0
    assert "click" in imported
    assert not HEAVY & imported
    command = phase2_eval.main if name.startswith("entry") else app.main
    options = {option for parameter in command.params for option in parameter.opts}
    assert {*options, "--help"} <= set(re.findall(r"--[\w-]+", found.stdout))


def test_both_module_names_have_the_same_help() -> None:
    one, other = (module(name, "--help")[0].stdout for name in ("cedkv", "cedkv_mvp"))
    assert other.replace("python -m cedkv_mvp [", "python -m cedkv [") == one
    assert "Usage: python -m cedkv_mvp [OPTIONS]" in other


@pytest.mark.parametrize(
    "arguments",
    [["cedkv", "--phase", "2"], ["cedkv", "plan"], ["entrypoints.phase2_eval"]],
    ids=["cedkv", "plan", "phase2_eval"],
)
def test_bad_configuration_ends_before_the_heavy_imports(arguments: list[str]) -> None:
    """A typing error must not cost ten seconds of imports, nor start an MLflow run that then fails."""
    found, imported = module(*arguments, "--set", "select.mod=random_span")
    assert found.returncode == 2
    assert "Error: unknown configuration key 'select.mod'; did you mean 'select.mode'?" in found.stderr
    assert "Traceback" not in found.stderr
    assert "pydantic" in imported
    assert not (HEAVY - {"pydantic"}) & imported
