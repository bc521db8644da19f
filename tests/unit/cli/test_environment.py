"""A Python that lacks what the program needs: named, with all that it lacks and the remedy; and who else may be to blame."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from cedkv.cli import app, environment
from cedkv.cli.environment import MODULES, PYTHON, explain_import, explained_imports, unmet_requirements
from tests.support import patch_points as points

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = [re.split(r"[<>=,\[]", requirement)[0] for requirement in PROJECT["dependencies"]]
FIRST = ("cedkv/__init__.py", "cedkv/core/__init__.py", "cedkv/core/version.py", "cedkv/cli/__init__.py",
         "cedkv/cli/environment.py", "cedkv/__main__.py", "cedkv_mvp.py", "entrypoints/__init__.py",
         "entrypoints/phase2_eval.py", "entrypoints/ablate_selector.py", "entrypoints/compare_positioning.py")  # fmt: skip
MISSING = ModuleNotFoundError("No module named 'filelock'", name="filelock")


@pytest.mark.parametrize("module", ["entrypoints.phase2_eval", "entrypoints.ablate_selector", "cedkv", "cedkv_mvp"])
def test_a_python_without_packages_is_told_what_it_lacks(module: str) -> None:
    """As ``mlflow run --env-manager local`` starts the one that comes first on PATH (-S: without site-packages)."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {sys.executable} (Python 3.")
    assert done.stderr.count("(missing)") == len(NAMES)
    assert all(f" {requirement} (missing)" in done.stderr for requirement in PROJECT["dependencies"])
    assert f"{sys.executable} -m pip install -e {ROOT}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "report it" not in done.stderr


@pytest.mark.parametrize("name", FIRST)
def test_what_is_imported_first_is_read_by_an_old_python(name: str) -> None:
    ast.parse((ROOT / name).read_text(), feature_version=(3, 8))


def test_an_old_python_is_told_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 10, "final", 0))
    with pytest.raises(SystemExit) as caught, explained_imports():
        pytest.fail("something was imported")
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"{sys.executable} (Python 3.8.10) is too old: cedkv needs Python 3.11 or newer" in told
    assert "activate the environment" in told


def test_the_oldest_python_and_the_names_of_modules_are_those_of_the_project() -> None:
    assert PROJECT["requires-python"] == ">=" + ".".join(map(str, PYTHON))
    for name in NAMES:
        assert importlib.util.find_spec(MODULES.get(name, name)) is not None


def lacking(monkeypatch: pytest.MonkeyPatch, **installed: str | None) -> None:
    """Let distributions be missing (None), or installed in another version."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if installed.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_what_is_missing_and_what_is_too_old_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unmet_requirements() == {}
    lacking(monkeypatch, filelock=None, pyyaml=None, torch="2.1.0+cpu", transformers="4.57.0")
    told = explain_import(MISSING)
    assert told is not None
    assert "of the packages that it needs, 4 are missing or too old: filelock>=3.12 (missing), pyyaml>=6 (missing), " in told
    assert "torch>=2.6 (2.1.0+cpu is installed), transformers>=5.6,<6 (4.57.0 is installed). " in told
    for other in ("No module named 'yaml'", "cannot import name 'X' from 'transformers' (/a/__init__.py)"):
        assert explain_import(ImportError(other)) == told


def test_an_installed_package_says_what_it_needs_where_there_is_no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["click>=8.1", "filelock>=3.12", 'ray>=2.50; extra == "ray"']
    monkeypatch.setattr(environment, "_checkout", lambda: None)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needs)
    lacking(monkeypatch, filelock=None, ray=None)
    told = explain_import(MISSING)
    assert told is not None
    assert "1 is missing or too old: filelock>=3.12 (missing). " in told
    assert told.endswith(f"{sys.executable} -m pip install --upgrade cedkv")


def importing(module: str) -> ImportError:
    with pytest.raises(ImportError) as caught:
        importlib.import_module(module)
    return caught.value


def module_of(folder: Path, name: str, text: str, distribution: bool) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    if distribution:
        info = folder / f"{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "top_level.txt").write_text(f"{name}\n")


@pytest.fixture(params=[False, True], ids=["all is there", "scipy is missing"])
def modules(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules, in an environment that has all that it needs, or has not."""
    monkeypatch.syspath_prepend(tmp_path)
    if request.param:
        lacking(monkeypatch, scipy=None)
    return tmp_path


def test_a_broken_package_is_not_a_missing_environment(modules: Path) -> None:
    """Its own dependency is missing, or a library that it links; whatever else may be missing here."""
    module_of(modules, "broken_package", "import of_its_own", distribution=True)
    told = explain_import(importing("broken_package"))
    assert told is not None
    assert told.startswith(f"broken_package 1.5, which is installed in {sys.executable} (Python 3.")
    assert "cannot be imported: No module named 'of_its_own'." in told
    assert f"{sys.executable} -m pip check" in told
    assert "missing or too old" not in told


def test_a_module_of_the_user_is_not_a_missing_environment(modules: Path) -> None:
    module_of(modules, "users_own", "import of_the_user", distribution=False)
    assert explain_import(importing("users_own")) is None
    assert explain_import(importing("cedkv.absent")) is None


def test_the_command_line_says_it_of_an_import_in_the_middle_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> None:
        raise MISSING

    points.RUN.replace(run, monkeypatch)
    done = CliRunner().invoke(app.main, ["--phase", "2"])
    assert done.exit_code == 3
    assert "unexpected error: ModuleNotFoundError: No module named 'filelock'" in done.output
    lacking(monkeypatch, filelock=None)
    done = CliRunner().invoke(app.main, ["--phase", "2"])
    assert done.exit_code == 2
    assert "1 is missing or too old: filelock>=3.12 (missing)" in done.output
    assert "unexpected" not in done.output
