"""One random span in each of ``span_budget`` equal stretches of the demo: a stronger baseline than plain random spans.

Plain random spans may all fall into one half of the demo; these cover it, as a selector that spreads its spans does.
"""

from cedkv.core.values import Candidate, Span
from cedkv.selectors.base import SelectionTask, attention_score, candidates

REFERENCE = "a random baseline"


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """From left to right, uniformly among a stretch's candidates that keep the distance to the one before."""
    length = len(task.token_kinds)
    found = candidates(task.token_kinds, task.select)
    taken: list[Candidate] = []
    for stretch in range(task.select.span_budget):
        low, high = length * stretch // task.select.span_budget, length * (stretch + 1) // task.select.span_budget
        there = [
            c
            for c in found
            if low <= c.start < high and (not taken or c.start - taken[-1].start >= task.select.min_span_distance)
        ]
        if there:
            taken.append(there[int(task.rng.integers(len(there)))])
    return tuple(Span(c.start, c.end, attention_score(c, task.evidence)) for c in taken)
