"""Every token of the demo: what a prefix can reach at most. At ``absolute`` it must equal the teacher."""

from cedkv.selectors.common import SelectionTask, span_at
from cedkv.types import Span

REFERENCE = "keeps the whole demonstration"
UNBOUNDED = True


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """One span from the first token after BOS to the last."""
    return (span_at(int(task.token_kinds[0] == "bos"), len(task.token_kinds), task.evidence),)
