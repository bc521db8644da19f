"""Every token of the demo: what a prefix can reach at most. At ``absolute`` it must equal the teacher."""

from dataclasses import dataclass
from typing import ClassVar

from cedkv.core.values import Span
from cedkv.selectors.base import Role, SelectionTask, Selector, span_at


@dataclass(frozen=True)
class FullDemo(Selector):
    """One span from the first token after BOS to the last."""

    role: ClassVar[Role] = "reference"
    query_aware: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        return (span_at(int(task.token_kinds[0] == "bos"), len(task.token_kinds), task.evidence),)
