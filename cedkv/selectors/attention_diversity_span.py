"""Spans the query attends to most, kept apart from each other so that they do not all sit in one place."""

from cedkv.selectors.common import SelectionTask, attention_score, best_first, candidates
from cedkv.types import Span


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """Greedy by mean attention."""
    found = candidates(task.token_kinds, task.select)
    return best_first(((c, attention_score(c, task.evidence)) for c in found), task.select)
