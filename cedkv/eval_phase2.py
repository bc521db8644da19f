"""The engine: the only loop over samples and arms, used by every entry point.

It first *plans*: independent units of work, each with a stable key. Executing a unit has no side effect but its records,
so units can be repeated, resumed or spread without changing a figure. Within a unit the arms go one after the other,
each as full batches; peak memory is that of one batch, whatever the number of samples. A run may have several conditions:
what they share (base, teacher, the OFF prompts alone, random arms under the same settings) is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cedkv import selectors
from cedkv.checks.consistency import measure, snapshot
from cedkv.checks.reference import CheckInputs, once_more
from cedkv.conditions import Condition
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, OffSample, Record
from cedkv.inference import student
from cedkv.inference.forward import kl, next_token_logprobs
from cedkv.kv.cache import KVPrefix
from cedkv.models.loading import LanguageModel
from cedkv.records import answers, off_record, on_record, plumbing_records, repro_record, selection_record
from cedkv.tasks.load import Samples

Phase = Literal["1.5", "2"]
Step = Callable[[str, int], None]
"""Called before an arm is computed, with the arm's name and the number of evaluations (sample x arm) it makes."""


UNIT, UNIT_OFF, UNIT_TOKENS = 32, 128, 32_768
"""ON samples of a unit at most, its OFF prompts, and its tokens of demo and query, where the batch size is automatic."""
OFF_ALONE = 4
"""OFF prompts of a unit that Gate A runs once more alone: a row each, which is dear."""


@dataclass(frozen=True)
class Unit:
    """A batch of ON samples with the OFF prompts that run under their states, repetitions for ``repro_tolerance`` included."""

    key: str
    on: tuple[int, ...]
    off: tuple[int, ...]


