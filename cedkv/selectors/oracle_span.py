"""The tokens that hold the answer: what a selector that knows where to look would keep. An oracle, never a method."""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.core.errors import DataError
from cedkv.core.values import Span
from cedkv.selectors.base import Role, SelectionTask, Selector, span_at


@dataclass(frozen=True)
class OracleSpan(Selector):
    """One span over the gold tokens, cut at the end to ``span_budget x span_len`` tokens."""

    needs: ClassVar[frozenset[str]] = frozenset({"gold"})
    role: ClassVar[Role] = "oracle"

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the gold span. Raises DataError: the sample does not say where its answer is."""
        if task.evidence.gold is None:
            raise DataError('oracle_span needs "gold": [start, end] in every line of data.on_path, or the built-in episodes')
        start, end = task.evidence.gold
        return (span_at(start, min(end, start + task.select.span_budget * task.select.span_len), task.evidence),)
