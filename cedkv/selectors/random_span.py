"""Spans drawn uniformly among the candidates, under the same distance and budget: the baseline of every selector."""

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, attention_score, candidates, pick_spaced

REFERENCE = "a random baseline"


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """Greedy over a random order. Scores are the mean attention, for the record only."""
    found = candidates(task.token_kinds, task.select)
    order = [found[i] for i in task.rng.permutation(len(found))]
    return tuple(Span(c.start, c.end, attention_score(c, task.evidence)) for c in pick_spaced(order, task.select))
