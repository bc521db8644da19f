"""The first and the last tokens of the demo, as many as the budget allows: StreamingLLM's window (Xiao et al. 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.core.values import Span
from cedkv.selectors.base import Role, SelectionTask, Selector, span_at

SINK = 4
"""First tokens kept, as in the paper."""


@dataclass(frozen=True)
class SinkRecent(Selector):
    """``SINK`` first tokens and the last ones, ``span_budget x span_len`` together."""

    role: ClassVar[Role] = "reference"
    query_aware: ClassVar[bool] = False

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        first, length = int(task.token_kinds[0] == "bos"), len(task.token_kinds)
        budget = min(task.select.span_budget * task.select.span_len, length - first)
        sink = min(SINK, budget)
        spans = [span_at(first, first + sink, task.evidence)]
        if budget > sink:
            spans.append(span_at(length - (budget - sink), length, task.evidence))
        return tuple(spans)
