"""How many ON samples a unit has on a card: as its free memory and a budget of tokens allow; found once, and kept by the run.

A unit's key stands for the same samples in every process of a run. So what was found is written in the journal's header, from
which a resumed run takes it whatever its card; and where a process cannot know what the others find (workers, shards), or the
model is on several cards (``device_map``), units keep their fixed sizes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cedkv.conditions import Condition, in_task
from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.core.text import plural
from cedkv.execution.workload import TaskGroup, Workload
from cedkv.models.batching import PASS_TOKENS
from cedkv.models.opening import ModelSpec
from cedkv.models.sizes import ModelSizes, model_sizes
from cedkv.runs.journal import NAME, stored_value
from cedkv.runs.memory import ALLOCATOR, UnitShape, kept_memory
from cedkv.units import longest_prompt, smallest_unit

UNIT_SIZE = "unit_size"
"""Name of the number in a journal's header and among MLflow's parameters, in a run of several tasks in each task."""
TOKENS = 8 * PASS_TOKENS["cuda"]
"""Slots and tokens of the prompts of one arm of a unit, at most: eight full passes.

A unit pays for each of its passes what a pass costs besides its tokens (on an H200 as much as 600 to 12,000 tokens): with eight
full passes a tenth of their time at most. Larger units would gain less than that, and an interrupted run loses the unit that
was under way.
"""
MEMORY_SHARE = 0.5
"""Share of a card's free memory beside the weights that a unit may keep; the rest is for its passes."""


def settle_sizes(work: Workload, spec: ModelSpec, free: int | None, folder: Path) -> Workload:
    """Return the work of a run in its units: those of its journal, or, of a new run on a card, as large as it takes them.

    Args:
        free: bytes that are free on the card beside the weights; None on no card.
        folder: of the run.
    """
    if (stored := stored_sizes(work, folder)) is not None:
        return stored
    if free is None or not are_found(work.config):
        return work
    found = find_sizes(work, model_sizes(spec, work.config.runtime.torch_dtype), free)
    most = ", ".join(": ".join(filter(None, (group.task, plural(group.unit_size, "ON sample")))) for group in found.groups)
    click.echo(f"units of at most {most}, by {free / 1e9:.1f} GB that are free on {spec.device} beside the weights", err=True)
    return found


def stored_sizes(work: Workload, folder: Path) -> Workload | None:
    """Return the work in the units that a run has in its journal; None where its folder has no journal yet."""
    stored = [stored_value(folder / NAME, in_task(group.task, UNIT_SIZE)) for group in work.groups]
    return None if None in stored else work.with_unit_sizes(stored)


def are_found(config: Phase2Config) -> bool:
    """Return whether a run on a card finds the size of its units: of one process and one card, without a batch size."""
    runtime = config.runtime
    return config.rows_per_pass is None and runtime.workers is None and runtime.shard is None and runtime.device_map is None


def find_sizes(work: Workload, sizes: ModelSizes, free: int) -> Workload:
    """Return the work in units as large as a card takes them.

    Args:
        free: bytes that are free on the card beside the weights.
    """
    return work.with_unit_sizes([_size_of(group, work.phase, sizes, free) for group in work.groups])


def _size_of(group: TaskGroup, phase: Phase, sizes: ModelSizes, free: int) -> int:
    samples, gate_a = group.samples, group.configs[0].eval.gate_a_samples
    everything = UnitShape(
        on=len(samples.on),
        off=len(samples.off) if phase == "2" else 0,
        checked=min(len(samples.on), gate_a),
        demo=max(len(sample.demo_token_ids) for sample in samples.on),
    )
    longest = longest_prompt(group.conditions, samples, phase)
    return largest_size(sizes, group.conditions, everything, longest, phase, free)


def largest_size(
    sizes: ModelSizes, conditions: Sequence[Condition], everything: UnitShape, longest: int, phase: Phase, free: int
) -> int:
    """Return how many ON samples a unit has at most: within ``TOKENS``, and within ``MEMORY_SHARE`` of the free memory.

    Where not even the fewest samples that a unit can be made of are within both, a unit has these.

    Args:
        everything: the shape of one unit of all samples.
        longest: slots and tokens of the longest prompt.
        free: bytes that are free on the card beside the weights.
    """
    off_per_on = -(-everything.off // everything.on)

    def exceeds(n: int) -> bool:
        off, checked = min(everything.off, n * off_per_on), min(everything.checked, n)
        shape = replace(everything, on=n, off=off, checked=checked)
        kept = (1 + ALLOCATOR) * sum(kept_memory(sizes, conditions, shape, phase).values())
        return max(n, off) * longest > TOKENS or kept > MEMORY_SHARE * free

    within = bisect_left(range(1, everything.on + 1), True, key=exceeds)
    return max(smallest_unit(conditions, everything.on), within)


def size_params(header: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, str]:
    """Return the sizes of a run's units as MLflow's parameters.

    Args:
        header: of its journal.
        tasks: the run's (``conditions.by_task``).
    """
    names = [in_task(task, UNIT_SIZE) for task in tasks]
    return {name: str(header[name]) for name in names if name in header}
