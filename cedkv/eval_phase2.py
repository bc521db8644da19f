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

from cedkv import arms, selectors
from cedkv.config import Phase2Config
from cedkv.digest import generator
from cedkv.errors import ConfigError
from cedkv.lm.cache import PrefixBatch
from cedkv.lm.scoring import kl, next_token_logprobs
from cedkv.lm.source import LanguageModel
from cedkv.plumbing import PlumbingInput, measure, snapshot
from cedkv.records import off_record, on_record, plumbing_records, repro_record, selection_record
from cedkv.samples.load import Samples
from cedkv.types import OffSample, Record

Phase = Literal["1.5", "2"]
Step = Callable[[str, int], None]
"""Called before an arm is computed, with the arm's name and the number of evaluations (sample x arm) it makes."""


@dataclass(frozen=True)
class Unit:
    """A batch of ON samples with the OFF prompts that run under their states; ``repeat`` 0 is the run itself."""

    key: str
    on: tuple[int, ...]
    off: tuple[int, ...]
    repeat: int


@dataclass(frozen=True)
class Condition:
    """One way of making and injecting prefixes. Conditions of a run differ in that alone: model and samples are the same."""

    key: str
    config: Phase2Config


def plan(conditions: Sequence[Condition], n_on: int, n_off: int, phase: Phase) -> list[Unit]:
    """The units of a run: its samples in batches, then the repeats for ``repro_tolerance`` in other batches.

    OFF prompt j runs under the state of ON sample ``j mod n_on``. Phase 1.5 has no OFF prompts.

    Raises:
        ConfigError: partners (2i, 2i + 1) are asked for and cannot be in one batch.
    """
    config = conditions[0].config
    size = config.runtime.batch_size
    groups = _groups(conditions, n_on)
    units: list[Unit] = []
    for chunk in _chunks(groups, size):
        there = set(chunk)
        off = tuple(j for j in range(n_off) if j % n_on in there) if phase == "2" else ()
        units.append(Unit(f"main/{len(units):05d}", chunk, off, 0))
    for repeat in range(1, config.eval.repro_runs):
        order = generator(config.seed, "repro_order", repeat, "").permutation(len(groups)).tolist()
        # another order and batch size: results must not depend on the company
        chunks = _chunks([groups[i] for i in order], max(1, size - repeat))
        units += [Unit(f"repro-{repeat}/{i:05d}", chunk, (), repeat) for i, chunk in enumerate(chunks)]
    return units


def evaluations(conditions: Sequence[Condition], unit: Unit, phase: Phase) -> int:
    """How many (sample, arm) evaluations a unit reports to its step function."""
    n, n_off = len(unit.on), len(unit.off)
    shared = n * (1 + ("other_attention" in arms.wanted([c.config for c in conditions])))
    if unit.repeat:
        return shared + n * len(conditions)
    shared += n + n_off
    if phase == "2":
        keys = {arms.random_key(c.config, t) for c in conditions for t in range(c.config.eval.n_random_trials)}
        shared += n * len(keys)
    plumbed = sum(i < conditions[0].config.eval.gate_a_samples for i in unit.on)
    return shared + len(conditions) * (n + n_off + plumbed)


def run(
    lm: LanguageModel, conditions: Sequence[Condition], samples: Samples, units: Sequence[Unit], phase: Phase, step: Step
) -> Iterator[tuple[Unit, dict[str, list[Record]]]]:
    """Execute units in order; each gives the records of every condition, by its key."""
    for unit in units:
        yield unit, _execute(lm, conditions, samples, unit, phase, step)


def _execute(
    lm: LanguageModel, conditions: Sequence[Condition], samples: Samples, unit: Unit, phase: Phase, step: Step
) -> dict[str, list[Record]]:
    on = [samples.on[i] for i in unit.on]
    plumbed = [row for row, i in enumerate(unit.on) if i < conditions[0].config.eval.gate_a_samples and not unit.repeat]
    partners = [_partner(unit, i, len(samples.on)) for i in unit.on] if _paired(conditions) else None
    again = f"repeat {unit.repeat}: " if unit.repeat else ""

    def announce(arm: str, n: int) -> None:
        step(f"{again}{arm}", n)

    batch = arms.read(lm, [c.config for c in conditions], on, partners, bool(plumbed), announce)
    if unit.repeat:
        return {c.key: _repeat(batch, c.config, unit.repeat, announce) for c in conditions}
    announce("base", len(on))
    base = next_token_logprobs(lm, [s.base_ids for s in on], batch.names)
    off = [samples.off[j] for j in unit.off]
    rows = [unit.on.index(j % len(samples.on)) for j in unit.off]
    alone = _off_alone(lm, off, announce)
    found = {}
    for condition in conditions:
        config = condition.config
        known = arms.evidence(batch, config)
        announce("select", len(on))
        state = arms.student(batch, config, known, config.select.mode, "select", 0)
        untouched = _snapshots(batch, state, plumbed)
        answers = arms.answer(batch, config, state)
        records = _off(batch, config, off, rows, alone, state, announce)
        trials = range(config.eval.n_random_trials if phase == "2" else 0)
        drawn = [arms.random_answer(batch, config, known, trial, announce) for trial in trials]
        if plumbed:
            announce("gate A", len(plumbed))
            given = _plumbing_input(batch, config, plumbed, base, answers, state, untouched)
            records += plumbing_records(given.names, measure(lm, config, given))
        topk = config.reporting.topk_tokens
        for row, sample in enumerate(on):
            by_arm = {"base": base[row], "teacher": batch.reading.logprobs[row], "select": answers[row]}
            chosen, random = state.selections[row], [logprobs[row] for _, _, logprobs in drawn]
            records.append(on_record(sample, by_arm, random, known[row], chosen, config.select.span_len, lm.tokenizer, topk))
            random_states = [(selections[row], placements[row]) for selections, placements, _ in drawn]
            records.append(
                selection_record(sample, state.owners[row], known[row], chosen, state.placements[row], random_states)
            )
        found[condition.key] = records
    return found


