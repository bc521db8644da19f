"""What a comparison is made of: the results of several conditions on the same samples."""

from __future__ import annotations

from dataclasses import dataclass

from cedkv.config import Phase2Config
from cedkv.report.build import Records, Results


@dataclass(frozen=True)
class ConditionResult:
    """One condition of a grid, finished.

    key: stable and unique in the grid, the changed settings: ``select.mode=random_span``.
    factors: the settings in which the grid's conditions differ, dotted name -> value of this condition.
    oracle: the condition knows the answer (it is a reference point, never a winner).
    reference: the condition is a reference point, not a candidate for ``best``.
    """

    key: str
    label: str
    run_id: str
    config: Phase2Config
    factors: dict[str, object]
    oracle: bool
    reference: bool
    records: Records
    results: Results
