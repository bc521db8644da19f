"""How much memory a process of a run needs: from the sizes of the model, the samples of a unit, and the largest pass."""

from __future__ import annotations

from cedkv.execution.workload import TaskGroup
from cedkv.inference.evidence import keeps_every_demo
from cedkv.models.sizes import ModelSizes
from cedkv.runs.rehearsal import PassCount
from cedkv.units import Unit, with_own_trials

LIBRARIES = 690_000_000
"""Memory of a process that has imported everything from torch to MLflow and its store, measured; of the host, not of a card."""
ALLOCATOR = 0.2
"""What an allocator needs beyond the tensors of units and passes, as a share of them: measured on a CPU (docs/planning.md)."""
FLOAT32 = 4
HIDDEN_COPIES, INTERMEDIATE_COPIES = 4, 3
"""Tensors of a layer that exist at once in a pass: its hidden states, and those inside its feed-forward layer."""


def unit_memory(sizes: ModelSizes, group: TaskGroup, unit: Unit, count: PassCount) -> dict[str, int]:
    """Return the bytes that a unit needs beside the weights, by what they are of.

    ``K/V of a unit``: the demos whose K/V are kept (all, or those of Gate A), Gate A's demos three times more (copied, and run
    again to caches and prefixes), copies of its prefixes, the select arm's prefixes, and as many again while they are put
    together. ``K/V of a pass``: its rows', twice, because a cache grows into a copy. ``distributions of a unit``: float32
    log-probabilities of all arms, and the logits of base's answers to OFF prompts. ``logits of a pass``: in the dtype, and one
    position's in float32, twice (log-softmax). ``activations of a pass``: those of one layer. ``allocator``: a share of all of
    these.

    Args:
        count: the passes of the unit.
    """
    configs, conditions = group.configs, group.conditions
    rows, off, evaluation = len(unit.on), len(unit.off), configs[0].eval
    demo = max(len(group.samples.on[i].demo_token_ids) for i in unit.on)
    checked = sum(i < evaluation.gate_a_samples for i in unit.on)
    slots = max(config.prefix_len for config in configs)
    kept_demos = rows if keeps_every_demo(configs) else checked
    own_trials = len(with_own_trials(conditions)) if off else 0
    shared_trials = min(own_trials, len(conditions) - own_trials)  # kept for a later condition
    arms = 3 + evaluation.n_random_trials * (min(own_trials, 1) + shared_trials)  # base, teacher, select, and random trials
    numbers = sizes.number_bytes
    memory = {
        "K/V of a unit": (kept_demos * demo + checked * (3 * demo + slots) + 2 * rows * slots) * sizes.kv_bytes,
        "K/V of a pass": 2 * count.most_cached * sizes.kv_bytes,
        "distributions of a unit": sizes.vocabulary
        * ((arms * rows + 2 * off) * FLOAT32 + off * evaluation.off_tokens * numbers),
        "logits of a pass": sizes.vocabulary * (count.most_logits * numbers + 2 * count.most_projected * FLOAT32),
        "activations of a pass": count.most_run
        * (HIDDEN_COPIES * sizes.hidden + INTERMEDIATE_COPIES * sizes.intermediate)
        * numbers,
    }
    return {**memory, "allocator": round(ALLOCATOR * sum(memory.values()))}
