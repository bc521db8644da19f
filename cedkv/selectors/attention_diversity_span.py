"""Spans the query attends to most, spaced so that they do not all sit in one place."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, Selector, candidates, check_lead, keep_leading, mean_score, pick_top


@dataclass(frozen=True)
class AttentionDiversitySpan(Selector):
    """Greedy by the mean score of a span's tokens under ``min_span_distance``.

    The score is attention, aggregated as the configuration says; the demo's first token, an attention sink, does not count.
    Spans whose lead over the mean candidate is below ``min_lead`` times the best span's are left out (``keep_leading``). A
    subclass asks for another score by ``token_score``.
    """

    min_lead: float = 0.0

    def __post_init__(self) -> None:
        check_lead(self.min_lead)

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        scored = [(c, mean_score(c, task.evidence.scores)) for c in candidates(task.token_kinds, task.select)]
        return keep_leading(pick_top(scored, task.select), (score for _, score in scored), self.min_lead)

    def worth(self, task: SelectionTask) -> NDArray[np.float64]:
        return task.evidence.scores
