"""Plan a run: independent units of work, each a batch of ON samples with its OFF prompts and a stable key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cedkv.conditions import Condition, in_task
from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.values import OnSample
from cedkv.inference.context_window import arm_uses
from cedkv.inference.passes import needed_evidence, plan_passes
from cedkv.inference.quality import judging_evaluations
from cedkv.selectors.base import candidates, create, selector_class
from cedkv.tasks.load import Samples
from cedkv.tasks.pairing import off_owner, partner

UNIT, UNIT_OFF, UNIT_TOKENS, UNIT_FURTHER = 32, 128, 32_768, 1024
"""Largest unit of ``fixed_size``: ON samples, OFF prompts, slots and tokens, and tokens of base's own answers to OFF prompts,
after each of which the logits of the whole vocabulary are kept."""
NOT_DRAWN_BY = {
    "mode", "params", "query_window", "row_pooling", "head_pooling", "layer_pooling", "pooling_kernel", "value_weighting",
    "null_query", "causal_drop_advisory",
}  # fmt: skip
"""Keys of ``select`` that random trials do not depend on."""


@dataclass(frozen=True)
class Unit:
    """A batch of ON samples with the OFF prompts that run under their prefixes, and the repetitions for ``repro_tolerance``.

    on, off: indices of the unit's ON samples and OFF prompts.
    """

    key: str
    on: tuple[int, ...]
    off: tuple[int, ...]


def fixed_size(conditions: Sequence[Condition], n_on: int, n_off: int, longest: int = 1) -> int:
    """Return how many ON samples a unit has at most: the batch size, or, where that is ``auto``, what fits on any device.

    Args:
        n_on, n_off: numbers of ON samples and OFF prompts.
        longest: slots and tokens of the longest prompt; the longer, the smaller the units, so that memory stays bounded.

    Raises:
        ConfigError: as ``batch_groups``.
    """
    config = conditions[0].config
    if config.rows_per_pass is not None:
        return config.rows_per_pass
    most_off = min(UNIT_OFF, UNIT_FURTHER // max(1, config.eval.off_tokens))
    return max(smallest_unit(conditions, n_on), min(UNIT, UNIT_TOKENS // longest, most_off * n_on // max(1, n_off)))


def plan(conditions: Sequence[Condition], n_on: int, n_off: int, phase: Phase, size: int, task: str = "") -> list[Unit]:
    """Return the units of a run: its samples in batches.

    An OFF prompt is in the unit of the ON sample that it runs under (``off_owner``). Phase 1.5 has no OFF prompts.

    Args:
        n_on, n_off: numbers of ON samples and OFF prompts.
        size: ON samples of a unit, at most.
        task: of these samples, in a run of several tasks (``by_task``): part of the units' keys.

    Raises:
        ConfigError: as ``batch_groups``.
    """
    units: list[Unit] = []
    for on in join_groups(batch_groups(conditions, n_on), size):
        owners = set(on)
        off = tuple(j for j in range(n_off) if off_owner(j, n_on) in owners) if phase == "2" else ()
        units.append(Unit(in_task(task, f"unit/{len(units):05d}"), on, off))
    return units


def plan_samples(
    conditions: Sequence[Condition], samples: Samples, phase: Phase, task: str = "", size: int | None = None
) -> list[Unit]:
    """Return the units of a run on these samples, of their ``fixed_size`` where ``size`` is None; see ``plan``."""
    n_on, n_off = len(samples.on), len(samples.off)
    size = fixed_size(conditions, n_on, n_off, longest_prompt(conditions, samples, phase)) if size is None else size
    return plan(conditions, n_on, n_off, phase, size, task)


def longest_prompt(conditions: Sequence[Condition], samples: Samples, phase: Phase) -> int:
    """Return the slots and tokens of the longest prompt of any arm."""
    return max(use.length for c in conditions for use in arm_uses(c.config, samples, phase, None))


def evaluations(conditions: Sequence[Condition], unit: Unit, phase: Phase, on: Sequence[OnSample]) -> int:
    """Return how many (sample, arm) evaluations a unit reports to its step function, which are all that it computes at most.

    Selections that conditions turn out to have in common are reported for each of them, and computed once.

    Args:
        on: all ON samples of the run.
    """
    n, n_off, sizes = len(unit.on), len(unit.off), conditions[0].config.eval
    evidence = evidence_evaluations([c.config for c in conditions], [on[i] for i in unit.on])
    shared = n + sum(evidence.values()) + n + n_off  # teacher, evidence, base, OFF prompts alone
    if phase == "2":
        shared += n * sizes.n_random_trials * len(with_own_trials(conditions))
    gate_a = sum(i < sizes.gate_a_samples for i in unit.on)
    repeated = (sizes.repro_runs - 1) * n * len(conditions)
    shared += judging_evaluations([c.config for c in conditions], n)
    return shared + len(conditions) * (n + n_off + gate_a) + repeated


def evidence_rows(needed: frozenset[str], config: Phase2Config, sample: OnSample) -> dict[tuple[Any, ...], int]:
    """Return how many rows go through the model for evidence about one sample, beyond the teacher's own.

    Args:
        needed: of ``needed_evidence``.

    Returns:
        Name of the evidence, then all settings that it depends on -> rows. Conditions that agree in this key share them.
    """
    rows: dict[tuple[Any, ...], int] = {}
    passes, select = plan_passes([config]), config.select
    for name, read in (("other query", passes.other), ("null query", passes.null), ("replay", passes.replay)):
        if read:
            rows[name,] = 1
    if "causal_drop" in needed:
        rows["causal drop", select.span_len, select.center_policy] = len(candidates(sample.token_kinds, select))
    if "answer_odds" in needed:
        rows["masked answers", select.mode, repr(select.params), select.span_len] = create(select).rows_at_most(0, select)
    if "divergence" in needed:
        spans = len(candidates(sample.token_kinds, select))
        blocks = (select.model_dump_json(), *map(repr, (config.prefix, config.injection, config.layer_scope)))
        rows["tried selections", *blocks] = create(select).rows_at_most(spans, select)
    return rows


def evidence_evaluations(configs: Sequence[Phase2Config], samples: Sequence[OnSample]) -> Counter[str]:
    """Return the rows of ``evidence_rows`` by name, over all samples; those that configurations share count once."""
    needs = [(needed_evidence([config]), config) for config in configs]
    total: Counter[str] = Counter()
    for sample in samples:
        distinct: dict[tuple[Any, ...], int] = {}
        for needed, config in needs:
            distinct |= evidence_rows(needed, config, sample)
        for (name, *_), rows in distinct.items():
            total[name] += rows
    return total


def with_own_trials(conditions: Sequence[Condition]) -> list[Condition]:
    """Return the first of all conditions that draw and run the same random trials; the others find them done."""
    first: dict[tuple[Any, ...], Condition] = {}
    for condition in conditions:
        config = condition.config
        blocks = (config.select.model_dump_json(exclude=NOT_DRAWN_BY), *map(repr, (config.prefix, config.injection)))
        first.setdefault((config.seed, config.prefix_len, str(config.layer_scope.injection), *blocks), condition)
    return list(first.values())


def uses_partners(conditions: Sequence[Condition]) -> bool:
    """Return whether a condition's selector gives a sample the prefix of its partner."""
    return any(selector_class(c.config.select.mode).uses_partner for c in conditions)


def partner_rows(conditions: Sequence[Condition], on: Sequence[int], n_on: int) -> list[int] | None:
    """Return for each sample the row of its partner (``pairing.partner``); None where no condition uses partners."""
    if not uses_partners(conditions):
        return None
    return [on.index(partner(i, n_on)) for i in on]


def smallest_unit(conditions: Sequence[Condition], n_on: int) -> int:
    """Return the fewest ON samples that a unit can be made of, the first group's. Raises ConfigError as ``batch_groups``."""
    return len(batch_groups(conditions, n_on)[0])


def batch_groups(conditions: Sequence[Condition], n_on: int) -> list[tuple[int, ...]]:
    """Return the groups of samples that must share a batch: each sample alone, or partners together.

    Raises:
        ConfigError: a selector uses partners (2i, 2i + 1), and they cannot be in one batch.
    """
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
