"""Whole solved examples of the demo, those the query attends to most: the unit of ShotKV (Liu et al. 2025, arXiv 2502.01941).

A shot's score is the mean score of its tokens, under the configured aggregation; the demo's first token, an attention sink,
does not count.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cedkv.core.errors import DataError
from cedkv.core.values import Candidate, Span
from cedkv.selectors.base import SelectionTask, Selector, check_lead, keep_leading, mean_score


@dataclass(frozen=True)
class WholeShots(Selector):
    """Shots by score as long as they fit ``span_budget x span_len`` tokens; one that does not fit is passed over.

    Where none fits, the best one is cut at its start: the answer is at its end.

    Shots whose lead over the mean shot is below ``min_lead`` times the best one's are left out (``keep_leading``).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"shots"})

    min_lead: float = 0.0

    def __post_init__(self) -> None:
        check_lead(self.min_lead)

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the chosen shots. Raises DataError: the sample does not say where its shots are."""
        shots = task.evidence.shots
        if shots is None:
            raise DataError('whole_shots needs "shots": [[start, end], ...] in every line of data.on_path, or a built-in task')
        scored = [Span(start, end, mean_score(Candidate(start, end), task.evidence.scores)) for start, end in shots]
        room, chosen = task.select.span_budget * task.select.span_len, list[Span]()
        for shot in sorted(scored, key=lambda shot: (-shot.score, shot.start)):
            if shot.end - shot.start <= room:
                chosen.append(shot)
                room -= shot.end - shot.start
        if not chosen:
            best = max(scored, key=lambda shot: (shot.score, -shot.start))
            return (replace(best, start=best.end - room),)
        return keep_leading(tuple(chosen), (shot.score for shot in scored), self.min_lead)

    def worth(self, task: SelectionTask) -> NDArray[np.float64]:
        return task.evidence.scores
