"""The tokens that hold the answer: what a selector that knows where to look would keep. An oracle, never a method."""

from cedkv.core.errors import DataError
from cedkv.core.values import Span
from cedkv.selectors.base import SelectionTask, span_at

NEEDS = frozenset({"gold"})
REFERENCE = "knows where the answer is"
ORACLE = True


def choose(task: SelectionTask) -> tuple[Span, ...]:
    """One span over the gold tokens, cut at the end to ``span_budget x span_len`` tokens.

    Raises:
        DataError: the sample does not say where its answer is.
    """
    if task.evidence.gold is None:
        raise DataError('oracle_span needs "gold": [start, end] in every line of data.on_path, or the built-in episodes')
    start, end = task.evidence.gold
    return (span_at(start, min(end, start + task.select.span_budget * task.select.span_len), task.evidence),)
