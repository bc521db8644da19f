"""Spans whose hiding moves the teacher's answer most: KL(teacher || teacher without the span), in nats."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cedkv.selectors.base import ScoredSpans, SelectionTask


@dataclass(frozen=True)
class CausalDropSpan(ScoredSpans):
    """Greedy by causal drop under ``min_span_distance``."""

    needs: ClassVar[frozenset[str]] = frozenset({"causal_drop"})

    def span_scores(self, task: SelectionTask) -> Mapping[int, float]:
        """Return the drops. Raises ValueError: the evidence holds none."""
        if task.evidence.causal_drop is None:
            raise ValueError("causal_drop_span needs evidence with causal drops")
        return task.evidence.causal_drop
