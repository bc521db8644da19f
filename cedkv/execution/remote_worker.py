"""What runs in a worker process of a cluster: a ``Worker`` behind calls whose results can be sent. It imports no Ray."""

from __future__ import annotations

import importlib
import os
import queue
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cedkv.core import threads
from cedkv.core.errors import CedkvError, ConfigError, LackOfMemoryError

T = TypeVar("T")


@dataclass(frozen=True)
class Surroundings:
    """What a worker process takes over from the process that drives it, where its machine has it.

    folder: the working folder, so that relative paths mean the same. path: where modules are found. modules: those that
    register extensions.
    """

    folder: str
    path: Sequence[str]
    modules: Sequence[str]

    def enter(self) -> None:
        """Apply them to this process."""
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        sys.path += [entry for entry in self.path if entry not in sys.path]


@dataclass(frozen=True)
class Rejected:
    """An error whose message is meant for the user, sent as a result: Ray would wrap it, and its traceback is no message."""

    kind: type[CedkvError]
    message: str

    def error(self, prefix: str = "") -> CedkvError:
        """Return the error, with a prefix that says where it was raised."""
        return self.kind.__new__(self.kind, prefix + self.message)


class RemoteWorker:
    """A worker process. ``place`` and ``steps`` are called in a thread of their own, all other methods in one thread."""

    def __init__(self) -> None:
        threads.choose()
        self._steps: queue.SimpleQueue[tuple[str, str, int]] = queue.SimpleQueue()

    def place(self) -> tuple[str, int]:
        """Return this machine's name and the process id."""
        return socket.gethostname(), os.getpid()

    def prepare(self, surroundings: Surroundings, work: Any) -> Any:
        """Take the workload, and import what it takes to compute it; return who provides extensions."""

        def prepared() -> dict[str, str]:
            from cedkv.execution.extensions import provided
            from cedkv.execution.worker import Worker

            try:
                for module in surroundings.modules:
                    importlib.import_module(module)
                extensions = provided(work.configs)
            except (ImportError, ConfigError) as error:
                raise ConfigError(
                    f"{error}. Extensions are imported in every worker: install their package on its machine, or put its "
                    "folder on PYTHONPATH there before Ray starts"
                ) from error
            self._worker = Worker(work)
            return extensions

        surroundings.enter()
        return _sendable(prepared)

    def load(self) -> Any:
        """Load the model and certify it for this device; return facts and certificate."""
        return _sendable(lambda: (self._worker.load(), self._worker.certify()))

    def head_weights(self) -> Any:
        """See ``Executor``."""
        return _sendable(self._worker.head_weights)

    def use(self, fitted: Any) -> None:
        """See ``Worker``."""
        self._worker.use(fitted)

    def compute(self, planned: Any) -> Any:
        """Return the finished unit."""
        return _sendable(lambda: self._worker.compute(planned, lambda *step: self._steps.put(step)))

    def steps(self) -> list[tuple[str, str, int]]:
        """Return the arms that have begun since the last call, as soon as there are any; none after a few seconds."""
        begun = []
        try:
            begun.append(self._steps.get(timeout=5))
            while True:
                begun.append(self._steps.get_nowait())
        except queue.Empty:
            return begun


def _sendable(compute: Callable[[], T]) -> T | Rejected:
    try:
        return compute()
    except LackOfMemoryError:  # another try may find more: the worker counts as lost
        raise
    except CedkvError as error:
        return Rejected(type(error), str(error))
