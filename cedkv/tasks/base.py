"""What a task is: a generator of ON episodes that needs no file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cedkv.config.schema import DataBlock
from cedkv.core.values import OnEpisode


@dataclass(frozen=True)
class TaskRequest:
    """What a run asks of a task.

    n: episodes wanted. Episode ``i`` must not depend on ``n``, so that more samples leave the first ones as they are.
    seed: of every random draw; use ``core.seeding.rng_for``.
    data: the ``data`` block of the configuration.
    tokenizer: the model's fast tokenizer; answers must be one token of it after the query.
    off_words: lower-case words of the OFF prompts, which episodes should not use.
    """

    n: int
    seed: int
    data: DataBlock
    tokenizer: Any
    off_words: frozenset[str]


class Task(ABC):
    """A source of ON episodes, chosen by ``data.task``."""

    @abstractmethod
    def episodes(self, request: TaskRequest) -> Sequence[OnEpisode]:
        """Return ``request.n`` episodes, each with a ``sample_id`` of its own.

        Raises:
            DataError: this tokenizer or configuration makes that impossible; the message says what to change.
        """

    @abstractmethod
    def source(self, request: TaskRequest) -> str:
        """Return where the samples come from, for reports: ``symbol_lookup(pairs=8, seed=42)``."""
