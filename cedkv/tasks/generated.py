"""What generators of episodes have in common: each episode is drawn by itself, from the seed and its own id.

An id whose draw repeats the demo and query of an earlier one is passed over: samples are counted, not draws. A task with few
different episodes comes to an end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import TYPE_CHECKING, ClassVar

from cedkv.core.seeding import rng_for
from cedkv.core.values import OnEpisode
from cedkv.tasks.base import Task, TaskRequest
from cedkv.tasks.shots import Question, Shot, ShotTemplate, episode_of, template_for

if TYPE_CHECKING:
    from numpy.random import Generator

MAX_REPEATS = 1_000
"""So many draws in a row that give no new episode, and there are no more of them."""
Draw = Callable[["Generator"], tuple[Sequence[Shot], Question]]
"""What draws the shots of one episode and the question about them."""


@dataclass(frozen=True)
class GeneratedTask(Task):
    """A task whose episodes are drawn, one after another, as long as there are others.

    name: of the task, which separates its random draws from those of others. prefix: of its sample ids.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]

    @property
    @abstractmethod
    def template(self) -> str:
        """Return how shots are written where ``data.template`` does not say."""

    @abstractmethod
    def prepare(self, request: TaskRequest, template: ShotTemplate) -> Draw:
        """Return what draws an episode, after everything that is the same for all of them.

        Raises:
            DataError: this tokenizer or configuration makes episodes impossible; the message says what to change.
        """

    def episodes(self, request: TaskRequest) -> Iterator[OnEpisode]:
        template = template_for(request, self.template)
        draw = self.prepare(request, template)
        return _different(self._episode(index, request.seed, draw, template) for index in count())

    def source(self, request: TaskRequest) -> str:
        data = request.data
        length = {"pairs": data.pairs} if data.demo_tokens is None else {"demo_tokens": data.demo_tokens}
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        settings = {**changed, **length, "seed": request.seed}
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in settings.items())})"

    def _episode(self, index: int, seed: int, draw: Draw, template: ShotTemplate) -> OnEpisode:
        sample_id = f"{self.prefix}-{seed}-{index:05d}"
        return episode_of(sample_id, *draw(rng_for(seed, self.name, 0, sample_id)), template)


def _different(episodes: Iterable[OnEpisode]) -> Iterator[OnEpisode]:
    """Yield the episodes that repeat no earlier one, until ``MAX_REPEATS`` in a row did."""
    seen, repeats = set[tuple[str, str]](), 0
    for episode in episodes:
        text = episode.demo_text, episode.query_text
        repeats = repeats + 1 if text in seen else 0
        if not repeats:
            seen.add(text)
            yield episode
        elif repeats == MAX_REPEATS:
            return
