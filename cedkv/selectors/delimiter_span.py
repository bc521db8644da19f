"""Spans that start (or center) at delimiters, spread evenly over the demo. No attention is read for the choice."""

import numpy as np

from cedkv.core.values import Candidate, Span
from cedkv.selectors.base import SelectionTask, attention_score, candidates


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """Thin the delimiter candidates from left to right, then take ``span_budget`` of them at even steps.

    The thinning makes every subset respect ``min_span_distance``. Scores are the mean attention, for the record only.
    """
    shift = 0 if task.select.center_policy == "start" else task.select.span_len // 2
    apart: list[Candidate] = []
    for candidate in candidates(task.token_kinds, task.select):
        if task.token_kinds[candidate.start + shift] != "delimiter":
            continue
        if not apart or candidate.start - apart[-1].start >= task.select.min_span_distance:
            apart.append(candidate)
    n = min(task.select.span_budget, len(apart))
    picks: list[int] = np.linspace(0, len(apart) - 1, n).round().astype(int).tolist() if n else []
    return tuple(Span(apart[i].start, apart[i].end, attention_score(apart[i], task.evidence)) for i in picks)
