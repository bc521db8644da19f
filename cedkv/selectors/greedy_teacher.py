"""Spans added one by one, each the one that brings the student nearest to the teacher: what a selector can reach at most.

In every step each remaining candidate is added in turn, its prefix is made and answered as the configuration says, and the
span with the smallest KL(select || teacher) stays, until the budget is spent. It does not know the answer; it costs a
student per candidate and step. Own.
"""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.config.schema import SelectBlock
from cedkv.core.values import Candidate, Selection, Span
from cedkv.selectors.base import Role, SelectionTask, Selector, candidates, kept_tokens


@dataclass(frozen=True)
class GreedyTeacher(Selector):
    """Greedy by KL(select || teacher) under ``min_span_distance``; a span's score is minus the KL that was reached with it."""

    needs: ClassVar[frozenset[str]] = frozenset({"divergence"})
    role: ClassVar[Role] = "reference"

    def rows_at_most(self, n_candidates: int, select: SelectBlock) -> int:
        return n_candidates * select.span_budget

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the picked spans. Raises ValueError: the evidence cannot try selections."""
        if task.evidence.divergence is None:
            raise ValueError("greedy_teacher needs evidence that tries selections")
        remaining, picked = candidates(task.token_kinds, task.select), list[Span]()
        while remaining and len(picked) < task.select.span_budget:
            tried = [_with(picked, candidate, task) for candidate in remaining]
            divergences = task.evidence.divergence(tried)
            best = min(range(len(remaining)), key=lambda i: (divergences[i], remaining[i].start))
            chosen = remaining[best]
            picked.append(Span(chosen.start, chosen.end, -divergences[best]))
            distance = task.select.min_span_distance
            remaining = [c for c in remaining if abs(c.start - chosen.start) >= distance]
        return tuple(picked)


def _with(picked: list[Span], candidate: Candidate, task: SelectionTask) -> Selection:
    spans = (*picked, Span(candidate.start, candidate.end, 0.0))
    return Selection(spans, kept_tokens(spans, task.token_kinds, task.select))
