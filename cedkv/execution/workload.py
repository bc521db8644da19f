"""The work of a run: everything its units are computed from besides the model, and the plan of these units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cedkv.conditions import Condition
from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.tasks.load import Samples
from cedkv.units import Unit, evaluations, plan_samples


@dataclass(frozen=True)
class TaskGroup:
    """The conditions of a task (``by_task``) and their samples.

    unit_size: ON samples of a unit, at most.
    """

    task: str
    conditions: Sequence[Condition]
    samples: Samples
    unit_size: int

    @property
    def configs(self) -> list[Phase2Config]:
        """The configurations of the conditions."""
        return [condition.config for condition in self.conditions]


@dataclass(frozen=True)
class PlannedUnit:
    """A unit of a run.

    group: index of the task's group that the unit belongs to.
    size: evaluations (sample x arm), at most.
    """

    group: int
    unit: Unit
    size: int

    @property
    def key(self) -> str:
        """The unit's key."""
        return self.unit.key


@dataclass(frozen=True)
class Workload:
    """All that the records of a run are computed from, besides the model's weights; it can be sent to another process.

    config: settings of model and runtime, which all conditions share.
    """

    config: Phase2Config
    groups: Sequence[TaskGroup]
    phase: Phase

    @property
    def conditions(self) -> list[Condition]:
        """The conditions of all groups."""
        return [condition for group in self.groups for condition in group.conditions]

    @property
    def configs(self) -> list[Phase2Config]:
        """The configurations of all groups."""
        return [condition.config for condition in self.conditions]

    @property
    def own(self) -> Sequence[PlannedUnit]:
        """The units to compute, in their order: all, or those of the shard."""
        shard = self.config.shard
        return self.plan if shard is None else shard.of(self.plan)

    def with_unit_sizes(self, sizes: Sequence[int]) -> Workload:
        """Return the same work in units of other sizes, one per group."""
        return replace(self, groups=[replace(group, unit_size=n) for group, n in zip(self.groups, sizes, strict=True)])

    @cached_property
    def plan(self) -> tuple[PlannedUnit, ...]:
        """All units, in their order."""
        return tuple(
            PlannedUnit(index, unit, evaluations(group.conditions, unit, self.phase, group.samples.on))
            for index, group in enumerate(self.groups)
            for unit in plan_samples(group.conditions, group.samples, self.phase, group.task, group.unit_size)
        )
