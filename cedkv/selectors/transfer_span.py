"""Spans the query of *another* question about the same demo attends to most: does a selection serve more than its query?"""

from dataclasses import dataclass, replace
from typing import ClassVar

from cedkv.core.errors import DataError
from cedkv.core.values import Span
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan
from cedkv.selectors.base import Role, SelectionTask


@dataclass(frozen=True)
class TransferSpan(AttentionDiversitySpan):
    """As ``attention_diversity_span``, with the other query's attention."""

    needs: ClassVar[frozenset[str]] = frozenset({"other_attention"})
    role: ClassVar[Role] = "reference"

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        """Return the picked spans. Raises DataError: the sample has no other query."""
        attention = task.evidence.other_attention
        if attention is None:
            raise DataError('transfer_span needs "other_query_text" in every line of data.on_path, or the built-in episodes')
        return super().choose(replace(task, evidence=replace(task.evidence, attention=attention)))
