"""The engine: the only loop over samples and arms, used by every entry point.

A run is planned as independent units of work (``cedkv.units``). Executing a unit has no side effect but its records, so units
can be repeated, resumed or distributed without changing a result. Within a unit the arms run one after the
other, each as full batches; peak memory is that of one batch, whatever the number of samples. A run may have several
conditions: what they share (base, teacher, the OFF prompts alone, and every prefix that several of them arrive at, with the
answers under it) is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cedkv.checks.base import CheckInputs, MeasuredCheck, measured_checks, run_checks
from cedkv.checks.stored import snapshot
from cedkv.conditions import Condition
from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import LackOfMemoryError
from cedkv.core.seeding import rng_for
from cedkv.core.text import one_line, plural
from cedkv.core.values import OffSample, OnSample, Record
from cedkv.inference import student
from cedkv.inference.answers import AnswerReader, Answers
from cedkv.inference.batch import Announce, Batch, silent
from cedkv.inference.distributions import finite_by_the_end, kl
from cedkv.inference.evidence import read_batch
from cedkv.inference.forward import next_token_logprobs
from cedkv.inference.off import OffAnswers, OffBase, read_off_base
from cedkv.inference.quality import gold_mass, judge
from cedkv.inference.student import Students
from cedkv.kv.cache import KVPrefix
from cedkv.kv.transfers import index_on
from cedkv.models.batching import is_out_of_memory
from cedkv.models.loading import LanguageModel
from cedkv.recording import answers, heads_record, off_records, on_record, plumbing_records, repro_records, selection_record
from cedkv.tasks.load import Samples
from cedkv.tasks.pairing import off_owner
from cedkv.units import (
    Unit,
    batch_groups,
    evidence_evaluations,
    join_groups,
    partner_rows,
    smallest_unit,
    uses_partners,
    with_own_trials,
)

READ_WITH_TEACHER = frozenset({"other query", "null query", "replay"})
"""Evidence that is announced and read together with the teacher."""
OFF_ALONE = 2, 1
"""How many of a unit's longest and shortest OFF prompts Gate A runs again alone; few, because each is a pass of one row."""


def run_units(
    lm: LanguageModel,
    conditions: Sequence[Condition],
    samples: Samples,
    units: Sequence[Unit],
    phase: Phase,
    step: Announce,
) -> Iterator[tuple[Unit, dict[str, list[Record]]]]:
    """Execute units in order; yield each unit with the records of every condition, by the condition's key.

    Raises:
        LackOfMemoryError: memory ran out outside of a pass.
        NumericsError: a value is not finite.
    """
    for unit in units:
        with _explain_lack_of_memory(lm, conditions, len(samples.on), unit), finite_by_the_end():
            records = _execute(lm, conditions, samples, unit, phase, step)
        yield unit, records


