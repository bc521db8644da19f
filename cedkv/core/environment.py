"""The environment variables of this process as a whole, read in a way that other threads cannot break."""

from __future__ import annotations

import os


def environment_variables() -> dict[str, str]:
    """Return a copy of the environment variables.

    ``os.environ.items()``, ``os.environ.copy()`` and ``{**os.environ}`` look each name up after the names were listed, and
    raise KeyError where a thread has removed one in between: MLflow's telemetry thread does, when it cannot be reached.
    """
    return {name: value for name in os.environ if (value := os.environ.get(name)) is not None}
