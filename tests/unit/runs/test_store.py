"""What is wrong with MLflow's store: told at once, by its name, before MLflow tries again and again."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import mlflow
import pytest

from cedkv.core.errors import ConfigError, TrackingError
from cedkv.runs.store import check_database, database_file, explain
from tests.support.crashing import run_of_nothing

PROXIES = [f"{name}{end}" for name in ("http", "https", "all", "no") for end in ("_proxy", "_PROXY")] + [
    f"{name}_PROXY" for name in ("HTTP", "HTTPS", "ALL", "NO")
]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "is a folder, not a database": lambda path: path.mkdir(),
    "is no SQLite database, or is damaged (file is not a database)": lambda path: path.write_bytes(b"not a database" * 1000),
    "is no file, and no database": lambda path: os.mkfifo(path),
    "is a link to nothing": lambda path: path.symlink_to("/absent/mlflow.db"),
}


@pytest.mark.parametrize("problem", UNUSABLE)
def test_a_store_that_is_no_database_ends_a_run_at_once(
    store: str, tmp_path: Path, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, before MLflow is asked, and before anything is computed."""
    path = tmp_path / "mlflow.db"
    UNUSABLE[problem](path)
    monkeypatch.setattr(mlflow, "MlflowClient", lambda: pytest.fail("MLflow was asked"))
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    with pytest.raises(ConfigError) as caught, run_of_nothing():
        pytest.fail("a run was started")
    assert f"MLflow's store {path} {problem}" in str(caught.value)
    assert "set MLFLOW_TRACKING_URI" in str(caught.value)


def test_a_database_that_cannot_be_read_or_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"/file/mlflow\.db cannot be opened \("):
        check_database(f"sqlite:///{tmp_path}/file/mlflow.db")
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"mlflow\.db cannot be read by this user"):
        check_database(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_database_passes_empty_new_or_in_use(tmp_path: Path) -> None:
    new = tmp_path / "new/folder/mlflow.db"
    assert check_database(f"sqlite:///{new}") == new
    new.touch()
    assert check_database(f"sqlite:///{new}") == new
    with closing(sqlite3.connect(new)) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.commit()
        connection.execute("BEGIN EXCLUSIVE")
        assert check_database(f"sqlite:///{new}") == new


@pytest.mark.parametrize(
    ("uri", "file"),
    [("sqlite:///a/b.db?timeout=5", "a/b.db"), ("sqlite:////a.db", "/a.db"), ("sqlite:///:memory:", None), ("sqlite://", None),
     ("sqlite:///", None), ("http://host:5000", None), ("postgresql://h/db", None), ("file:///a", None), ("databricks", None)],
)  # fmt: skip
def test_the_file_of_a_store(uri: str, file: str | None) -> None:
    assert database_file(uri) == (None if file is None else Path(file))


DEAD = "Max retries exceeded (Caused by ProxyError('Unable to connect to proxy', ...))"


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("error", [DEAD, "no answer within 60 s (runtime.mlflow_timeout)", "503 Service Unavailable"])
def test_a_proxy_before_a_local_server_is_named(variable: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "http://me:secret@proxy:3128")
    told = explain(ValueError(error), "http://127.0.0.1:5000")
    assert told.endswith(f"; {variable} = http://proxy:3128 stands before 127.0.0.1: set NO_PROXY=127.0.0.1 to reach it "
                         "without that proxy")  # fmt: skip
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert "set NO_PROXY=example.org,127.0.0.1 to" in explain(error, "http://127.0.0.1:5000")


@pytest.mark.parametrize(
    ("uri", "error", "settings"),
    [("http://127.0.0.1:5000", DEAD, {"NO_PROXY": "127.0.0.1"}), ("http://h:5000", "503", {"no_proxy": "*"}),
     ("http://127.0.0.1:5000", "Connection refused", {}), ("https://127.0.0.1", DEAD, {}),
     ("http://mlflow.example.org", "503", {}), ("sqlite:///mlflow.db", DEAD, {}), ("http://[half", DEAD, {})],
    ids=["bypassed", "all bypassed", "refused by the server", "other scheme", "far away", "no server", "no address"],
)  # fmt: skip
def test_no_proxy_is_named_where_none_is_to_blame(
    uri: str, error: str, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert explain(error, uri) == error


def test_a_proxy_that_does_not_answer_is_told_with_what_mlflow_says(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:5999")
    with pytest.raises(TrackingError, match="NO_PROXY=127"), run_of_nothing() as job:
        job.finish(job.manifest)
    assert "HTTP_PROXY = http://127.0.0.1:9 stands before 127.0.0.1: set NO_PROXY=127.0.0.1" in capsys.readouterr().err
