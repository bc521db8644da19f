"""The engine: the only loop over samples and arms, used by every entry point.

It first *plans*: independent units of work, each with a stable key. Executing a unit has no side effect but its records,
so units can be repeated, resumed or spread without changing a figure. Within a unit the arms go one after the other,
each as full batches; peak memory is that of one batch, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cedkv.config import Phase2Config
from cedkv.digest import generator
from cedkv.errors import DataError
from cedkv.lm.cache import PrefixBatch
from cedkv.lm.prefix import encode
from cedkv.lm.scoring import TeacherReading, kl, next_token_logprobs, read_teacher
from cedkv.lm.source import LanguageModel
from cedkv.plumbing import PlumbingInput, measure, snapshot
from cedkv.positioning import place
from cedkv.records import off_record, on_record, plumbing_records, repro_record, selection_record
from cedkv.samples.load import Samples
from cedkv.selectors import NEEDS_CAUSAL_DROP, select
from cedkv.selectors.common import SelectionTask, candidates
from cedkv.types import Evidence, OffSample, OnSample, Placement, Record, Selection

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
class Student:
    """The states of B samples under one selector."""

    selections: list[Selection]
    placements: list[Placement]
    prefix: PrefixBatch


def plan(config: Phase2Config, n_on: int, n_off: int, phase: Phase) -> list[Unit]:
    """The units of a run: its samples in batches, then the repeats for ``repro_tolerance`` in other batches.

    OFF prompt j runs under the state of ON sample ``j mod n_on``. Phase 1.5 has no OFF prompts.
    """
    size = config.runtime.batch_size
    units = []
    for at in range(0, n_on, size):
        chunk = tuple(range(at, min(at + size, n_on)))
        off = tuple(j for j in range(n_off) if at <= j % n_on < at + size) if phase == "2" else ()
        units.append(Unit(f"main/{at // size:05d}", chunk, off, 0))
    for repeat in range(1, config.eval.repro_runs):
        order = generator(config.seed, "repro_order", repeat, "").permutation(n_on).tolist()
        other = max(1, size - repeat)  # another batch size and order: results must not depend on the company
        units += [
            Unit(f"repro-{repeat}/{at // other:05d}", tuple(order[at : at + other]), (), repeat) for at in range(0, n_on, other)
        ]
    return units


def evaluations(config: Phase2Config, unit: Unit, phase: Phase) -> int:
    """How many (sample, arm) evaluations a unit reports to its step function."""
    if unit.repeat:
        return 2 * len(unit.on)
    arms = 3 + (config.eval.n_random_trials if phase == "2" else 0)
    return arms * len(unit.on) + 2 * len(unit.off) + sum(i < config.eval.gate_a_samples for i in unit.on)


def run(
    lm: LanguageModel, config: Phase2Config, samples: Samples, units: Sequence[Unit], phase: Phase, step: Step
) -> Iterator[tuple[Unit, list[Record]]]:
    """Execute units in order; each gives its records."""
    for unit in units:
        yield unit, _execute(lm, config, samples, unit, phase, step)


def _execute(lm: LanguageModel, config: Phase2Config, samples: Samples, unit: Unit, phase: Phase, step: Step) -> list[Record]:
    on = [samples.on[i] for i in unit.on]
    plumbed = [row for row, i in enumerate(unit.on) if i < config.eval.gate_a_samples and not unit.repeat]
    again = f"repeat {unit.repeat}: " if unit.repeat else ""
    step(f"{again}teacher", len(on))
    causal = config.select.mode in NEEDS_CAUSAL_DROP or config.select.causal_drop_advisory
    reading = read_teacher(
        lm,
        [s.demo_token_ids for s in on],
        [s.query_token_ids for s in on],
        [s.sample_id for s in on],
        lm.selection_layers,
        config.select.query_window,
        keep_cache=causal or bool(plumbed) or config.prefix.kv_source == "gather",
    )
    evidence = _evidence(lm, config, on, reading, causal)
    step(f"{again}select", len(on))
    student = _student(lm, config, on, reading, evidence, config.select.mode, "select", 0)
    untouched = _snapshots(reading, student, plumbed)
    answers = _answer(lm, on, student)
    if unit.repeat:
        return [repro_record(unit.repeat, sample, answers[row]) for row, sample in enumerate(on)]
    step("base", len(on))
    base = next_token_logprobs(lm, [s.base_ids for s in on], [s.sample_id for s in on])
    off = [samples.off[j] for j in unit.off]
    records = _off(lm, off, [unit.on.index(j % len(samples.on)) for j in unit.off], on, student, step)
    drawn: list[tuple[list[Selection], list[Placement], torch.Tensor]] = []
    for trial in range(config.eval.n_random_trials if phase == "2" else 0):
        step(f"random {trial + 1}/{config.eval.n_random_trials}", len(on))
        random = _student(lm, config, on, reading, evidence, "random_span", "random", trial)
        drawn.append((random.selections, random.placements, _answer(lm, on, random)))
    if plumbed:
        step("gate A", len(plumbed))
        given = _plumbing_input(on, plumbed, base, answers, reading, student, untouched)
        records += plumbing_records(given.names, measure(lm, config, given))
    topk = config.reporting.topk_tokens
    for row, sample in enumerate(on):
        arms = {"base": base[row], "teacher": reading.logprobs[row], "select": answers[row]}
        selected, trials = student.selections[row], [logprobs[row] for _, _, logprobs in drawn]
        records.append(on_record(sample, arms, trials, evidence[row], selected, lm.tokenizer, topk))
        random_states = [(selections[row], placements[row]) for selections, placements, _ in drawn]
        records.append(selection_record(sample, evidence[row], selected, student.placements[row], random_states))
    return records


def _evidence(
    lm: LanguageModel, config: Phase2Config, on: Sequence[OnSample], reading: TeacherReading, causal: bool
) -> list[Evidence]:
    if not causal:
        return [Evidence(attention) for attention in reading.attention]
    return [
        Evidence(attention, _causal_drops(lm, config, sample, reading, row))
        for row, (sample, attention) in enumerate(zip(on, reading.attention, strict=True))
    ]


def _causal_drops(
    lm: LanguageModel, config: Phase2Config, sample: OnSample, reading: TeacherReading, row: int
) -> dict[int, float]:
    """KL(teacher || teacher without the span) for every candidate: the query over the demo's cache with the span masked."""
    if reading.demo is None:
        raise ValueError("causal drops need the teacher's cache")
    found = candidates(sample.token_kinds, config.select)
    drops: dict[int, float] = {}
    for at in range(0, len(found), lm.batch_size):
        batch = found[at : at + lm.batch_size]
        offset = reading.offsets[row]
        hidden = reading.demo.rows([row] * len(batch)).hide([(offset + c.start, offset + c.end) for c in batch])
        without = next_token_logprobs(lm, [sample.query_token_ids] * len(batch), [sample.sample_id] * len(batch), hidden)
        moved = kl(reading.logprobs[row].expand_as(without), without)
        drops.update((c.start, value) for c, value in zip(batch, moved.tolist(), strict=True))
    return drops