def plan(conditions: Sequence[Condition], n_on: int, n_off: int, phase: Phase, longest: int = 1) -> list[Unit]:
    """The units of a run: its samples in batches.

    OFF prompt j runs under the state of ON sample ``j mod n_on``. Phase 1.5 has no OFF prompts.

    Args:
        longest: tokens of the longest demo + query; long ones make smaller units, so that memory stays bounded.

    Raises:
        ConfigError: partners (2i, 2i + 1) are asked for and cannot be in one batch.
    """
    groups = _groups(conditions, n_on)
    size = conditions[0].config.rows_per_pass
    if size is None:
        size = max(len(groups[0]), min(UNIT, UNIT_TOKENS // longest, UNIT_OFF * n_on // max(1, n_off)))
    units: list[Unit] = []
    for chunk in _chunks(groups, size):
        there = set(chunk)
        off = tuple(j for j in range(n_off) if j % n_on in there) if phase == "2" else ()
        units.append(Unit(f"unit/{len(units):05d}", chunk, off))
    return units


def plan_samples(conditions: Sequence[Condition], samples: Samples, phase: Phase) -> list[Unit]:
    """``plan`` for samples that are there."""
    return plan(conditions, len(samples.on), len(samples.off), phase, max(len(s.teacher_ids) for s in samples.on))


def evaluations(conditions: Sequence[Condition], unit: Unit, phase: Phase) -> int:
    """How many (sample, arm) evaluations a unit reports to its step function."""
    n, n_off, sizes = len(unit.on), len(unit.off), conditions[0].config.eval
    teacher = n * (1 + ("other_attention" in student.wanted([c.config for c in conditions])))
    shared = teacher + n + n_off
    if phase == "2":
        keys = {student.random_key(c.config, t) for c in conditions for t in range(c.config.eval.n_random_trials)}
        shared += n * len(keys)
    plumbed = sum(i < sizes.gate_a_samples for i in unit.on)
    repeated = (sizes.repro_runs - 1) * (teacher + n * len(conditions))
    return shared + len(conditions) * (n + n_off + plumbed) + repeated


def run(
    lm: LanguageModel, conditions: Sequence[Condition], samples: Samples, units: Sequence[Unit], phase: Phase, step: Step
) -> Iterator[tuple[Unit, dict[str, list[Record]]]]:
    """Execute units in order; each gives the records of every condition, by its key."""
    for unit in units:
        yield unit, _execute(lm, conditions, samples, unit, phase, step)


def _execute(
    lm: LanguageModel, conditions: Sequence[Condition], samples: Samples, unit: Unit, phase: Phase, step: Step
) -> dict[str, list[Record]]:
    sizes = conditions[0].config.eval
    on = [samples.on[i] for i in unit.on]
    plumbed = [row for row, i in enumerate(unit.on) if i < sizes.gate_a_samples]
    batch = student.read(lm, [c.config for c in conditions], on, _partners(conditions, unit.on, len(samples.on)), step, plumbed)
    step("base", len(on))
    base = next_token_logprobs(lm, [s.base_ids for s in on], batch.names)
    off = [samples.off[j] for j in unit.off]
    owners = [unit.on.index(j % len(samples.on)) for j in unit.off]
    if off:
        step("OFF base", len(off))
    alone = next_token_logprobs(lm, [u.token_ids for u in off], [u.sample_id for u in off]) if off else None
    found = {}
    step("select", len(on))
    for condition, (known, state) in zip(conditions, student.students(batch, [c.config for c in conditions]), strict=True):
        config = condition.config
        if condition is not conditions[0]:
            step("select", len(on))
        untouched = _snapshots(batch, state, plumbed)
        select = student.answer(batch, config, state.prefix)
        records: list[Record] = []
        under = None
        if alone is not None:
            step("OFF select", len(off))
            under = _off(batch, config, off, owners, state)
            records += _off_records(batch, off, owners, alone, under)
        trials = range(config.eval.n_random_trials if phase == "2" else 0)
        drawn = [student.random_answer(batch, config, known, trial, step) for trial in trials]
        if plumbed:
            step("gate A", len(plumbed))
            moved = [] if under is None else _off_of_each(unit, len(samples.on), off, under, plumbed)
            given = _plumbing_input(batch, plumbed, base, select, known, state, moved, untouched)
            records += plumbing_records(given.names, {**measure(lm, config, given), **once_more(lm, config, given)})
        by_arm = {"base": base, "teacher": batch.reading.logprobs, "select": select}
        randoms = [logprobs for _, logprobs in drawn]
        measured = answers(by_arm, randoms, [s.answer_token_id for s in on], lm.tokenizer, config.reporting.topk_tokens)
        for row, sample in enumerate(on):
            chosen, placed = state.choice.selections[row], state.choice.placements[row]
            records.append(on_record(sample, measured[row], known[row], chosen, config.select.span_len))
            random_states = [(choice.selections[row], choice.placements[row]) for choice, _ in drawn]
            records[-1]["random_same"] = [selection.kept_tokens == chosen.kept_tokens for selection, _ in random_states]
            owner = on[state.owners[row]]
            records.append(selection_record(sample, owner, known[row], chosen, placed, random_states))
        found[condition.key] = records
    for repeat in range(1, sizes.repro_runs):
        for key, records in _repeat(batch, conditions, unit, len(samples.on), repeat, step).items():
            found[key] += records
    return found


def _repeat(
    batch: student.Batch, conditions: Sequence[Condition], unit: Unit, n_on: int, repeat: int, step: Step
) -> dict[str, list[Record]]:
    """Teacher, selection and select arm once more, in two batches dealt anew: results must not depend on the company.

    Causal drops are taken from the run itself: they are many passes a sample, and batches of their own.
    """
    groups = _groups(conditions, len(unit.on)) if _paired(conditions) else [(row,) for row in range(len(unit.on))]
    order = rng_for(conditions[0].config.seed, "repro_order", repeat, unit.key).permutation(len(groups)).tolist()
    found: dict[str, list[Record]] = {condition.key: [] for condition in conditions}
    for rows in _chunks([groups[i] for i in order], max(len(groups[0]), -(-len(unit.on) // 2))):
        ids = [unit.on[row] for row in rows]

        def announce(arm: str, n: int) -> None:
            step(f"repeat {repeat}: {arm}", n)

        samples = [batch.samples[row] for row in rows]
        configs = [condition.config for condition in conditions]
        again = student.read(batch.lm, configs, samples, _partners(conditions, ids, n_on), announce, drops=batch.drops)
        announce("select", len(samples) * len(conditions))
        for condition, (_, state) in zip(conditions, student.students(again, configs), strict=True):
            select = student.answer(again, condition.config, state.prefix)
            found[condition.key] += [repro_record(repeat, s, select[row]) for row, s in enumerate(samples)]
    return found


def _off(
    batch: student.Batch, config: Phase2Config, off: Sequence[OffSample], owners: Sequence[int], state: student.Student
) -> torch.Tensor:
    """(OFF prompts, vocabulary) log-probabilities under the select arm's states."""
    injection = batch.lm.injection_layers(config.layer_scope.injection)
    ids, names = [u.student_ids for u in off], [u.sample_id for u in off]
    return next_token_logprobs(batch.lm, ids, names, state.prefix, injection, owners)


def _off_records(
    batch: student.Batch, off: Sequence[OffSample], owners: Sequence[int], alone: torch.Tensor, under: torch.Tensor
) -> list[Record]:
    deltas, before, after = kl(under, alone).tolist(), alone.argmax(dim=1).tolist(), under.argmax(dim=1).tolist()
    return [off_record(sample, batch.names[owners[i]], before[i], after[i], deltas[i]) for i, sample in enumerate(off)]


def _off_of_each(
    unit: Unit, n_on: int, off: Sequence[OffSample], under: torch.Tensor, rows: Sequence[int]
) -> list[tuple[int, OffSample, torch.Tensor]]:
    """For the first ``OFF_ALONE`` rows the first OFF prompt that runs under the state, if there is one, and its answer."""
    found = []
    for at, row in enumerate(rows[:OFF_ALONE]):
        mine = [i for i, j in enumerate(unit.off) if j % n_on == unit.on[row]]
        found += [(at, off[i], under[i]) for i in mine[:1]]
    return found


def _paired(conditions: Sequence[Condition]) -> bool:
    return any(selectors.uses_partner(c.config.select.mode) for c in conditions)


def _partners(conditions: Sequence[Condition], on: Sequence[int], n_on: int) -> list[int] | None:
    """For each sample the row of its partner: 2i and 2i + 1 are partners, a last one without takes the one before it."""
    if not _paired(conditions):
        return None
    return [on.index(i ^ 1 if (i ^ 1) < n_on else i - 1) for i in on]


def _groups(conditions: Sequence[Condition], n_on: int) -> list[tuple[int, ...]]:
    """Samples that must share a batch: each alone, or partners together."""
    if not _paired(conditions):
        return [(i,) for i in range(n_on)]
    rows = conditions[0].config.rows_per_pass or UNIT
    if n_on < 2 or rows < 2:
        raise ConfigError(
            f"wrong_demo takes the prefix of another sample in the same batch: runtime.batch_size = {rows} and "
            f"eval.on_samples = {n_on} must both be at least 2"
        )
    pairs: list[tuple[int, ...]] = [(i, i + 1) for i in range(0, n_on - 1, 2)]
    return pairs if n_on % 2 == 0 else [*pairs[:-1], (n_on - 3, n_on - 2, n_on - 1)]


def _chunks(groups: Sequence[tuple[int, ...]], size: int) -> list[tuple[int, ...]]:
    """Groups put together to batches of at most ``size``; a group is never split."""
    chunks: list[tuple[int, ...]] = []
    for group in groups:
        if chunks and len(chunks[-1]) + len(group) <= size:
            chunks[-1] += group
        else:
            chunks.append(group)
    return chunks


def _snapshots(batch: student.Batch, state: student.Student, rows: list[int]) -> list[KVPrefix]:
    """Copies of what later passes read from, the demos' caches and the prefixes, before anything has read from them."""
    if not rows:
        return []
    demos = batch.cached("untouched demos", lambda: snapshot(batch.reading.demo_prefixes(rows)))
    return [demos, snapshot(state.prefix.rows(rows))]


def _plumbing_input(
    batch: student.Batch,
    rows: list[int],
    base: torch.Tensor,
    select: torch.Tensor,
    known: Sequence[Evidence],
    state: student.Student,
    off: Sequence[tuple[int, OffSample, torch.Tensor]],
    untouched: list[KVPrefix],
) -> CheckInputs:
    owners = [state.owners[row] for row in rows]
    return CheckInputs(
        samples=[batch.samples[row] for row in rows],
        owners=[batch.samples[owner] for owner in owners],
        base=base[rows],
        teacher=batch.reading.logprobs[rows],
        select=select[rows],
        demo=batch.reading.demo_prefixes(rows),
        selections=[state.choice.selections[row] for row in rows],
        evidence=[known[owner] for owner in owners],
        placements=[state.choice.placements[row] for row in rows],
        prefix=state.prefix.rows(rows),
        off=off,
        layers=frozenset(batch.reading.layers),
        window=max(read.shape[1] for read in batch.reading.rows),
        untouched=untouched,
        cached=batch.cached,
    )
