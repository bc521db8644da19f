"""Models of a hub: told apart from folders, of one commit, and not waited for twice; without a network."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from cedkv.core.errors import ModelError
from cedkv.models import hub
from cedkv.models.weight_files import ADAPTER, INDEX, SINGLE
from tests.support import tiny

NAME, COMMIT = "org/name", "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def cache(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model in it; returns the folder of its files."""
    repository = tmp_path / "cache" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(llama_folder, repository / "snapshots" / COMMIT))


def overrides(cache: Path) -> str:
    return f"model.cache_dir={cache.parents[2]}"


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A hub that takes connections and answers none; the socket on which they wait."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hub, "WAIT", 0.3)
        yield server


def test_a_model_of_the_cache_is_of_one_commit(cache: Path) -> None:
    _, lm = tiny.load(NAME, overrides(cache))
    assert lm.meta["model_commit"] == COMMIT
    assert lm.meta["model_id"] == NAME


def test_a_silent_hub_is_waited_for_once(cache: Path, silent: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    """transformers would wait for every file, several times."""
    with caplog.at_level(logging.WARNING):
        _, lm = tiny.load(NAME, overrides(cache))
    assert lm.meta["model_commit"] == COMMIT
    (said,) = [record.getMessage() for record in caplog.records if record.name == hub.__name__]
    assert "does not answer" in said
    assert "HF_HUB_OFFLINE=1" in said
    silent.setblocking(False)
    silent.accept()
    with pytest.raises(BlockingIOError):
        silent.accept()


def test_a_silent_hub_without_the_model_in_the_cache(tmp_path: Path, silent: socket.socket) -> None:
    with pytest.raises(ModelError, match=r"(?s)does not answer .* not in the cache.*Three ways out"):
        tiny.load(NAME, f"model.cache_dir={tmp_path}")


def test_files_of_the_cache_are_compared_too(cache: Path) -> None:
    """An adapter, a damaged file and two sets of shards, as in a folder."""
    whole = (cache / SINGLE).read_bytes()
    (cache / SINGLE).write_bytes(whole[:-9])
    with pytest.raises(ModelError, match=rf"{SINGLE} is damaged: 9 bytes are missing"):
        tiny.load(NAME, overrides(cache))
    (cache / SINGLE).write_bytes(whole)
    (cache / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ModelError, match="two sets of weights"):
        tiny.load(NAME, overrides(cache))
    (cache / ADAPTER).write_text("{}")
    with pytest.raises(ModelError, match="an adapter"):
        tiny.load(NAME, overrides(cache))


def test_a_wrong_value_in_a_file_of_the_hub(cache: Path) -> None:
    path = cache / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "unknown"}))
    with pytest.raises(ModelError, match=r"(?s)KeyError: 'unknown'.*says of the files of the hub.*another revision") as caught:
        tiny.load(NAME, overrides(cache))
    assert "HF_ENDPOINT" not in str(caught.value)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "~/absent-model", "absent/", "with blanks"])
def test_a_folder_that_is_not_there_is_no_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cached_file", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match=r"there is no such folder \(/.*and it is no hub id"):
        tiny.load(name)
