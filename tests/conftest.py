"""Fixtures shared by all tests: tiny model folders, made once; an MLflow store of the test session's own.

With pytest-xdist every worker is a session: it has model folders, a store, certificates and temporary folders of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cedkv.checks.certificate import FOLDER
from tests.support import pages, tiny

torch.set_num_threads(1)  # tiny models: threads only wait for each other
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
def _certificates(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Certificates of this session's own, for its subprocesses too."""
    os.environ[FOLDER] = str(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session", params=tiny.ARCHITECTURES)
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each architecture in turn, without BOS, with a chat template."""
    return tiny.save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, where one architecture is enough."""
    return tiny.save(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def bos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 whose tokenizer adds BOS and has no chat template."""
    return tiny.save(tmp_path_factory.mktemp("bos"), "qwen2", bos=True, chat=False)


@pytest.fixture(scope="session")
def dealt(llama_folder: Path) -> pages.Run:
    """A tiny run whose right and wrong answers are dealt out, for pages."""
    return pages.dealt_out(llama_folder)


@pytest.fixture(scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def store(_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run in an empty folder against a real sqlite store (one a session, its tables take seconds to make)."""
    import mlflow

    uri = f"sqlite:///{_store}/mlflow.db"
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
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