def _repeat(batch: arms.Batch, config: Phase2Config, repeat: int, announce: Step) -> list[Record]:
    announce("select", len(batch.samples))
    state = arms.student(batch, config, arms.evidence(batch, config), config.select.mode, "select", 0)
    answers = arms.answer(batch, config, state)
    return [repro_record(repeat, sample, answers[row]) for row, sample in enumerate(batch.samples)]


def _off_alone(lm: LanguageModel, off: Sequence[OffSample], announce: Step) -> torch.Tensor | None:
    if not off:
        return None
    announce("OFF base", len(off))
    return next_token_logprobs(lm, [u.token_ids for u in off], [u.sample_id for u in off])


def _off(
    batch: arms.Batch,
    config: Phase2Config,
    off: Sequence[OffSample],
    rows: Sequence[int],
    alone: torch.Tensor | None,
    state: arms.Student,
    announce: Step,
) -> list[Record]:
    """OFF prompts under the select arm's states; prefixes are picked out batch by batch, not all at once."""
    lm, records = batch.lm, []
    injection = lm.injection_layers(config.layer_scope.injection)
    if alone is not None:
        announce("OFF select", len(off))
        for at in range(0, len(off), lm.batch_size):
            part, states = off[at : at + lm.batch_size], list(rows[at : at + lm.batch_size])
            ids, names = [u.student_ids for u in part], [u.sample_id for u in part]
            under = next_token_logprobs(lm, ids, names, state.prefix.rows(states), injection)
            deltas = kl(under, alone[at : at + lm.batch_size]).tolist()
            for i, (sample, row) in enumerate(zip(part, states, strict=True)):
                records.append(off_record(sample, batch.names[row], alone[at + i], under[i], deltas[i]))
    return records


def _paired(conditions: Sequence[Condition]) -> bool:
    return any(selectors.uses_partner(c.config.select.mode) for c in conditions)


def _partner(unit: Unit, index: int, n_on: int) -> int:
    """Row of the sample's partner: 2i and 2i + 1 are partners, a last one without takes the one before it."""
    other = index ^ 1 if (index ^ 1) < n_on else index - 1
    return unit.on.index(other)


def _groups(conditions: Sequence[Condition], n_on: int) -> list[tuple[int, ...]]:
    """Samples that must share a batch: each alone, or partners together."""
    if not _paired(conditions):
        return [(i,) for i in range(n_on)]
    batch_size = conditions[0].config.runtime.batch_size
    if n_on < 2 or batch_size < 2:
        raise ConfigError(
            f"wrong_demo takes the prefix of another sample in the same batch: runtime.batch_size = {batch_size} and "
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


def _snapshots(batch: arms.Batch, state: arms.Student, rows: list[int]) -> list[PrefixBatch]:
    """Copies of what later passes read from, the demos' caches and the prefixes, before anything has read from them."""
    if not rows or batch.reading.demo is None:
        return []
    demos = batch.once("untouched demos", lambda: snapshot(batch.reading.demo.rows(rows)))  # type: ignore[union-attr]
    return [demos, snapshot(state.prefix.rows(rows))]


def _plumbing_input(
    batch: arms.Batch,
    config: Phase2Config,
    rows: list[int],
    base: torch.Tensor,
    answers: torch.Tensor,
    state: arms.Student,
    untouched: list[PrefixBatch],
) -> PlumbingInput:
    if batch.reading.demo is None:
        raise ValueError("the plumbing checks need the teacher's cache")
    return PlumbingInput(
        samples=[batch.samples[row] for row in rows],
        owners=[state.owners[row] for row in rows],
        base=base[rows],
        teacher=batch.reading.logprobs[rows],
        select=answers[rows],
        demo=batch.reading.demo.rows(rows),
        offsets=[batch.reading.offsets[row] for row in rows],
        placements=[state.placements[row] for row in rows],
        prefix=state.prefix.rows(rows),
        untouched=untouched,
        once=batch.once,
    )
