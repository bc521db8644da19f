"""How long MLflow is waited for: the settings of its HTTP client, and calls with a deadline. Imports nothing of MLflow."""

from __future__ import annotations

import os
import queue
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import TypeVar

T = TypeVar("T")
_PREFIX = "MLFLOW_HTTP_REQUEST_"
_http: dict[str, str] = {}
"""Environment variables of MLflow's HTTP client that ``set_http_timeouts`` has set, as opposed to the user."""


def set_http_timeouts(timeout: int) -> None:
    """Set MLflow's HTTP client to give up within ``timeout`` seconds; variables that the user has set stay.

    Three attempts of a quarter of the time each, and the last quarter for the pauses between attempts.
    """
    settings = {
        "TIMEOUT": max(1, timeout // 4),
        "MAX_RETRIES": 2,
        "BACKOFF_FACTOR": max(1, timeout // 16),
        "BACKOFF_JITTER": timeout / 32,
    }
    for name, value in settings.items():
        variable = _PREFIX + name
        if variable not in os.environ or os.environ[variable] == _http.get(variable):
            os.environ[variable] = _http[variable] = str(value)


@contextmanager
def single_attempt(timeout: int) -> Iterator[None]:
    """Let MLflow's HTTP client make one attempt of ``timeout`` seconds, for requests that must not be repeated.

    A server that is slow, not dead, creates a run for every attempt. A lost answer does no harm: a run is found again by its
    origin.
    """
    settings = {_PREFIX + "MAX_RETRIES": "0", _PREFIX + "TIMEOUT": str(timeout)}
    previous = {variable: os.environ.get(variable) for variable in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for variable, value in previous.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


def call_with_timeout(call: Callable[[], T], timeout: int) -> T:
    """Return the result of a call, or raise its error; warnings inside the call are suppressed.

    Raises:
        TimeoutError: there was no result after ``timeout`` seconds; the call goes on in its thread, and its result is lost.
    """
    outcome: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome.put((call(), None))
        except Exception as error:
            outcome.put((None, error))

    Thread(target=work, daemon=True, name="mlflow").start()
    try:
        result, error = outcome.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout} s (runtime.mlflow_timeout)") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
