"""A batch of ON samples and everything about them that the conditions of a run share, each value computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cedkv.core.values import OnSample
from cedkv.inference.answers import Answers
from cedkv.inference.teacher import TeacherOutput
from cedkv.models.loading import LanguageModel

T = TypeVar("T")
Announce = Callable[[str, int], None]
"""Called before an arm is computed, with the arm's name and its number of evaluations (sample x arm)."""


def silent(arm: str, n: int) -> None:
    """Announce nothing: what is computed counts elsewhere, or is not counted."""


@dataclass(frozen=True)
class Batch:
    """B samples and everything about them that conditions share.

    teacher: the teacher's pass over demo + query. teacher_answers: what it answers. other_query, null_query, replay: what was
        read with each sample's other query, a null query, and a replay of its demo; None where no condition needs it.
    partners: for each row the row whose prefix ``wrong_demo`` gives it; None where no condition uses partners.
    drops: what was found by hiding spans or trying selections, by sample.
    """

    lm: LanguageModel
    samples: list[OnSample]
    teacher: TeacherOutput
    teacher_answers: Answers
    other_query: TeacherOutput | None = None
    null_query: TeacherOutput | None = None
    replay: TeacherOutput | None = None
    partners: list[int] | None = None
    drops: dict[Any, Any] = field(default_factory=dict)
    _cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Sample ids."""
        return [sample.sample_id for sample in self.samples]

    def rows(self, rows: Sequence[int], partners: list[int] | None) -> Batch:
        """Return some samples as a batch of their own, in this order, with what the teacher's passes over them gave.

        Args:
            partners: of the new batch's rows.
        """

        def some(output: TeacherOutput | None) -> TeacherOutput | None:
            return None if output is None else output.rows(rows)

        return Batch(
            lm=self.lm,
            samples=[self.samples[row] for row in rows],
            teacher=self.teacher.rows(rows),
            teacher_answers=self.teacher_answers.rows(rows),
            other_query=some(self.other_query),
            null_query=some(self.null_query),
            replay=some(self.replay),
            partners=partners,
            drops=self.drops,
        )

    def cached(self, key: Any, compute: Callable[[], T]) -> T:
        """Return the value computed when the key was first asked for."""
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value
