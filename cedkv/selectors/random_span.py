"""Spans drawn uniformly among the candidates, under the same distance and budget: the baseline of every selector."""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.core.values import Span
from cedkv.selectors.base import Role, SelectionTask, Selector, attention_score, candidates, pick_spaced


@dataclass(frozen=True)
class RandomSpan(Selector):
    """Greedy over a random order. Scores are the mean attention, for the record only."""

    role: ClassVar[Role] = "reference"
    query_aware: ClassVar[bool] = False

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        spans = candidates(task.token_kinds, task.select)
        order = [spans[i] for i in task.rng.permutation(len(spans))]
        return tuple(Span(c.start, c.end, attention_score(c, task.evidence)) for c in pick_spaced(order, task.select))
