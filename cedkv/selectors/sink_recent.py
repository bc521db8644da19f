"""The first and the last tokens of the demo, as many as the budget allows: StreamingLLM's window (Xiao et al. 2024)."""

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, span_at

REFERENCE = "a fixed window that looks at nothing"
SINK = 4
"""First tokens kept, as in the paper."""


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """``SINK`` first tokens and the last ones, ``span_budget x span_len`` together."""
    first, length = int(task.token_kinds[0] == "bos"), len(task.token_kinds)
    budget = min(task.select.span_budget * task.select.span_len, length - first)
    sink = min(SINK, budget)
    spans = [span_at(first, first + sink, task.evidence)]
    if budget > sink:
        spans.append(span_at(length - (budget - sink), length, task.evidence))
    return tuple(spans)
