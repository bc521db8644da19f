"""The engine: the only loop over samples and arms, used by every entry point.

It first *plans*: independent units of work, each with a stable key. Executing a unit has no side effect but its records,
so units can be repeated, resumed or spread without changing a figure. Within a unit the arms go one after the other,
each as full batches; peak memory is that of one batch, whatever the number of samples. A run may have several conditions:
what they share (base, teacher, the OFF prompts alone, random arms under the same settings) is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from cedkv.checks.base import CheckInputs, run_checks
from cedkv.checks.consistency import snapshot
from cedkv.conditions import Condition
from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, OffSample, Record
from cedkv.inference import student
from cedkv.inference.forward import kl, next_token_logprobs
from cedkv.kv.cache import KVPrefix
from cedkv.models.loading import LanguageModel
from cedkv.records import answers, off_record, on_record, plumbing_records, repro_record, selection_record
from cedkv.selectors.base import selector_class
from cedkv.tasks.load import Samples

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
    teacher = n * (1 + ("other_attention" in student.needed_evidence([c.config for c in conditions])))
    shared = teacher + n + n_off
    if phase == "2":
        keys = {student.random_key(c.config, t) for c in conditions for t in range(c.config.eval.n_random_trials)}
        shared += n * len(keys)
    plumbed = sum(i < sizes.gate_a_samples for i in unit.on)
    repeated = (sizes.repro_runs - 1) * (teacher + n * len(conditions))
    return shared + len(conditions) * (n + n_off + plumbed) + repeated


def run_units(
    lm: LanguageModel, conditions: Sequence[Condition], samples: Samples, units: Sequence[Unit], phase: Phase, step: Step
) -> Iterator[tuple[Unit, dict[str, list[Record]]]]:
    """Execute units in order; each gives the records of every condition, by its key."""
    for unit in units:
        yield unit, _execute(lm, conditions, samples, unit, phase, step)


def _execute(
    lm: LanguageModel, conditions: Sequence[Condition], samples: Samples, unit: Unit, phase: Phase, step: Step
) -> dict[str, list[Record]]:
    configs, sizes = [condition.config for condition in conditions], conditions[0].config.eval
    on = [samples.on[i] for i in unit.on]
    measured = [row for row, i in enumerate(unit.on) if i < sizes.gate_a_samples]
    partners = _partners(conditions, unit.on, len(samples.on))
    batch = student.read_batch(lm, configs, on, partners, step, measured)
    step("base", len(on))
    base = next_token_logprobs(lm, [s.base_ids for s in on], batch.names)
    off = OffPrompts(
        [samples.off[j] for j in unit.off],
        [unit.on.index(j % len(samples.on)) for j in unit.off],
    )
    off_base = None
    if off.prompts:
        step("OFF base", len(off.prompts))
        off_base = next_token_logprobs(lm, [u.token_ids for u in off.prompts], off.names)
    records: dict[str, list[Record]] = {}
    step("select", len(on))
    for condition, (evidence, state) in zip(conditions, student.students(batch, configs), strict=True):
        if condition is not conditions[0]:
            step("select", len(on))
        arms = ConditionArms(condition.config, evidence, state, _snapshots(batch, state, measured))
        records[condition.key] = _condition(batch, arms, base, off, off_base, measured, phase, step)
    for repeat in range(1, sizes.repro_runs):
        for key, repeated in _repeat(batch, conditions, unit, len(samples.on), repeat, step).items():
            records[key] += repeated
    return records


@dataclass(frozen=True)
class OffPrompts:
    """The OFF prompts of a unit; ``owners`` are the rows of the ON samples whose prefixes they run under."""

    prompts: list[OffSample]
    owners: list[int]

    @property
    def names(self) -> list[str]:
        return [prompt.sample_id for prompt in self.prompts]

    def first_of(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Return (index into ``rows``, index of the first OFF prompt under that row's prefix), where there is one."""
        return [(k, self.owners.index(row)) for k, row in enumerate(rows) if row in self.owners]


@dataclass(frozen=True)
class ConditionArms:
    """One condition on a batch before its answers: evidence, prefixes, and copies of what later passes read from."""

    config: Phase2Config
    evidence: list[Evidence]
    state: student.Student
    untouched: list[KVPrefix]


