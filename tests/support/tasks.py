"""A second task for tests, registered for the time of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cedkv.config.extensions import TASKS
from cedkv.core.values import OnEpisode
from cedkv.tasks.base import Task, TaskRequest
from cedkv.tasks.symbol_lookup import SymbolLookup


@dataclass(frozen=True)
class OtherLookup(Task):
    """The episodes of ``symbol_lookup`` of another seed."""

    shift: int = 1

    def episodes(self, request: TaskRequest) -> Iterable[OnEpisode]:
        return SymbolLookup().episodes(replace(request, seed=request.seed + self.shift))

    def source(self, request: TaskRequest) -> str:
        return f"other_lookup(seed={request.seed + self.shift})"


@contextmanager
def other_lookup() -> Iterator[str]:
    """Register a task; its name."""
    TASKS.register("other_lookup")(OtherLookup)
    try:
        yield "other_lookup"
    finally:
        TASKS._registered.pop("other_lookup")
        TASKS._loaded.pop("other_lookup", None)
