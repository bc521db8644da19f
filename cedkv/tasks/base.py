"""What a task is: a source of ON episodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cedkv.config.data import DataBlock
from cedkv.core.values import OnEpisode

GIVEN = frozenset({"gold", "shots", "other_query_text"})
"""What an episode may have beyond its texts."""


@dataclass(frozen=True)
class TaskRequest:
    """What a run asks of a task.

    Attributes:
        n: episodes wanted. Episode ``i`` must not depend on ``n``, so that more samples leave the first ones as they are.
        seed: of every random draw; use ``core.seeding.rng_for``.
        data: the ``data`` block of the configuration.
        tokenizer: the model's fast tokenizer.
        off_words: lower-case words of the OFF prompts, which episodes should not use.
        template_kwargs: what the chat template is given (``model.template_kwargs``), where ``data.format`` is chat.
    """

    n: int
    seed: int
    data: DataBlock
    tokenizer: Any
    off_words: frozenset[str]
    template_kwargs: dict[str, Any]


@dataclass(frozen=True)
class Task(ABC):
    """A source of ON episodes, chosen by ``data.task``.

    A subclass is a frozen dataclass; its fields are its parameters, set by ``data.params``.
    """

    @property
    def gives(self) -> frozenset[str]:
        """Return what all its episodes have of ``gold``, ``shots`` and ``other_query_text``, which some selectors need."""
        return GIVEN

    @property
    def repeated_by(self) -> Literal["demo and query", "query"]:
        """Return what makes a sample a repetition of another one, if both have it."""
        return "demo and query"

    @abstractmethod
    def episodes(self, request: TaskRequest) -> Iterable[OnEpisode]:
        """Return ``request.n`` episodes or more, each with a ``sample_id`` of its own.

        They are made as they are needed, and may go on without end: where ``data.unusable`` is skip, a later one takes the
        place of an unusable one.

        Raises:
            DataError: this tokenizer or configuration makes that impossible; the message says what to change.
        """

    @abstractmethod
    def source(self, request: TaskRequest) -> str:
        """Return where the samples come from, for reports: ``symbol_lookup(pairs=8, seed=42)``."""
