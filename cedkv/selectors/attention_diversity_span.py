"""Spans the query attends to most, spaced so that they do not all sit in one place."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, Selector, candidates, mean_score, pick_top


@dataclass(frozen=True)
class AttentionDiversitySpan(Selector):
    """Greedy by the mean score of a span's tokens under ``min_span_distance``.

    The score is attention, aggregated as the configuration says; the demo's first token, an attention sink, does not count.
    A subclass asks for another score by ``token_score``.
    """

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        scores = task.evidence.scores
        return pick_top(((span, mean_score(span, scores)) for span in candidates(task.token_kinds, task.select)), task.select)

    def worth(self, task: SelectionTask) -> NDArray[np.float64]:
        return task.evidence.scores
