"""One random span in each of ``span_budget`` equal stretches of the demo: a stronger baseline than plain random spans.

Plain random spans may all fall into one half of the demo; these cover it, as a selector that spreads its spans does.
"""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.core.values import Candidate, Span
from cedkv.selectors.base import Role, SelectionTask, Selector, attention_score, candidates


@dataclass(frozen=True)
class StratifiedRandomSpan(Selector):
    """From left to right, uniformly among the candidates of a stretch that keep the distance to the previous span."""

    role: ClassVar[Role] = "reference"
    query_aware: ClassVar[bool] = False

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        length, budget = len(task.token_kinds), task.select.span_budget
        spans = candidates(task.token_kinds, task.select)
        picked: list[Candidate] = []
        for stretch in range(budget):
            low, high = length * stretch // budget, length * (stretch + 1) // budget
            earliest = picked[-1].start + task.select.min_span_distance if picked else low
            inside = [span for span in spans if max(low, earliest) <= span.start < high]
            if inside:
                picked.append(inside[int(task.rng.integers(len(inside)))])
        return tuple(Span(c.start, c.end, attention_score(c, task.evidence)) for c in picked)
