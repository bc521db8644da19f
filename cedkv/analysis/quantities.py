"""The quantities that arms and conditions are compared by: where each one is recorded and how it is shown.

The numbers themselves are defined in ``metrics_phase2``; comparisons, answers, tables, figures and the page read this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cedkv.core.values import Record

Arm = Literal["base", "teacher", "select", "random"]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number per sample (ON samples) or per prompt (OFF prompts), and the words for it."""

    name: str
    """Its name in ``comparison.json`` and ``comparisons.json``."""
    samples: Literal["on", "off"]
    """The records that hold it."""
    record_column: str
    """Its key in a record, with ``{arm}`` for the arm, or ``{of_arm}`` for ``_arm``, empty where the arm is select."""
    unit: Literal["", "nats"]
    """Empty for a share. The numerical floor is in nats, so that it applies to quantities in nats only."""
    higher_is_better: bool
    label: str
    """Its name in tables, without the unit."""
    short_label: str
    """Its name in a sentence that says what the quantity is about."""
    axis_title: str
    """Title of an axis, with the unit."""
    caption: str
    """Its definition in a caption."""
    when_higher: str
    """What a higher value on the left of a comparison means, and below a lower one."""
    when_lower: str
    arms: tuple[Arm, ...] = ("base", "teacher", "select", "random")
    """The arms that have it."""
    partial: bool = False
    """Whether some samples do not have it; these are left out, under every arm and condition alike."""

    def having(self, records: Sequence[Record]) -> Sequence[Record]:
        """Return the records that have this quantity: all of them, unless it is ``partial``."""
        return [record for record in records if self.is_in(record)]

    def is_in(self, record: Record, arm: str = "select") -> bool:
        """Return whether a record has this quantity; one that is ``partial`` is not there where its list is empty, either."""
        return not self.partial or record.get(self.column(arm), []) != []

    def column(self, arm: str) -> str:
        """Return the record key of this quantity for an arm: ``correct_select``."""
        return self.record_column.format(arm=arm, of_arm="" if arm == "select" else f"_{arm}")

    @property
    def label_with_unit(self) -> str:
        """The name in tables with the unit: ``KL to teacher, nats``."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def better(self) -> str:
        """The better direction in words: ``lower KL to teacher``."""
        return f"{'higher' if self.higher_is_better else 'lower'} {self.label}"


ACCURACY = Quantity(
    name="accuracy",
    samples="on",
    record_column="correct_{arm}",
    unit="",
    higher_is_better=True,
    label="accuracy",
    short_label="accuracy",
    axis_title="accuracy",
    caption="Accuracy (share of ON samples answered right)",
    when_higher="more right answers",
    when_lower="fewer right answers",
)
KL_TO_TEACHER = Quantity(
    name="kl_to_teacher",
    samples="on",
    record_column="kl_{arm}_teacher",
    unit="nats",
    higher_is_better=False,
    label="KL to teacher",
    short_label="KL",
    axis_title="KL to teacher, nats",
    caption="Mean KL(student || teacher) over ON samples",
    when_higher="farther from the teacher",
    when_lower="nearer to the teacher",
)
KL_AMONG_LABELS = Quantity(
    name="kl_among_labels",
    samples="on",
    record_column="kl_{arm}_teacher_labels",
    unit="nats",
    higher_is_better=False,
    label="KL to teacher among labels",
    short_label="KL among labels",
    axis_title="KL to teacher among labels, nats",
    caption="Mean KL(student || teacher) among the sample's labels over ON samples that have labels",
    when_higher="farther from the teacher among the labels",
    when_lower="nearer to the teacher among the labels",
    partial=True,
)
OFF_DELTA = Quantity(
    name="off_delta",
    samples="off",
    record_column="phase2_delta_off_{arm}",
    unit="nats",
    higher_is_better=False,
    label="KL on OFF prompts",
    short_label="KL on OFF prompts",
    axis_title="KL(select || base), nats",
    caption="KL(select || base) over OFF prompts",
    when_higher="OFF prompts move more",
    when_lower="OFF prompts move less",
    arms=("select",),
)
OFF_FURTHER = Quantity(
    name="off_further_kl",
    samples="off",
    record_column="further_kl",
    unit="nats",
    higher_is_better=False,
    label="KL at further OFF positions",
    short_label="KL at further OFF positions",
    axis_title="KL(select || base), nats",
    caption="KL(select || base) along base's own greedy answer to an OFF prompt, mean over its further positions",
    when_higher="answers to OFF prompts move more",
    when_lower="answers to OFF prompts move less",
    arms=("select",),
    partial=True,
)
GOLD_COVERAGE = Quantity(
    name="gold_coverage",
    samples="on",
    record_column="gold_coverage{of_arm}",
    unit="",
    higher_is_better=True,
    label="gold coverage",
    short_label="gold coverage",
    axis_title="gold coverage",
    caption="Gold coverage (share of the gold tokens, which hold the answer, that are kept)",
    when_higher="more of the gold tokens kept",
    when_lower="fewer of the gold tokens kept",
    arms=("select", "random"),
    partial=True,
)
LDS = Quantity(
    name="lds",
    samples="on",
    record_column="lds",
    unit="",
    higher_is_better=True,
    label="LDS",
    short_label="LDS",
    axis_title="LDS",
    caption="LDS (rank correlation of the scores of visible tokens with the teacher's answer, over random span masks)",
    when_higher="scores that rank what the teacher's answer rests on better",
    when_lower="scores that rank what the teacher's answer rests on worse",
    arms=("select",),
    partial=True,
)
COMPREHENSIVENESS = Quantity(
    name="comprehensiveness",
    samples="on",
    record_column="comprehensiveness",
    unit="nats",
    higher_is_better=True,
    label="comprehensiveness",
    short_label="comprehensiveness",
    axis_title="comprehensiveness, nats",
    caption="Comprehensiveness (fall of the answer's log-probability when the selected spans are hidden from the teacher)",
    when_higher="the teacher loses more without the spans",
    when_lower="the teacher loses less without the spans",
    arms=("select",),
    partial=True,
)
JUDGED = (GOLD_COVERAGE, LDS, COMPREHENSIVENESS)
"""How good a selection and its scores are, beside what the student answers."""
QUANTITIES = {
    quantity.name: quantity for quantity in (ACCURACY, KL_TO_TEACHER, KL_AMONG_LABELS, OFF_DELTA, OFF_FURTHER, *JUDGED)
}
