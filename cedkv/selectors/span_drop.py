"""Spans whose hiding moves the heads' outputs most, in closed form: causal drop without a pass per span.

With the attention A_ij of query row i under one head, p_S = sum_S A_ij, v_S = sum_S A_ij v_j / p_S and o_i = sum_j A_ij v_j,
hiding S moves the head's output by p_S / (1 - p_S) ||W_o (o_i - v_S)||. The score is its sum over the rows of
``select.query_window``, all heads and the layers of ``layer_scope.selection``. Own; for single tokens DropKV (openreview
MqfNzH3TVH). All heads and layers share one selection.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cedkv.selectors.base import ScoredSpans, SelectionTask


@dataclass(frozen=True)
class ClosedFormDropSpan(ScoredSpans):
    """Greedy by closed-form drop under ``min_span_distance``."""

    needs: ClassVar[frozenset[str]] = frozenset({"span_drop"})

    def span_scores(self, task: SelectionTask) -> Mapping[int, float]:
        """Return the drops. Raises ValueError: the evidence holds none."""
        if task.evidence.span_drop is None:
            raise ValueError("span_drop needs evidence with closed-form drops")
        return task.evidence.span_drop
