"""How much memory a process of a run needs: from the sizes of the model, the samples of a unit, and the largest pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cedkv.conditions import Condition
from cedkv.config.options import Phase
from cedkv.eval_phase2 import OFF_ALONE
from cedkv.execution.workload import TaskGroup
from cedkv.inference.evidence import keeps_every_demo
from cedkv.inference.passes import plan_passes
from cedkv.models.sizes import ModelSizes
from cedkv.runs.rehearsal import PassCount
from cedkv.selectors.base import selector_class
from cedkv.units import Unit, with_own_trials

LIBRARIES = 690_000_000
"""Memory of a process that has imported everything from torch to MLflow and its store, measured; of the host, not of a card."""
ALLOCATOR = 0.2
"""Margin for what an allocator holds beyond the tensors of units and passes, as a share of them (docs/planning.md)."""
READING_BYTES = 4
"""Of a number that is read for each demo token: float32, whatever the model's dtype."""
HIDDEN_COPIES, INTERMEDIATE_COPIES = 4, 3
"""Tensors of a layer that exist at once in a pass: its hidden states, and those inside its feed-forward layer."""


@dataclass(frozen=True)
class UnitShape:
    """What the memory of a unit depends on, beside model and settings.

    on, off: its numbers of ON samples and OFF prompts. checked: of ON samples of Gate A. demo: tokens of its longest demo.
    """

    on: int
    off: int
    checked: int
    demo: int


def unit_memory(sizes: ModelSizes, group: TaskGroup, unit: Unit, phase: Phase, count: PassCount) -> dict[str, int]:
    """Return the bytes that a unit needs beside the weights, by what they are of.

    Beside those of ``kept_memory``: ``K/V of a pass``: its rows', twice, because a cache grows into a copy, and once more for
    the prefixes of random trials that share passes, which fit one pass. ``logits of a pass``: in the dtype, and one
    position's as a distribution, twice (log-softmax). ``activations of a pass``: those of one layer. ``allocator``: a share of
    all of these.

    Args:
        count: the passes of the unit.
    """
    gate_a = group.configs[0].eval.gate_a_samples
    demo = max(len(group.samples.on[i].demo_token_ids) for i in unit.on)
    shape = UnitShape(len(unit.on), len(unit.off), sum(i < gate_a for i in unit.on), demo)
    numbers = sizes.number_bytes
    memory = {
        **kept_memory(sizes, group.conditions, shape, phase),
        "K/V of a pass": 3 * count.most_cached * sizes.kv_bytes,
        "logits of a pass": sizes.vocabulary
        * (count.most_logits * numbers + 2 * count.most_projected * sizes.distribution_bytes),
        "activations of a pass": count.most_run
        * (HIDDEN_COPIES * sizes.hidden + INTERMEDIATE_COPIES * sizes.intermediate)
        * numbers,
    }
    return {**memory, "allocator": round(ALLOCATOR * sum(memory.values()))}


def kept_memory(sizes: ModelSizes, conditions: Sequence[Condition], shape: UnitShape, phase: Phase) -> dict[str, int]:
    """Return the bytes that a unit keeps from one pass to the next, by what they are of.

    ``K/V of a unit``: the demos whose K/V are kept (all, or those of Gate A and of its OFF prompts), Gate A's demos three times
    more (copied, and run again to caches and prefixes), copies of its prefixes, the select arm's prefixes, and as many again
    while they are put together; of several conditions the kept tokens of all arms, which a later one may have in common.
    ``attention of a unit``: what is read of each demo token, as if in every layer and head. ``distributions of a unit``:
    log-probabilities of all arms, and the logits of base's answers to OFF prompts.
    """
    configs = [condition.config for condition in conditions]
    rows, off, evaluation = shape.on, shape.off, configs[0].eval
    slots = max(
        config.prefix_len if selector_class(config.select.mode).bounded else max(config.prefix_len, shape.demo)
        for config in configs
    )
    kept_demos = rows if keeps_every_demo(configs) else min(rows, shape.checked + min(off, sum(OFF_ALONE)))
    in_common = (1 + evaluation.n_random_trials) * rows * slots if len(conditions) > 1 else 0
    own_trials = len(with_own_trials(conditions)) if phase == "2" else 0
    shared_trials = min(own_trials, len(conditions) - own_trials)  # kept for a later condition
    arms = 3 + evaluation.n_random_trials * (min(own_trials, 1) + shared_trials)  # base, teacher, select, and random trials
    distributions = (arms * rows + 2 * off) * sizes.distribution_bytes
    passes = plan_passes(configs)
    readings = sum(map(len, (passes.own, passes.other, passes.null, passes.replay)))
    return {
        "K/V of a unit": sizes.kv_bytes
        * (kept_demos * shape.demo + shape.checked * (3 * shape.demo + slots) + 2 * rows * slots + in_common),
        "attention of a unit": readings * rows * shape.demo * sizes.heads * READING_BYTES,
        "distributions of a unit": sizes.vocabulary * (distributions + off * evaluation.off_tokens * sizes.number_bytes),
    }