@contextmanager
def _explain_lack_of_memory(lm: LanguageModel, conditions: Sequence[Condition], n_on: int, unit: Unit) -> Iterator[None]:
    """Say of memory that ran out, and that no smaller pass would have spared, what would need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        half = len(unit.on) // 2
        divisible = half >= smallest_unit(conditions, n_on)
        less = f"runtime.batch_size={half}" if divisible else "a lower prefix_len, eval.n_random_trials or eval.off_tokens"
        raise LackOfMemoryError(
            f"memory ran out on {lm.device} outside of a pass, in {unit.key}: {one_line(error) or 'MemoryError'}. What a unit "
            f"of {plural(len(unit.on), 'ON sample')} and {plural(len(unit.off), 'OFF prompt')} keeps (K/V, distributions) has "
            f"to fit beside the weights, and only passes are halved: start a new run with {less}; where another process holds "
            "the memory, resume this one when that has ended"
        ) from error


def _execute(
    lm: LanguageModel, conditions: Sequence[Condition], samples: Samples, unit: Unit, phase: Phase, step: Announce
) -> dict[str, list[Record]]:
    configs, sizes = [condition.config for condition in conditions], conditions[0].config.eval
    on = [samples.on[i] for i in unit.on]
    off = OffPrompts(
        [samples.off[j] for j in unit.off],
        [unit.on.index(off_owner(j, len(samples.on))) for j in unit.off],
        OFF_ALONE if sizes.gate_a_samples else (0, 0),  # without Gate A in benchmarks
    )
    gate_a = [row for row, i in enumerate(unit.on) if i < sizes.gate_a_samples]
    checked = CheckedRows(gate_a, gate_a or [len(on) - 1] if sizes.gate_a_samples else [], off.rows_of(off.checked()))
    partners = partner_rows(conditions, unit.on, len(samples.on))
    batch = read_batch(lm, configs, on, partners, step, checked.all)

    def alone(sample: OnSample) -> Batch:
        return read_batch(lm, configs, [sample], None, silent, keep=[0])

    step("base", len(on))
    reader = AnswerReader([sample.answer_token_ids for sample in batch.samples])
    base = reader.read(next_token_logprobs(lm, [s.base_ids for s in on], batch.names, further=reader.further))
    off_base = None
    if off.prompts:
        step("OFF base", len(off.prompts))
        off_base = read_off_base(lm, [u.token_ids for u in off.prompts], off.names, sizes.off_tokens)
    for name, rows in evidence_evaluations(configs, on).items():
        if name not in READ_WITH_TEACHER:
            step(name, rows)
    students = Students(batch, configs, sizes.n_random_trials if phase == "2" else 0, off.owners)
    records: dict[str, list[Record]] = {condition.key: [] for condition in conditions}
    counted = with_own_trials(conditions)
    for index in students.order:
        condition, chosen = conditions[index], students.chosen[index]
        step("select", len(on))
        selected = students.select(chosen.select)
        untouched = _snapshots(batch, selected, gate_a)
        counted_as = len(on) if condition in counted else 0
        arms = ConditionArms(condition.config, chosen, selected, untouched, alone, counted_as)
        records[condition.key] = _run_condition(students, arms, base, off, off_base, checked, step)
    for repeat in range(1, sizes.repro_runs):
        for key, repeated in _repeat(batch, conditions, unit, len(samples.on), repeat, step).items():
            records[key] += repeated
    return records


@dataclass(frozen=True)
class OffPrompts:
    """The OFF prompts of a unit.

    owners: the rows of the ON samples whose prefixes they run under. alone: as ``OFF_ALONE``.
    """

    prompts: list[OffSample]
    owners: list[int]
    alone: tuple[int, int]

    @property
    def names(self) -> list[str]:
        """Sample ids."""
        return [prompt.sample_id for prompt in self.prompts]

    def checked(self) -> list[int]:
        """Return the prompts that Gate A runs again alone: the longest ones, which share a pass, and the shortest."""
        ordered = sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i].student_ids))
        longest, shortest = self.alone
        rest = ordered[longest:]
        return ordered[:longest] + rest[max(0, len(rest) - shortest) :]

    def rows_of(self, prompts: Sequence[int]) -> list[int]:
        """Return the rows under whose prefixes these prompts run, ascending and each once."""
        return sorted({self.owners[prompt] for prompt in prompts})


@dataclass(frozen=True)
class CheckedRows:
    """The rows of a unit that Gate A is measured on.

    gate_a: the ON samples of Gate A. of_every_unit: these, or one other where there are none. off: the rows under whose
    prefixes the checked OFF prompts run.
    """

    gate_a: list[int]
    of_every_unit: list[int]
    off: list[int]

    @property
    def all(self) -> list[int]:
        """Every row that a check looks at, ascending."""
        return sorted({*self.of_every_unit, *self.off})

    def checks(self) -> Iterator[tuple[list[int], list[MeasuredCheck], bool]]:
        """Yield rows, the checks that are measured on them, and whether these compare OFF prompts."""
        every = measured_checks()
        of_on = [check for check in every if not check.of_off_prompts and (self.gate_a or check.of_every_unit)]
        of_off = [check for check in every if check.of_off_prompts]
        for rows, checks in ((self.of_every_unit, of_on), (self.off, of_off)):
            if rows:
                yield rows, checks, checks is of_off


@dataclass(frozen=True)
class ConditionArms:
    """One condition on a batch before its answers are computed.

    selected: the select arm's choice and prefixes.
    untouched: copies of the caches that later passes read from, for the check that no pass changes them.
    alone: runs the teacher on one sample in a batch of its own, reading what all conditions need.
    trial_evaluations: what a random trial counts as; 0 where a condition before has the same trials.
    """

    config: Phase2Config
    chosen: student.Chosen
    selected: student.Student
    untouched: list[KVPrefix]
    alone: Callable[[OnSample], Batch]
    trial_evaluations: int


def _run_condition(
    students: Students,
    arms: ConditionArms,
    base: Answers,
    off: OffPrompts,
    off_base: OffBase | None,
    checked: CheckedRows,
    step: Announce,
) -> list[Record]:
    """Run one condition's arms and checks; return its records: OFF, Gate A, then an ON and a selection record per sample,
    then attention to gold tokens.

    Args:
        base, off_base: what is answered without a prefix, to ON samples and to OFF prompts.
    """
    batch, config, selected, chosen = students.batch, arms.config, arms.selected, arms.chosen
    select = students.answer(selected)
    quality = judge(batch, config, chosen.evidence, selected.choice.selections, step)
    records: list[Record] = []
    off_select = None
    if off_base is not None:
        step("OFF select", len(off.prompts))
        off_select = _off_select(students, off, selected, off_base)
        records += _off_records(batch, off, off_base, off_select)
    randoms: list[Answers] = []
    for trials in students.trials_together(chosen.randoms):
        for trial in range(len(randoms) + 1, len(randoms) + len(trials) + 1):
            step(f"random {trial}/{len(chosen.randoms)}", arms.trial_evaluations)
        randoms += students.answer_randoms(trials)
    step("gate A", len(checked.gate_a))
    plumbing: dict[str, Record] = {}
    for rows, checks, of_off_prompts in checked.checks():
        inputs = _check_inputs(batch, arms, base, select, off, off_base, off_select, rows, of_off_prompts)
        for record in plumbing_records(inputs.names, run_checks(batch.lm, config, inputs, checks)):
            plumbing.setdefault(record["sample_id"], {}).update(record)
    records += plumbing.values()
    by_arm = {"base": base, "teacher": batch.teacher_answers, "select": select}
    answers_of = answers(by_arm, randoms, batch.samples, batch.lm.tokenizer, config.reporting.topk_tokens)
    for row, sample in enumerate(batch.samples):
        selection, placement = selected.choice.selections[row], selected.choice.placements[row]
        random_picks = [(choice.selections[row], choice.placements[row]) for choice in chosen.randoms]
        owner, evidence, judged = batch.samples[selected.choice.owners[row]], chosen.evidence[row], quality[row]
        drawn = [random_selection for random_selection, _ in random_picks]
        on = on_record(sample, answers_of[row], evidence, selection, drawn, config.select.span_len, judged)
        kept = selection_record(sample, owner, evidence, selection, placement, random_picks, judged)
        records += [dict(on), dict(kept)]
    if (mass := gold_mass(batch, config)) is not None:
        records.append(dict(heads_record(mass)))
    return records


def _repeat(
    batch: Batch, conditions: Sequence[Condition], unit: Unit, n_on: int, repeat: int, step: Announce
) -> dict[str, list[Record]]:
    """Run selection and select arm again in two reshuffled batches; results must not depend on batch composition.

    The teacher's evidence is taken from the run itself: whether it depends on the batch, Gate A compares with batches of one.
    """
    groups = batch_groups(conditions, len(unit.on)) if uses_partners(conditions) else [(row,) for row in range(len(unit.on))]
    order = rng_for(conditions[0].config.seed, "repro_order", repeat, unit.key).permutation(len(groups)).tolist()
    records: dict[str, list[Record]] = {condition.key: [] for condition in conditions}
    for rows in join_groups([groups[i] for i in order], max(len(groups[0]), -(-len(unit.on) // 2))):
        step(f"repeat {repeat}: select", len(rows) * len(conditions))
        reshuffled = batch.rows(rows, partner_rows(conditions, [unit.on[row] for row in rows], n_on))
        students = Students(reshuffled, [condition.config for condition in conditions])
        for index in students.order:
            select = students.answer(students.select(students.chosen[index].select))
            records[conditions[index].key] += [dict(record) for record in repro_records(repeat, reshuffled.samples, select)]
    return records


def _off_select(students: Students, off: OffPrompts, selected: student.Student, base: OffBase) -> OffAnswers:
    """Return what OFF prompts are answered under the select arm's prefixes."""
    return students.answer_off(selected, [prompt.student_ids for prompt in off.prompts], off.names, off.owners, base)


