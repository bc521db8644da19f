"""Spans whose hiding moves the teacher's answer most: KL(teacher || teacher without the span), in nats."""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, Selector, candidates, pick_top


@dataclass(frozen=True)
class CausalDropSpan(Selector):
    """Greedy by causal drop under ``min_span_distance``."""

    needs: ClassVar[frozenset[str]] = frozenset({"causal_drop"})

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the picked spans.

        Raises:
            ValueError: the evidence holds no causal drops (the engine computes them for selectors that need them).
        """
        drops = task.evidence.causal_drop
        if drops is None:
            raise ValueError("causal_drop_span needs evidence with causal drops")
        return pick_top(((span, drops[span.start]) for span in candidates(task.token_kinds, task.select)), task.select)
