"""Rehearse the units of a run on a stand-in for the model, and count the passes that the engine makes: tokens, rows, sizes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.core.values import OnSample
from cedkv.eval_phase2 import run_units
from cedkv.execution.workload import TaskGroup
from cedkv.inference.head_weights import fit, fitted_scores
from cedkv.models.loading import LanguageModel
from cedkv.runs.progress import stage_of
from cedkv.units import Unit, evaluations

REHEARSED = 50_000
"""Evaluations of a run that are rehearsed at most, about a minute; of more, the largest unit of each kind alone."""


@dataclass
class PassCount:
    """The passes of a unit.

    stages: tokens that go through the model, without padding, by the stage of the run's clock. padded: all tokens with padding.
    passes: forward passes.
    longest: slots in front of a row and its tokens, padding included, the most of any pass.
    most_cached: rows x (slots in front + tokens), the most of any pass with a cache.
    most_run: rows x tokens, padding included, the most of any pass.
    most_projected, most_logits: rows whose logits are computed, and rows x positions, the most of any pass.
    record_bytes: the unit's records as JSON. stage: the one that passes are counted for.
    """

    stages: Counter[str] = field(default_factory=Counter)
    padded: int = 0
    passes: int = 0
    longest: int = 0
    most_cached: int = 0
    most_run: int = 0
    most_projected: int = 0
    most_logits: int = 0
    record_bytes: int = 0
    stage: str = ""

    def enter(self, arm: str, _: int) -> None:
        """Count what follows for the stage of an arm."""
        self.stage = stage_of(arm)


@contextmanager
def counting(model: Any) -> Iterator[PassCount]:
    """Count the forward passes of a model inside the context."""
    count = PassCount()

    def run(_: Any, __: Any, given: dict[str, Any]) -> None:
        (rows, width), mask = given["input_ids"].shape, given["attention_mask"]
        past = mask.shape[-1] - width
        # where a mask says which token sees which, a token sees itself, and padding does not
        real = mask[:, -width:] if mask.dim() == 2 else mask[:, 0].diagonal(past, 1, 2)
        count.stages[count.stage] += int(real.sum())
        count.padded += rows * width
        count.passes += 1
        count.longest = max(count.longest, past + width)
        count.most_run = max(count.most_run, rows * width)
        if given.get("use_cache"):
            count.most_cached = max(count.most_cached, rows * (past + width))

    def project(_: Any, __: Any, given: dict[str, Any]) -> None:
        rows, width = given["input_ids"].shape
        count.most_projected = max(count.most_projected, rows)
        count.most_logits = max(count.most_logits, rows * (given.get("logits_to_keep") or width))

    hooks = [
        model.base_model.register_forward_pre_hook(run, with_kwargs=True),
        model.register_forward_pre_hook(project, with_kwargs=True),
    ]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def rehearse_units(
    lm: LanguageModel, group: TaskGroup, units: Sequence[Unit], phase: Phase, most: int, announce: Callable[[str], None]
) -> tuple[list[PassCount], int]:
    """Return the passes of every unit, and how many units were rehearsed.

    Units are of one kind that have as many samples of Gate A: there are three kinds at most, all, some and none. Where a kind
    has more evaluations than ``most``, only its largest unit is rehearsed, and the others count as much.

    Args:
        group: with token ids of the stand-in.
        announce: takes a unit's key before it is rehearsed.
    """
    conditions, samples = group.conditions, group.samples
    gate_a = conditions[0].config.eval.gate_a_samples
    lengths_on, lengths_off = [len(s.teacher_ids) for s in samples.on], [len(prompt.token_ids) for prompt in samples.off]

    def checked(unit: Unit) -> int:
        return sum(i < gate_a for i in unit.on)

    def size(unit: Unit) -> int:
        return sum(lengths_on[i] for i in unit.on) + sum(lengths_off[j] for j in unit.off)

    def rehearse(unit: Unit) -> PassCount:
        announce(unit.key)
        with counting(lm.model) as count:
            for _, records in run_units(lm, conditions, samples, [unit], phase, count.enter):
                count.record_bytes = sum(len(json.dumps(own, separators=(",", ":"))) for own in records.values())
        return count

    counts: dict[str, PassCount] = {}
    rehearsed = 0
    kinds: dict[int, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(checked(unit), []).append(unit)
    for kind in kinds.values():
        if sum(evaluations(conditions, unit, phase, samples.on) for unit in kind) <= most:
            counts |= {unit.key: rehearse(unit) for unit in kind}
            rehearsed += len(kind)
        else:
            largest = rehearse(max(kind, key=size))
            counts |= {unit.key: replace(largest) for unit in kind}
            rehearsed += 1
    return [counts[unit.key] for unit in units], rehearsed


def rehearse_fit(lm: LanguageModel, configs: Sequence[Phase2Config], samples: Sequence[OnSample]) -> int:
    """Return how many tokens go through the model to fit weights of attention heads on held-out samples."""
    with counting(lm.model) as count:
        for score in fitted_scores(configs):
            fit(lm, configs, samples, "", score)
    return count.stages.total()
