"""Calls of MLflow, each with a deadline. With ``runs.tracking`` the only module that imports mlflow.

No call is waited for longer than ``timeout`` seconds, and after a failed call no other is made until ``retry``: an unreachable
server costs a run one wait and one warning, not its results.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click
import mlflow

from cedkv.core.errors import ConfigError
from cedkv.core.locks import exclusive_lock
from cedkv.core.text import redact
from cedkv.runs.store import check_database, explain
from cedkv.runs.timeouts import call_with_timeout, set_http_timeouts

T = TypeVar("T")
EXPERIMENT = "cedkv"
"""The experiment of runs where no other one is named."""
CLIENT_SETTINGS = {
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of MLflow's client, where the user has set none.

The client of a server that keeps artifacts in a cloud's store would ask that store for files by signed addresses, which often
only the server can reach. And it would print the server's address after each run, with the credentials in it.
"""


class Connection:
    """MLflow as the tracking URI of this process names it.

    timeout: longest wait for a call, in seconds; MLflow's HTTP client gives up within it (``timeouts.set_http_timeouts``).
    fault: the error after which no more calls are made; None while MLflow answers.
    """

    def __init__(self, timeout: int) -> None:
        self.timeout = timeout
        self.fault: str | None = None
        self._warned = False
        self._client: Any = None
        set_http_timeouts(timeout)
        for setting, value in CLIENT_SETTINGS.items():
            os.environ.setdefault(setting, value)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one warning from here, not one per attempt

    def retry(self) -> None:
        """Make calls again after a fault."""
        self.fault = None

    def call(self, call: Callable[[Any], T]) -> T:
        """Return the result of a call with the client, or raise its error; TimeoutError after ``timeout`` seconds."""
        return call_with_timeout(lambda: call(self._open_client()), self.timeout)

    def _open_client(self) -> Any:
        """Return the client; the first contact creates or migrates a local database's tables, which only one process may do."""
        if self._client is None:
            file = check_database(mlflow.get_tracking_uri())
            with exclusive_lock(Path(f"{file}.lock"), self.timeout) if file else nullcontext():
                client = mlflow.MlflowClient()
                client.get_experiment_by_name(EXPERIMENT)
            self._client = client
        return self._client

    def attempt(self, consequence: str, steps: Callable[[], None], *, rejecting: bool = False) -> None:
        """Run ``steps`` unless there is a fault already; a new fault is kept and, the first time, reported. The run goes on.

        Args:
            rejecting: raise ConfigError, because nothing was computed yet, or because the caller only logs.
        """
        if self.fault is not None:
            return
        try:
            steps()
        except Exception as error:
            if rejecting and isinstance(error, ConfigError):
                raise
            self.fault = f"MLflow at {tracking_uri()}: {consequence}: {explain(error, mlflow.get_tracking_uri())}"
            if not self._warned:
                click.echo(f"warning: {self.fault}. The run goes on, its results are on disk", err=True)
            self._warned = True


def use_tracking_uri(uri: str) -> None:
    """Look for runs at this address instead of ``MLFLOW_TRACKING_URI``."""
    mlflow.set_tracking_uri(uri)


def tracking_uri() -> str:
    """Return the tracking URI without credentials."""
    return redact(mlflow.get_tracking_uri())
