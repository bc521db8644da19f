"""Every token of the demo: what a prefix can reach at most. At ``absolute`` it must equal the teacher."""

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, span_at

REFERENCE = "keeps the whole demonstration"
UNBOUNDED = True


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """One span from the first token after BOS to the last."""
    return (span_at(int(task.token_kinds[0] == "bos"), len(task.token_kinds), task.evidence),)
