"""Spans that start (or center) at delimiters, spread evenly over the demo. No attention is read for the choice."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cedkv.core.values import Candidate, Span
from cedkv.selectors.base import SelectionTask, Selector, attention_score, candidates


@dataclass(frozen=True)
class DelimiterSpan(Selector):
    """Thins the delimiter candidates from left to right, then takes ``span_budget`` of them at even steps.

    Thinning makes every subset respect ``min_span_distance``. Scores are the mean attention, for the record only.
    """

    query_aware: ClassVar[bool] = False

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        shift = 0 if task.select.center_policy == "start" else task.select.span_len // 2
        spaced: list[Candidate] = []
        for candidate in candidates(task.token_kinds, task.select):
            if task.token_kinds[candidate.start + shift] != "delimiter":
                continue
            if not spaced or candidate.start - spaced[-1].start >= task.select.min_span_distance:
                spaced.append(candidate)
        n = min(task.select.span_budget, len(spaced))
        picks: list[int] = np.linspace(0, len(spaced) - 1, n).round().astype(int).tolist() if n else []
        return tuple(Span(spaced[i].start, spaced[i].end, attention_score(spaced[i], task.evidence)) for i in picks)
