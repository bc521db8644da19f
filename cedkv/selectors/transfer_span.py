"""Spans the query of *another* question about the same demo attends to most: does a selection serve more than its query?"""

from dataclasses import replace

from cedkv.core.errors import DataError
from cedkv.core.values import Span
from cedkv.selectors import attention_diversity_span
from cedkv.selectors.base import SelectionTask

NEEDS = frozenset({"other_attention"})
REFERENCE = "selected for another query of the same demo"


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """As ``attention_diversity_span``, with the other query's attention.

    Raises:
        DataError: the sample has no other query.
    """
    other = task.evidence.other_attention
    if other is None:
        raise DataError('transfer_span needs "other_query_text" in every line of data.on_path, or the built-in episodes')
    return attention_diversity_span.choose(replace(task, evidence=replace(task.evidence, attention=other)))
