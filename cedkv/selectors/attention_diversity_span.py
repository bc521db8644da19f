"""Spans the query attends to most, spaced so that they do not all sit in one place."""

from dataclasses import dataclass

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, Selector, attention_score, candidates, pick_top


@dataclass(frozen=True)
class AttentionDiversitySpan(Selector):
    """Greedy by mean attention under ``min_span_distance``."""

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        spans = candidates(task.token_kinds, task.select)
        return pick_top(((span, attention_score(span, task.evidence)) for span in spans), task.select)
