"""The package: what a wheel and a source distribution hold, what they say of themselves, and that a wheel works by itself.

Both are built without a network, from a copy of the files that a checkout has, the wheel from the source distribution.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from cedkv.core.environment import environment_variables
from cedkv.core.version import __version__
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
MADE_HERE = (".*_cache", ".git", ".venv", ".hypothesis", ".coverage*", "__pycache__", "*.egg-info", "build", "dist", "outputs",
             "mlflow.db*", "mlruns", "site")  # fmt: skip
READ_BY_TESTS = ("benchmarks", "cedkv", "configs", "deploy", "docs", "entrypoints", "examples", "tests")
"""Folders of which a source distribution holds every file."""


def run(*command: str, cwd: Path) -> str:
    """What a command prints that finds nothing of this checkout by ``PYTHONPATH``."""
    plain = {name: value for name, value in environment_variables().items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=plain, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout's own files: building writes into the folder, and must find nothing that an earlier build left."""
    folder = tmp_path_factory.mktemp("source") / "cedkv"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*MADE_HERE))
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(target)!r})", cwd=source)
    (archive,) = target.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(target), str(sdist), cwd=target)
    (archive,) = target.iterdir()
    return archive


@pytest.fixture(scope="module")
def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"cedkv-{__version__}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, files: set[str]) -> None:
    """``entrypoints`` is a package's name on an index: installed, it would take that package's place."""
    assert wheel.name == f"cedkv-{__version__}-py3-none-any.whl"
    assert {name.split("/")[0] for name in files} == {"cedkv", "cedkv_mvp.py", f"cedkv-{__version__}.dist-info"}
    here = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "cedkv").rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in files if name.startswith("cedkv/")} == here
    assert {"cedkv/py.typed", "cedkv/models/families.json", "cedkv/report/page/static/page.js"} < here


def test_the_wheel_says_what_it_is(wheel: Path, files: set[str], metadata: Message) -> None:
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"cedkv-{__version__}.dist-info/licenses/LICENSE" in files
    assert set(metadata.get_all("Provides-Extra", [])) >= {"docs", "gguf", "smollm2", "test"}
    assert metadata["Requires-Python"] == ">=3.11"
    assert str(metadata.get_payload()).startswith("# cedkv")
    with zipfile.ZipFile(wheel) as archive:
        scripts = archive.read(f"cedkv-{__version__}.dist-info/entry_points.txt").decode()
    assert scripts.split() == ["[console_scripts]", "cedkv", "=", "cedkv.__main__:script"]


def test_the_core_forces_neither_gguf_nor_pip(metadata: Message) -> None:
    required = [str(line) for line in metadata.get_all("Requires-Dist", [])]
    core = [line for line in required if "extra ==" not in line]
    assert any(line.startswith("torch") for line in core)
    assert not [line for line in core if line.startswith(("gguf", "pip", "pytest", "mkdocs"))]
    assert sorted(line.split(">")[0] for line in required if line.endswith('extra == "smollm2"')) == ["gguf", "pip"]


def test_the_source_distribution_holds_what_its_tests_read(sdist: Path, source: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path.relative_to(source).as_posix()
        for folder in READ_BY_TESTS
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert {name for name in wanted if ".egg-info/" not in name} - held == set()
    at_the_root = {".dockerignore", ".env.example", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md",
                   "Dockerfile", "LICENSE", "MLproject", "Makefile", "README.md", "SECURITY.md", "cedkv_mvp.py", "compose.yaml",
                   "conda.yaml", "mkdocs.yml", "pyproject.toml"}  # fmt: skip
    assert at_the_root - held == set()


def test_a_wheel_works_where_there_is_no_checkout(wheel: Path, tmp_path: Path) -> None:
    """An environment that has the wheel, and of its dependencies those of this one; the installed command, not a module."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = str(environment / "bin" / "python")
    (site,) = environment.glob("lib/python*/site-packages")
    outside = [str(Path(path)) for path in sys.path if path.endswith("site-packages")]
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, str(wheel), cwd=tmp_path)
    (site / "dependencies.pth").write_text("\n".join(outside))  # after the environment's own, which come first
    command = str(environment / "bin" / "cedkv")
    place = run(python, "-c", "import cedkv, cedkv.cli.app; print(cedkv.__file__)", cwd=tmp_path).strip()
    assert Path(place).parent.parent.resolve() == site.resolve()
    assert run(command, "--help", cwd=tmp_path).startswith("Usage: cedkv [OPTIONS]")
    assert run(command, "--version", cwd=tmp_path).split()[-1] == __version__
    assert run(command, "list", "models", cwd=tmp_path).startswith("Llama ")
    assert "random_span" in run(command, "list", "selectors", cwd=tmp_path)


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "cedkv.core.version.__version__"}
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_agrees_with_the_metadata() -> None:
    """No version and no date: the version stands in one place. The keys are those that CFF 1.2.0 asks for."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert "version" not in citation
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]


def test_the_pins_satisfy_what_the_package_asks_for() -> None:
    """conda.yaml installs everything that runs, tests and pages need, each within its limits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    (pip,) = (each["pip"] for each in dependencies if isinstance(each, dict))
    pinned = {name.lower(): version for name, version in (line.split("==") for line in pip)}
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["smollm2"], *extras["server"], *extras["docs"], *extras["test"]]
    for requirement in map(Requirement, asked):
        if requirement.name not in ("cedkv", "pip"):
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement
