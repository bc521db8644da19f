"""Plan a run: independent units of work, each a batch of ON samples with its OFF prompts and a stable key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cedkv.conditions import Condition
from cedkv.config.options import Phase
from cedkv.core.errors import ConfigError
from cedkv.inference.passes import plan_passes
from cedkv.inference.student import random_key
from cedkv.selectors.base import selector_class
from cedkv.tasks.load import Samples

UNIT, UNIT_OFF, UNIT_TOKENS = 32, 128, 32_768
"""Largest unit where the batch size is ``auto``: ON samples, OFF prompts, and tokens of demo + query."""


@dataclass(frozen=True)
class Unit:
    """A batch of ON samples with the OFF prompts that run under their prefixes, and the repetitions for ``repro_tolerance``.

    on, off: indices of the unit's ON samples and OFF prompts.
    """

    key: str
    on: tuple[int, ...]
    off: tuple[int, ...]


def plan(conditions: Sequence[Condition], n_on: int, n_off: int, phase: Phase, longest: int = 1) -> list[Unit]:
    """Return the units of a run: its samples in batches.

    OFF prompt j runs under the prefix of ON sample ``j mod n_on``. Phase 1.5 has no OFF prompts.

    Args:
        n_on, n_off: numbers of ON samples and OFF prompts.
        longest: tokens of the longest demo + query; the longer, the smaller the units, so that memory stays bounded.

    Raises:
        ConfigError: a selector uses partners (2i, 2i + 1), and they cannot be in one batch.
    """
    groups = batch_groups(conditions, n_on)
    size = conditions[0].config.rows_per_pass
    if size is None:
        size = max(len(groups[0]), min(UNIT, UNIT_TOKENS // longest, UNIT_OFF * n_on // max(1, n_off)))
    units: list[Unit] = []
    for on in join_groups(groups, size):
        owners = set(on)
        off = tuple(j for j in range(n_off) if j % n_on in owners) if phase == "2" else ()
        units.append(Unit(f"unit/{len(units):05d}", on, off))
    return units


def plan_samples(conditions: Sequence[Condition], samples: Samples, phase: Phase) -> list[Unit]:
    """Return the units of a run on these samples; see ``plan``."""
    return plan(conditions, len(samples.on), len(samples.off), phase, max(len(s.teacher_ids) for s in samples.on))


def evaluations(conditions: Sequence[Condition], unit: Unit, phase: Phase) -> int:
    """Return how many (sample, arm) evaluations a unit reports to its step function."""
    n, n_off, sizes = len(unit.on), len(unit.off), conditions[0].config.eval
    teacher = n * (1 + plan_passes([c.config for c in conditions]).extra)
    shared = teacher + n + n_off
    if phase == "2":
        keys = {random_key(c.config, t) for c in conditions for t in range(c.config.eval.n_random_trials)}
        shared += n * len(keys)
    gate_a = sum(i < sizes.gate_a_samples for i in unit.on)
    repeated = (sizes.repro_runs - 1) * (teacher + n * len(conditions))
    return shared + len(conditions) * (n + n_off + gate_a) + repeated


def uses_partners(conditions: Sequence[Condition]) -> bool:
    """Return whether a condition's selector gives a sample the prefix of its partner."""
    return any(selector_class(c.config.select.mode).uses_partner for c in conditions)


def partner_rows(conditions: Sequence[Condition], on: Sequence[int], n_on: int) -> list[int] | None:
    """Return for each sample the row of its partner; None where no condition uses partners.

    Samples 2i and 2i + 1 are partners; where the number of samples is odd, the last one takes the one before it.
    """
    if not uses_partners(conditions):
        return None
    return [on.index(i ^ 1 if (i ^ 1) < n_on else i - 1) for i in on]


def batch_groups(conditions: Sequence[Condition], n_on: int) -> list[tuple[int, ...]]:
    """Return the groups of samples that must share a batch: each sample alone, or partners together."""
    if not uses_partners(conditions):
        return [(i,) for i in range(n_on)]
    batch_size = conditions[0].config.runtime.batch_size
    if n_on < 2 or batch_size == 1:
        modes = dict.fromkeys(c.config.select.mode for c in conditions if selector_class(c.config.select.mode).uses_partner)
        raise ConfigError(
            f"{', '.join(modes)} takes the prefix of another sample in the same batch: runtime.batch_size = {batch_size} and "
            f"{n_on} ON samples, which must both be at least 2"
        )
    pairs: list[tuple[int, ...]] = [(i, i + 1) for i in range(0, n_on - 1, 2)]
    return pairs if n_on % 2 == 0 else [*pairs[:-1], (n_on - 3, n_on - 2, n_on - 1)]


def join_groups(groups: Sequence[tuple[int, ...]], size: int) -> list[tuple[int, ...]]:
    """Join groups to batches of at most ``size`` samples; a group is never split."""
    batches: list[tuple[int, ...]] = []
    for group in groups:
        if batches and len(batches[-1]) + len(group) <= size:
            batches[-1] += group
        else:
            batches.append(group)
    return batches
