"""MLflow's telemetry, on as users have it and off: without a network its thread changes the environment while a run starts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
from mlflow.telemetry import client as telemetry
from mlflow.telemetry import utils

from tests.support.crashing import run_of_nothing as run

SESSION = "_MLFLOW_TELEMETRY_SESSION_ID"


@pytest.fixture(params=["on", "off"])
def asked(request: pytest.FixtureRequest, store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The addresses that telemetry asks in vain; it believes to be outside of a test."""
    addresses: list[str] = []

    def no_network(address: str, **_: Any) -> None:
        addresses.append(address)
        time.sleep(0.05)
        raise OSError("the network is unreachable")

    monkeypatch.setattr(telemetry.requests, "get", no_network)
    monkeypatch.setattr(utils, "_IS_IN_CI_ENV_OR_TESTING", False)
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true" if request.param == "off" else "false")
    before = telemetry.get_telemetry_client()
    telemetry.set_telemetry_client()
    assert (telemetry.get_telemetry_client() is None) == (request.param == "off")
    yield addresses
    telemetry._set_telemetry_client(before)
    os.environ.pop(SESSION, None)


def test_a_run_starts_and_ends_while_telemetry_gives_up(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    on = telemetry.get_telemetry_client() is not None
    assert (SESSION in os.environ) == on
    with run() as job:
        job.manifest.set_results({"gain": 0.5}, {"gateA": "pass"}, "text")
        job.finish(job.manifest)
    assert mlflow.get_run(job.manifest.run_id).info.status == "FINISHED"
    for thread in threading.enumerate():
        if thread.name == "GetTelemetryConfig":
            thread.join()
    assert len(asked) == int(on)
    assert SESSION not in os.environ
    assert capsys.readouterr().err == ""