def _condition(
    batch: student.Batch,
    arms: ConditionArms,
    base: torch.Tensor,
    off: OffPrompts,
    off_base: torch.Tensor | None,
    measured: list[int],
    phase: Phase,
    step: Step,
) -> list[Record]:
    """Run one condition's arms and checks; return its records: OFF, plumbing, then an ON and a selection record per sample."""
    config, state = arms.config, arms.state
    select = student.answer(batch, config, state.prefix)
    records: list[Record] = []
    off_select = None
    if off_base is not None:
        step("OFF select", len(off.prompts))
        off_select = _off_select(batch, config, off, state)
        records += _off_records(batch, off, off_base, off_select)
    trials = range(config.eval.n_random_trials if phase == "2" else 0)
    randoms = [student.random_answer(batch, config, arms.evidence, trial, step) for trial in trials]
    if measured:
        step("gate A", len(measured))
        inputs = _check_inputs(batch, arms, base, select, off, off_select, measured)
        records += plumbing_records(inputs.names, run_checks(batch.lm, config, inputs))
    by_arm = {"base": base, "teacher": batch.teacher.logprobs, "select": select}
    answer_tokens = [sample.answer_token_id for sample in batch.samples]
    random_logprobs = [logprobs for _, logprobs in randoms]
    answered = answers(by_arm, random_logprobs, answer_tokens, batch.lm.tokenizer, config.reporting.topk_tokens)
    for row, sample in enumerate(batch.samples):
        selection, placement = state.choice.selections[row], state.choice.placements[row]
        drawn = [(choice.selections[row], choice.placements[row]) for choice, _ in randoms]
        owner, evidence = batch.samples[state.owners[row]], arms.evidence[row]
        on = on_record(sample, answered[row], evidence, selection, [s for s, _ in drawn], config.select.span_len)
        records += [dict(on), dict(selection_record(sample, owner, evidence, selection, placement, drawn))]
    return records


def _repeat(
    batch: student.Batch, conditions: Sequence[Condition], unit: Unit, n_on: int, repeat: int, step: Step
) -> dict[str, list[Record]]:
    """Re-run teacher, selection and select arm in two reshuffled batches; results must not depend on batch composition.

    Causal drops are taken from the run itself: they are many passes per sample, and batches of their own.
    """
    groups = _groups(conditions, len(unit.on)) if _paired(conditions) else [(row,) for row in range(len(unit.on))]
    order = rng_for(conditions[0].config.seed, "repro_order", repeat, unit.key).permutation(len(groups)).tolist()
    records: dict[str, list[Record]] = {condition.key: [] for condition in conditions}
    configs = [condition.config for condition in conditions]
    for rows in _chunks([groups[i] for i in order], max(len(groups[0]), -(-len(unit.on) // 2))):

        def announce(arm: str, n: int) -> None:
            step(f"repeat {repeat}: {arm}", n)

        samples = [batch.samples[row] for row in rows]
        partners = _partners(conditions, [unit.on[row] for row in rows], n_on)
        reshuffled = student.read_batch(batch.lm, configs, samples, partners, announce, drops=batch.drops)
        announce("select", len(samples) * len(conditions))
        for condition, (_, state) in zip(conditions, student.students(reshuffled, configs), strict=True):
            select = student.answer(reshuffled, condition.config, state.prefix)
            records[condition.key] += [dict(repro_record(repeat, s, select[row])) for row, s in enumerate(samples)]
    return records


def _off_select(batch: student.Batch, config: Phase2Config, off: OffPrompts, state: student.Student) -> torch.Tensor:
    """Return (OFF prompts, vocabulary) log-probabilities under the select arm's prefixes."""
    injection = batch.lm.injection_layers(config.layer_scope.injection)
    ids = [prompt.student_ids for prompt in off.prompts]
    return next_token_logprobs(batch.lm, ids, off.names, state.prefix, injection, off.owners)


def _off_records(batch: student.Batch, off: OffPrompts, off_base: torch.Tensor, off_select: torch.Tensor) -> list[Record]:
    deltas = kl(off_select, off_base).tolist()
    alone, under = off_base.argmax(dim=1).tolist(), off_select.argmax(dim=1).tolist()
    return [
        dict(off_record(prompt, batch.names[off.owners[i]], alone[i], under[i], deltas[i]))
        for i, prompt in enumerate(off.prompts)
    ]


def _paired(conditions: Sequence[Condition]) -> bool:
    return any(selector_class(c.config.select.mode).uses_partner for c in conditions)


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
    """Return copies of the demo caches and prefixes of some rows, made before anything has read from them."""
    if not rows:
        return []
    demos = batch.cached("untouched demos", lambda: snapshot(batch.teacher.demo_prefixes(rows)))
    return [demos, snapshot(state.prefix.rows(rows))]


def _check_inputs(
    batch: student.Batch,
    arms: ConditionArms,
    base: torch.Tensor,
    select: torch.Tensor,
    off: OffPrompts,
    off_select: torch.Tensor | None,
    rows: list[int],
) -> CheckInputs:
    """Return what the measured checks compare with, for some rows of the batch."""
    state, teacher = arms.state, batch.teacher
    owners = [state.owners[row] for row in rows]
    off_alone = [] if off_select is None else [(k, off.prompts[i], off_select[i]) for k, i in off.first_of(rows[:OFF_ALONE])]
    return CheckInputs(
        samples=[batch.samples[row] for row in rows],
        owners=[batch.samples[owner] for owner in owners],
        base=base[rows],
        teacher=teacher.logprobs[rows],
        select=select[rows],
        demo=teacher.demo_prefixes(rows),
        selections=[state.choice.selections[row] for row in rows],
        evidence=[arms.evidence[owner] for owner in owners],
        placements=[state.choice.placements[row] for row in rows],
        prefix=state.prefix.rows(rows),
        off=off_alone,
        layers=frozenset(teacher.layers),
        window=max(attention.shape[1] for attention in teacher.rows),
        untouched=arms.untouched,
        cached=batch.cached,
    )
