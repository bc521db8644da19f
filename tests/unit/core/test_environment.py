"""The environment is read while another thread adds and removes variables, as MLflow's telemetry does."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cedkv.core.environment import environment_variables
from cedkv.core.text import redact

ROOT = Path(__file__).parents[3]
NAME = "_MLFLOW_TELEMETRY_SESSION_ID"
ITERATES = re.compile(r"os\.environ\.(?:items|values|copy)\(|\*\*os\.environ|(?:dict|sorted)\(os\.environ\b|os\.environ \| ")


@pytest.fixture
def _changing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A thread sets and removes one variable as fast as it can."""
    monkeypatch.setenv(NAME, "session")
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            os.environ[NAME] = "session"
            del os.environ[NAME]

    thread = threading.Thread(target=change)
    thread.start()
    yield
    stop.set()
    thread.join()
    os.environ[NAME] = "session"  # for monkeypatch to remove


def test_a_copy_of_the_environment_has_every_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "ü = 1")
    copied = environment_variables()
    assert copied == dict(os.environ)
    copied["OTHER"] = "changed"
    assert os.environ["OTHER"] == "ü = 1"


@pytest.mark.usefixtures("_changing")
def test_variables_that_come_and_go_break_no_reading() -> None:
    """``dict(os.environ)`` fails here within a few hundred readings."""
    for _ in range(5_000):
        assert environment_variables()["PATH"]


@pytest.mark.usefixtures("_changing")
def test_secrets_are_found_while_variables_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pa55word!")
    assert {redact("it says pa55word!") for _ in range(2_000)} == {"it says ***"}


def test_the_whole_environment_is_read_in_one_place() -> None:
    """Also by tests and benchmarks, in whose processes MLflow's threads run too."""
    files = [file for part in ("cedkv", "entrypoints", "benchmarks", "tests") for file in (ROOT / part).rglob("*.py")]
    found = {
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in files
        if file != Path(__file__) and file.name != "environment.py"
        for line in file.read_text(encoding="utf-8").splitlines()
        if ITERATES.search(line)
    }
    assert found == set()