def _student(
    lm: LanguageModel,
    config: Phase2Config,
    on: Sequence[OnSample],
    reading: TeacherReading,
    evidence: Sequence[Evidence],
    mode: str,
    purpose: str,
    trial: int,
) -> Student:
    selections, placements = [], []
    for sample, known in zip(on, evidence, strict=True):
        rng = generator(config.seed, purpose, trial, sample.sample_id)
        selection = select(mode, SelectionTask(config.select, sample.token_kinds, known, rng))
        if not selection.spans:
            raise DataError(
                f"sample {sample.sample_id}: {mode} finds no span of select.span_len = {config.select.span_len} tokens in "
                f"its {len(sample.token_kinds)} demo tokens; lower span_len or lengthen the demo"
            )
        selections.append(selection)
        placements.append(
            place(
                selection.kept_tokens,
                len(sample.demo_token_ids),
                config.injection.positioning_mode,
                config.prefix.padding_mode,
                config.prefix_len,
            )
        )
    return Student(selections, placements, encode(lm, config.prefix.kv_source, on, placements, reading))


def _answer(lm: LanguageModel, on: Sequence[OnSample], student: Student) -> torch.Tensor:
    """Log-probabilities (B, vocabulary) after each sample's query, under its state."""
    rows, names = [s.query_token_ids for s in on], [s.sample_id for s in on]
    return next_token_logprobs(lm, rows, names, student.prefix, lm.injection_layers)


def _off(
    lm: LanguageModel,
    off: Sequence[OffSample],
    state_rows: Sequence[int],
    on: Sequence[OnSample],
    student: Student,
    step: Step,
) -> list[Record]:
    """OFF prompts alone and under the select arm's states; only batch by batch, so that memory stays that of a batch."""
    records = []
    for at in range(0, len(off), lm.batch_size):
        batch = off[at : at + lm.batch_size]
        names = [u.sample_id for u in batch]
        rows = list(state_rows[at : at + lm.batch_size])
        step("OFF base", len(batch))
        alone = next_token_logprobs(lm, [u.token_ids for u in batch], names)
        step("OFF select", len(batch))
        under = next_token_logprobs(lm, [u.student_ids for u in batch], names, student.prefix.rows(rows), lm.injection_layers)
        deltas = kl(under, alone).tolist()
        for i, (sample, state) in enumerate(zip(batch, rows, strict=True)):
            records.append(off_record(sample, on[state].sample_id, alone[i], under[i], deltas[i]))
    return records


def _snapshots(reading: TeacherReading, student: Student, rows: list[int]) -> list[PrefixBatch]:
    """Copies of what later passes read from, the demos' caches and the prefixes, before anything has read from them."""
    if not rows or reading.demo is None:
        return []
    return [snapshot(reading.demo.rows(rows)), snapshot(student.prefix.rows(rows))]


def _plumbing_input(
    on: Sequence[OnSample],
    rows: list[int],
    base: torch.Tensor,
    answers: torch.Tensor,
    reading: TeacherReading,
    student: Student,
    untouched: list[PrefixBatch],
) -> PlumbingInput:
    if reading.demo is None:
        raise ValueError("the plumbing checks need the teacher's cache")
    part = TeacherReading(
        reading.logprobs[rows],
        [reading.attention[row] for row in rows],
        reading.demo.rows(rows),
        [reading.offsets[row] for row in rows],
    )
    return PlumbingInput(
        samples=[on[row] for row in rows],
        base=base[rows],
        teacher=part.logprobs,
        select=answers[rows],
        reading=part,
        placements=[student.placements[row] for row in rows],
        prefix=student.prefix.rows(rows),
        untouched=untouched,
    )
