"""Plan a run without weights: its units, evaluations and tokens, the memory of a process, and the time on n workers."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cedkv.config.options import Phase
from cedkv.config.resolve import resolve
from cedkv.execution.workload import TaskGroup, Workload
from cedkv.inference.head_weights import fitted_scores, held_out_samples
from cedkv.models.devices import free_memory, is_here
from cedkv.models.opening import ModelSpec, open_spec
from cedkv.models.sizes import ModelSizes, model_sizes
from cedkv.runs.memory import LIBRARIES, unit_memory
from cedkv.runs.prepare import prepare
from cedkv.runs.rate import Rate, rate_of, timed_run
from cedkv.runs.rehearsal import REHEARSED, PassCount, rehearse_fit, rehearse_units
from cedkv.runs.resolved import RunInputs, resolve_inputs
from cedkv.runs.stand_in import rank_ids, ranked_off, ranked_on, stand_in
from cedkv.runs.unit_sizes import are_found, find_sizes, stored_sizes
from cedkv.units import Unit

UnitSizes = Literal["fixed", "found", "not known"]


@dataclass(frozen=True)
class TaskPlan:
    """What the conditions of a task take.

    unit_size: ON samples of a unit, at most.
    evaluations: (sample, arm) evaluations, at most.
    tokens, padded, passes: of the forward passes, see ``PassCount``.
    rehearsed: units whose passes were counted; the others count as the largest of their kind.
    longest: slots and tokens of the longest row of a pass.
    fit_tokens: tokens to fit weights of attention heads, once per model and kind of evidence.
    unit_stages: tokens of every unit, by the stage of the run's clock.
    """

    task: str
    conditions: int
    on: int
    off: int
    units: int
    unit_size: int
    evaluations: int
    tokens: int
    padded: int
    passes: int
    rehearsed: int
    longest: int
    fit_tokens: int
    unit_stages: list[dict[str, int]] = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    unit_sizes: whether sizes of units were ``found`` by the free memory of a card that is here, are ``not known``, because a
        run finds them and the card is not here or the size of the weights is not known, or are ``fixed``.
    memory: of one process, in bytes, by what it is of; ``weights`` is None where their size is not known.
    kv_bytes: keys and values of one token.
    journal_bytes: size of the journal, about.
    """

    command: str
    phase: Phase
    model: str
    dtype: str
    device: str
    parameters: int
    unit_sizes: UnitSizes
    tasks: list[TaskPlan]
    memory: dict[str, int | None]
    kv_bytes: int
    journal_bytes: int

    @property
    def unit_stages(self) -> list[dict[str, int]]:
        """Tokens of every unit of all tasks, by stage."""
        return [stages for task in self.tasks for stages in task.unit_stages]

    def total(self, name: str) -> int:
        """Return the sum of a field over the tasks."""
        return sum(getattr(task, name) for task in self.tasks)

    @property
    def peak(self) -> int | None:
        """The memory of one process, in bytes; None where the size of the weights is not known."""
        values = [value for value in self.memory.values() if value is not None]
        return sum(values) if len(values) == len(self.memory) else None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON takes it, with its sums."""
        sums = {name: self.total(name) for name in ("units", "evaluations", "tokens", "padded", "passes", "fit_tokens")}
        return {**asdict(self), "total": sums, "peak_bytes": self.peak}


@dataclass(frozen=True)
class TimePlan:
    """How long a plan takes on some workers, in seconds.

    startup: until a worker takes its first unit. units: from then on until the last unit is done, the longest unit first.
    longest_unit: of one unit, below which no number of workers brings ``units``. fit: to fit weights of attention heads, once.
    end: results, page and MLflow, in one process.
    """

    workers: int
    startup: float
    fit: float
    units: float
    longest_unit: float
    end: float

    @property
    def total(self) -> float:
        """Seconds from the start of the command to its end."""
        return self.startup + self.fit + self.units + self.end


def plan_run(inputs: RunInputs, announce: Callable[[str], None], most: int = REHEARSED, folder: Path | None = None) -> Plan:
    """Return what a run takes, from its configuration, tokenizer and samples; no weights are read.

    Args:
        announce: takes the key of each unit whose passes are counted.
        most: evaluations that are rehearsed at most; each task and kind of unit has an equal share.
        folder: of a run of these inputs, whose units are taken.

    Raises:
        ConfigError, DataError, ModelError: as the run would, before its weights are loaded.
    """
    config, phase = inputs.config, inputs.phase
    spec = open_spec(config, anywhere=True)
    sizes = model_sizes(spec, config.runtime.torch_dtype)
    work, unit_sizes = _in_units(prepare(inputs, spec), spec, sizes, folder)
    tasks, memory, journal_bytes = [], dict[str, int](), 0
    for index, group in enumerate(work.groups):
        planned = [unit for unit in work.own if unit.group == index]
        units = [unit.unit for unit in planned]
        counts, rehearsed, fit_tokens = _rehearse(spec, group, units, phase, most // (3 * len(work.groups)), announce)
        tasks.append(
            TaskPlan(
                task=group.task or config.data.source,
                conditions=len(group.conditions),
                on=len(group.samples.on),
                off=len(group.samples.off),
                units=len(units),
                unit_size=group.unit_size,
                evaluations=sum(unit.size for unit in planned),
                tokens=sum(count.stages.total() for count in counts),
                padded=sum(count.padded for count in counts),
                passes=sum(count.passes for count in counts),
                rehearsed=rehearsed,
                longest=max((count.longest for count in counts), default=0),
                fit_tokens=fit_tokens,
                unit_stages=[dict(count.stages) for count in counts],
            )
        )
        for unit, count in zip(units, counts, strict=True):
            for name, value in unit_memory(sizes, group, unit, phase, count).items():
                memory[name] = max(memory.get(name, 0), value)
        journal_bytes += sum(count.record_bytes for count in counts)
    on_host = {"libraries": LIBRARIES} if spec.device.type == "cpu" else {}
    return Plan(
        command=inputs.command,
        phase=phase,
        model=config.model.id,
        dtype=config.runtime.torch_dtype,
        device=str(spec.device),
        parameters=sizes.parameters,
        unit_sizes=unit_sizes,
        tasks=tasks,
        memory={**on_host, "weights": sizes.weight_bytes, **memory},
        kv_bytes=sizes.kv_bytes,
        journal_bytes=journal_bytes,
    )


def _in_units(work: Workload, spec: ModelSpec, sizes: ModelSizes, folder: Path | None) -> tuple[Workload, UnitSizes]:
    """Return the work in the units of a run of it, else in those that a run would have now, and whether these were found."""
    if folder is not None and (stored := stored_sizes(work, folder)) is not None:
        return stored, "fixed"
    if spec.device.type != "cuda" or not are_found(work.config):
        return work, "fixed"
    try:
        free = free_memory(spec.device) if is_here(spec.device) else None
    except RuntimeError:  # the card takes no further process: it is full, or another one's alone
        free = None
    if free is None or sizes.weight_bytes is None:
        return work, "not known"
    return find_sizes(work, sizes, free - sizes.weight_bytes), "found"


def _rehearse(
    spec: ModelSpec, group: TaskGroup, units: Sequence[Unit], phase: Phase, most: int, announce: Callable[[str], None]
) -> tuple[list[PassCount], int, int]:
    """Return the passes of every unit of a task, how many units were rehearsed, and the tokens to fit attention heads."""
    configs, samples = group.configs, group.samples
    held_out = held_out_samples(spec, configs)[0] if fitted_scores(configs) else []
    ranks = rank_ids(spec, configs, [*samples.on, *held_out], samples.off)
    ranked = replace(
        samples,
        on=tuple(ranked_on(sample, ranks) for sample in samples.on),
        off=tuple(ranked_off(prompt, ranks) for prompt in samples.off),
    )
    lm = stand_in(spec, configs, ranks)
    fit_tokens = rehearse_fit(lm, configs, [ranked_on(sample, ranks) for sample in held_out])
    return *rehearse_units(lm, replace(group, samples=ranked), units, phase, most, announce), fit_tokens


def plan_time(plan: Plan, rate: Rate, workers: int) -> TimePlan:
    """Return how long a plan takes at a measured rate, each of ``workers`` as fast as what was measured.

    The longest unit goes first, and each next one to the worker that is free first (list scheduling by longest processing time,
    Graham 1969: at most 4/3 of the best order).
    """
    longest_first = sorted(map(rate.seconds, plan.unit_stages), reverse=True)
    free_at = [0.0] * workers
    for seconds in longest_first:
        heapq.heappush(free_at, heapq.heappop(free_at) + seconds)
    return TimePlan(
        workers=workers,
        startup=rate.startup,
        fit=plan.total("fit_tokens") / rate.tokens_per_second,
        units=max(free_at),
        longest_unit=max(longest_first, default=0.0),
        end=rate.end,
    )


def measured_rate(run: Path, announce: Callable[[str], None]) -> Rate:
    """Return the rate of a finished run: its own plan's tokens, and the seconds that they took, by stage.

    Args:
        run: folder of the run, which holds its configuration and its times; the samples must be where they were.

    Raises:
        ConfigError: no folder of a run, a nested run of a comparison, or a run without the times of all its units.
        DataError, ModelError: the run's samples or model cannot be opened any more.
    """
    manifest, seconds = timed_run(run)
    config = resolve(manifest.folder / "config.yaml")
    phase: Phase = "1.5" if manifest.phase == "1.5" else "2"
    plan = plan_run(resolve_inputs(manifest.command, config, phase, manifest.lists), announce, folder=manifest.folder)
    stages = sum(map(Counter, plan.unit_stages), Counter[str]())
    return rate_of(manifest, seconds, stages, plan.model, plan.dtype)
