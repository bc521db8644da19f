"""Spans whose hiding moves the teacher's answer most: KL(teacher || teacher without the span), in nats."""

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, candidates, pick_top

NEEDS = frozenset({"causal_drop"})


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """Greedy by causal drop.

    Raises:
        ValueError: the evidence holds no causal drops (the engine computes them when this selector is configured).
    """
    drops = task.evidence.causal_drop
    if drops is None:
        raise ValueError("causal_drop_span needs evidence with causal drops")
    return pick_top(((c, drops[c.start]) for c in candidates(task.token_kinds, task.select)), task.select)
