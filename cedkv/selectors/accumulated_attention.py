"""Spans that later tokens attended to most, whatever the query: the score of H2O (Zhang et al. 2023), normalised.

H2O sums the attention a token receives; an early token is seen by more tokens and so collects more. Here the sum is
divided by the number of later tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cedkv.core.values import Span
from cedkv.selectors.base import Role, SelectionTask, Selector, candidates, pick_top


@dataclass(frozen=True)
class AccumulatedAttention(Selector):
    """Greedy by mean accumulated attention; the demo's first token, an attention sink, does not count."""

    needs: ClassVar[frozenset[str]] = frozenset({"accumulated"})
    role: ClassVar[Role] = "reference"

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the picked spans. Raises ValueError: the evidence holds no accumulated attention."""
        received = task.evidence.accumulated
        if received is None:
            raise ValueError("accumulated_attention needs evidence with accumulated attention")
        scored = []
        for candidate in candidates(task.token_kinds, task.select):
            tokens = candidate.scored_tokens()
            score = float(np.mean(received[tokens.start : tokens.stop])) if len(tokens) else 0.0
            scored.append((candidate, score))
        return pick_top(scored, task.select)
