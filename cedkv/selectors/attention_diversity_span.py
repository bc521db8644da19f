"""Spans the query attends to most, kept apart from each other so that they do not all sit in one place."""

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, attention_score, candidates, pick_top


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """Greedy by mean attention."""
    found = candidates(task.token_kinds, task.select)
    return pick_top(((c, attention_score(c, task.evidence)) for c in found), task.select)
