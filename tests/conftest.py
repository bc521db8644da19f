"""Fixtures shared by all tests: tiny model folders, made once; an MLflow store of the test session's own.

With pytest-xdist every worker is a session: it has model folders, a store, certificates and temporary folders of its own.
Fixtures import what is heavy, so that the process that only hands out tests to workers starts at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support import pages

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # tests/faults/test_telemetry.py has it on, without a network

OPT_IN = {
    "weights": "runs a real 135M model (93 MB, downloaded once); with RUN_HF_TESTS=1, -m weights, or make test",
    "server": "starts real MLflow servers (about a minute); with -m server, or make test",
    "slow": "a long variant; with -m slow, or make test-all",
}
"""Marker -> why its tests are skipped by a plain ``pytest``, and what runs them. Any ``-m`` chooses for itself."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    opted_in = {"weights"} if os.environ.get("RUN_HF_TESTS") == "1" else set()
    for item in items:
        for marker, reason in OPT_IN.items():
            if marker not in opted_in and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One thread, since tiny models' threads only wait for each other; certificates of its own, for its subprocesses too."""
    import torch

    from cedkv.checks.certificate import FOLDER

    torch.set_num_threads(1)
    os.environ[FOLDER] = str(tmp_path_factory.mktemp("certificates"))


def _saved(factory: pytest.TempPathFactory, architecture: str, **settings: bool) -> Path:
    from tests.support import tiny

    return tiny.save(factory.mktemp(architecture), architecture, **settings)


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each architecture in turn, without BOS, with a chat template."""
    return _saved(tmp_path_factory, request.param)


@pytest.fixture(scope="session", params=["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def usual_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``model_folder``, where one architecture says nearly all; the other one is ``slow``."""
    return _saved(tmp_path_factory, request.param)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, where one architecture is enough."""
    return _saved(tmp_path_factory, "llama")


@pytest.fixture(scope="session")
def bos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 whose tokenizer adds BOS and has no chat template."""
    return _saved(tmp_path_factory, "qwen2", bos=True, chat=False)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The command of a real browser; without one, tests that ask for it are skipped."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here; runs where there is one of {', '.join(names)}")
    return found


@pytest.fixture(scope="session")
def dealt(llama_folder: Path) -> pages.Run:
    """A tiny run whose right and wrong answers are dealt out, for pages."""
    from tests.support import pages

    return pages.dealt_out(llama_folder)


@pytest.fixture
def small_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit head weights on 8 episodes in two batches, with 8 masks each, for tests to which it is the same on how many."""
    from cedkv.inference import head_weights

    for name, size in (("EPISODES", 8), ("BATCH", 4), ("MASKS", 8)):
        monkeypatch.setattr(head_weights, name, size)


@pytest.fixture
def without_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, with an MLflow that cannot be reached."""
    from tests.support import patch_points

    patch_points.without_mlflow(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def store(_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run in an empty folder against a real sqlite store (one a session, its tables take seconds to make)."""
    import mlflow

    uri = f"sqlite:///{_store}/mlflow.db"
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "CEDKV_OUTPUTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    if mlflow.get_experiment_by_name("cedkv") is None:
        mlflow.create_experiment("cedkv", artifact_location=(_store / "artifacts").as_uri())
    yield uri
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(before)
