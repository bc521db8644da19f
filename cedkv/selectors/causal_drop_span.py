"""Spans whose hiding moves the teacher's answer most: KL(teacher || teacher without the span), in nats."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, Selector, candidates, pick_top, spread_over_tokens


@dataclass(frozen=True)
class CausalDropSpan(Selector):
    """Greedy by causal drop under ``min_span_distance``."""

    needs: ClassVar[frozenset[str]] = frozenset({"causal_drop"})

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the picked spans.

        Raises:
            ValueError: the evidence holds no causal drops (the engine computes them for selectors that need them).
        """
        drops = self._drops(task)
        return pick_top(((span, drops[span.start]) for span in candidates(task.token_kinds, task.select)), task.select)

    def worth(self, task: SelectionTask) -> NDArray[np.float64]:
        return spread_over_tokens(self._drops(task), task.select.span_len, len(task.token_kinds))

    def _drops(self, task: SelectionTask) -> dict[int, float]:
        if task.evidence.causal_drop is None:
            raise ValueError("causal_drop_span needs evidence with causal drops")
        return task.evidence.causal_drop
