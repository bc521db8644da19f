"""Spans drawn uniformly among the candidates, under the same distance and budget: the baseline of every selector."""

from cedkv.selectors.common import SelectionTask, attention_score, candidates, take_apart
from cedkv.types import Span

REFERENCE = "a random baseline"


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """Greedy over a random order. Scores are the mean attention, for the record only."""
    found = candidates(task.token_kinds, task.select)
    order = [found[i] for i in task.rng.permutation(len(found))]
    return tuple(Span(c.start, c.end, attention_score(c, task.evidence)) for c in take_apart(order, task.select))
