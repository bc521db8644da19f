"""Spans whose hiding moves the heads' outputs most, in closed form: causal drop without a pass per span.

With the attention A_ij of query row i under one head, p_S = sum_S A_ij, v_S = sum_S A_ij v_j / p_S and o_i = sum_j A_ij v_j,
hiding S moves the head's output by p_S / (1 - p_S) ||W_o (o_i - v_S)||. The score is its sum over the rows of
``select.query_window``, all heads and the layers of ``layer_scope.selection``. Own; for single tokens DropKV (openreview
MqfNzH3TVH). All heads and layers share one selection.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, Selector, candidates, pick_top, spread_over_tokens


@dataclass(frozen=True)
class ClosedFormDropSpan(Selector):
    """Greedy by closed-form drop under ``min_span_distance``."""

    needs: ClassVar[frozenset[str]] = frozenset({"span_drop"})

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the picked spans. Raises ValueError: the evidence holds no closed-form drops."""
        drops = self._drops(task)
        return pick_top(((span, drops[span.start]) for span in candidates(task.token_kinds, task.select)), task.select)

    def worth(self, task: SelectionTask) -> NDArray[np.float64]:
        return spread_over_tokens(self._drops(task), task.select.span_len, len(task.token_kinds))

    def _drops(self, task: SelectionTask) -> dict[int, float]:
        if task.evidence.span_drop is None:
            raise ValueError("span_drop needs evidence with closed-form drops")
        return task.evidence.span_drop