def _off_records(batch: Batch, off: OffPrompts, off_base: OffBase, off_select: OffAnswers) -> list[Record]:
    deltas = kl(off_select.logprobs, off_base.logprobs).tolist()
    owners = [batch.names[owner] for owner in off.owners]
    return [dict(record) for record in off_records(off.prompts, owners, off_base, off_select, deltas)]


def _snapshots(batch: Batch, selected: student.Student, rows: list[int]) -> list[KVPrefix]:
    """Return copies of the demo caches and prefixes of some rows, made before any arm has run over them."""
    if not rows:
        return []
    demos = batch.cached("untouched demos", lambda: snapshot(batch.teacher.demo_prefixes(rows)))
    return [demos, snapshot(selected.prefix.rows(rows))]


def _check_inputs(
    batch: Batch,
    arms: ConditionArms,
    base: Answers,
    select: Answers,
    off: OffPrompts,
    off_base: OffBase | None,
    off_select: OffAnswers | None,
    rows: list[int],
    of_off_prompts: bool,
) -> CheckInputs:
    """Return the inputs of the measured checks for some rows of the batch; OFF prompts for the checks that compare these."""
    selected, teacher, at = arms.selected, batch.teacher, index_on(rows, base.logprobs.device)
    owners = [selected.choice.owners[row] for row in rows]
    off_alone, off_further = [], []
    if of_off_prompts and off_base is not None and off_select is not None:
        checked = [(rows.index(off.owners[i]), i) for i in off.checked()]
        off_alone = [(k, off.prompts[i], off_select.logprobs[i]) for k, i in checked]
        answered, kls = [(k, i, off_base.tokens[i]) for k, i in checked if off_base.tokens[i]], off_select.kl.tolist()
        off_further = [(k, off.prompts[i], tokens, kls[i][: len(tokens)]) for k, i, tokens in answered]
    return CheckInputs(
        samples=[batch.samples[row] for row in rows],
        owners=[batch.samples[owner] for owner in owners],
        base=base.logprobs[at],
        teacher=teacher.logprobs[at],
        select=select.logprobs[at],
        answers={"teacher": batch.teacher_answers.tokens[at], "select": select.tokens[at]},
        demo=teacher.demo_prefixes(rows),
        selections=[selected.choice.selections[row] for row in rows],
        evidence=[arms.chosen.evidence[owner] for owner in owners],
        placements=[selected.choice.placements[row] for row in rows],
        prefix=selected.prefix.rows(rows),
        off=off_alone,
        off_further=off_further,
        untouched=arms.untouched,
        cached=batch.cached,
        alone=arms.alone,
    )
