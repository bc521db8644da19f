"""Students: from the teacher's evidence to prefixes and answers, for a batch of samples and any number of conditions.

A ``Batch`` holds what does not depend on the condition, each value computed once. ``Students`` holds what depends on it: what
is kept under each condition, and the answers. Kept tokens that conditions have in common, of the select arm or of a random
trial, are encoded and answered once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import DataError
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, Placement, Selection
from cedkv.inference.answers import AnswerReader, Answers
from cedkv.inference.batch import Batch
from cedkv.inference.context_window import require_fits
from cedkv.inference.evidence import read_evidence
from cedkv.inference.forward import next_token_logprobs
from cedkv.inference.off import OffAnswers, OffBase, OffReader
from cedkv.inference.prefix import encode_kept, kv_source
from cedkv.inference.sharing import Rows, SharedRows, neighbours_first
from cedkv.kv.cache import KVPrefix, Layers, assemble
from cedkv.kv.positioning import place
from cedkv.selectors.base import SelectionTask, create, select_tokens, selector_class
from cedkv.tasks.context_use import off_select_use, select_use


@dataclass(frozen=True)
class Choice:
    """What is kept for B samples, or for the same B in each of several random trials, and where it goes.

    owners: for each row the row of the sample whose demo the kept tokens are of; another one where the selector uses a partner.
    boundary_replay: first tokens of each run of kept tokens that are run again.
    injection: layers that see the prefix; None for all.
    """

    selections: list[Selection]
    placements: list[Placement]
    owners: list[int]
    kv_source: str
    boundary_replay: int
    injection: frozenset[int] | None

    @cached_property
    def encoding_keys(self) -> list[Hashable]:
        """For each row, what the K/V of its kept tokens depend on: padding is no part of it."""
        rows = zip(self.owners, self.placements, strict=True)
        source = (self.kv_source, self.boundary_replay)
        return [(source, owner, placed.kept_tokens, placed.key_positions) for owner, placed in rows]

    @cached_property
    def prefix_keys(self) -> list[Hashable]:
        """For each row, what an answer under its prefix depends on.

        Null slots change nothing mathematically; they are a part of it so that conditions with different padding are measured
        each by itself.
        """
        rows = zip(self.encoding_keys, self.placements, strict=True)
        return [(key, placed.query_start, placed.slots, self.injection) for key, placed in rows]

    @cached_property
    def answer_keys(self) -> list[Hashable]:
        """For each row, what the answer to its own query depends on."""
        return self.query_keys(range(len(self.owners)))

    def query_keys(self, rows: Sequence[int]) -> list[Hashable]:
        """Return for each query what its answer depends on; query i runs under the prefix of row ``rows[i]``."""
        return [(query, self.prefix_keys[row]) for query, row in enumerate(rows)]

    def of_partners(self, partners: list[int] | None) -> Choice:
        """Return the choice that gives each row what was chosen for its partner. Raises ValueError without partners."""
        if partners is None:
            raise ValueError("a selector that uses partners needs a batch with partners")
        selections, placements = [self.selections[i] for i in partners], [self.placements[i] for i in partners]
        return replace(self, selections=selections, placements=placements, owners=[self.owners[i] for i in partners])


@dataclass(frozen=True)
class Chosen:
    """All that is chosen under one condition, before any of it is run.

    evidence: the teacher's evidence per sample.
    select: the select arm.
    randoms: the random trials.
    """

    evidence: list[Evidence]
    select: Choice
    randoms: list[Choice]


@dataclass(frozen=True)
class Student:
    """The select arm's prefixes of B samples under one condition."""

    choice: Choice
    prefix: KVPrefix


class Students:
    """The students of a batch under all conditions.

    Everything is chosen first: it is then known which rows conditions have in common, and until when each must be kept.

    Attributes:
        batch: the samples.
        chosen: by condition.
        order: the conditions, in the order in which their arms must be asked for: of each the select arm's prefixes, its
            answers, its OFF prompts, then the random trials.
    """

    def __init__(
        self, batch: Batch, configs: Sequence[Phase2Config], n_random_trials: int = 0, off_owners: Sequence[int] = ()
    ) -> None:
        """Choose the spans of every arm.

        Args:
            off_owners: for each OFF prompt, the row of the sample whose prefix it runs under.

        Raises:
            DataError: a sample without any span to choose.
            ModelError: a positioning or padding mode of another package places a query beyond the model's limits.
        """
        self.batch = batch
        self._encoded, self._answered, self._off_answered = SharedRows(), SharedRows(), SharedRows()
        evidences = [read_evidence(batch, config) for config in configs]
        self.chosen = [
            _choose_arms(batch, config, evidence, n_random_trials) for config, evidence in zip(configs, evidences, strict=True)
        ]
        for own in self.chosen:
            for arm, choice in (("select", own.select), *(("random", choice) for choice in own.randoms)):
                pairs = zip(batch.samples, choice.placements, strict=True)
                require_fits(batch.lm.capabilities, (select_use(*pair, "the prefix", arm) for pair in pairs))
        self.order = neighbours_first(
            [[key for choice in (own.select, *own.randoms) for key in choice.encoding_keys] for own in self.chosen]
        )
        for own in (self.chosen[index] for index in self.order):
            self._encoded.expect(own.select.encoding_keys)
            self._answered.expect(own.select.answer_keys)
            self._off_answered.expect(own.select.query_keys(off_owners))
            for choice in own.randoms:
                unanswered = self._answered.expect(choice.answer_keys)
                self._encoded.expect(choice.encoding_keys[row] for row in unanswered)

    def select(self, choice: Choice) -> Student:
        """Return the prefixes of a select arm."""
        return Student(choice, self._prefix(choice, range(len(self.batch.samples))))

    def answer(self, student: Student) -> Answers:
        """Return what each sample answers under its prefix."""

        def compute(rows: list[int]) -> Rows:
            return answer(self.batch, student.choice, rows, student.prefix.rows(rows))

        return Answers(*self._answered.take(student.choice.answer_keys, compute))

    def answer_off(
        self, student: Student, prompts: Sequence[Sequence[int]], names: Sequence[str], owners: Sequence[int], base: OffBase
    ) -> OffAnswers:
        """Return what each OFF prompt is answered under the prefix of its owner.

        Args:
            prompts: token ids of each OFF prompt.
            names: ids of the prompts, for errors.
            owners: for each prompt, the row of the sample whose prefix it runs under.
            base: what base answers to the prompts.

        Raises:
            ModelError: as ``__init__``.
        """

        placements = student.choice.placements
        require_fits(
            self.batch.lm.capabilities,
            (
                off_select_use(name, len(prompt), placements[owner], len(given), "the prefix")
                for name, prompt, owner, given in zip(names, prompts, owners, base.tokens, strict=True)
            ),
        )

        def compute(indices: list[int]) -> Rows:
            rows, row_names, row_owners = (
                [prompts[i] for i in indices],
                [names[i] for i in indices],
                [owners[i] for i in indices],
            )
            reader, injection = OffReader(base, indices), student.choice.injection
            return reader.read(
                next_token_logprobs(self.batch.lm, rows, row_names, student.prefix, injection, row_owners, reader.further)
            )

        return OffAnswers(*self._off_answered.take(student.choice.query_keys(owners), compute))

    def trials_together(self, choices: Sequence[Choice]) -> Iterator[list[Choice]]:
        """Yield the random trials of a condition, as many at a time as fit one pass: the fewer, the more samples there are."""
        slots = max((placement.slots for choice in choices for placement in choice.placements), default=1)
        left = list(choices)
        while left:  # passes may have been halved meanwhile
            n = max(1, self.batch.lm.batching.fitting(slots) // len(self.batch.samples))
            yield left[:n]
            del left[:n]

    def answer_randoms(self, choices: Sequence[Choice]) -> list[Answers]:
        """Return what each sample answers in random trials of a condition, whose prefixes nothing else needs."""
        joined = replace(
            choices[0],
            selections=[selection for choice in choices for selection in choice.selections],
            placements=[placement for choice in choices for placement in choice.placements],
            owners=[owner for choice in choices for owner in choice.owners],
        )
        keys, n = [key for choice in choices for key in choice.answer_keys], len(self.batch.samples)

        def compute(rows: list[int]) -> Rows:
            return answer(self.batch, joined, rows, self._prefix(joined, rows))

        found = self._answered.take(keys, compute)
        return [Answers(*(tensor[start : start + n] for tensor in found)) for start in range(0, len(keys), n)]

    def _prefix(self, choice: Choice, rows: Sequence[int]) -> KVPrefix:
        """Return the prefixes of some rows of a choice."""
        placements = [choice.placements[row] for row in rows]

        def compute(indices: list[int]) -> Rows:
            keys, values = _encode(self.batch, choice, [rows[i] for i in indices])
            return *keys, *values

        encoded = self._encoded.take([choice.encoding_keys[row] for row in rows], compute)
        longest = max(len(placement.kept_tokens) for placement in placements)
        layers = [tensor[:, :, :longest] for tensor in encoded]
        return assemble(tuple(layers[: len(layers) // 2]), tuple(layers[len(layers) // 2 :]), placements)


def _choose_arms(batch: Batch, config: Phase2Config, evidence: list[Evidence], n_random_trials: int) -> Chosen:
    select = choose(batch, config, evidence, config.select.mode, "select", 0)
    if selector_class(config.select.mode).uses_partner:
        select = select.of_partners(batch.partners)
    randoms = [choose(batch, config, evidence, "random_span", "random", trial) for trial in range(n_random_trials)]
    return Chosen(evidence, select, randoms)


def choose(batch: Batch, config: Phase2Config, evidences: Sequence[Evidence], mode: str, purpose: str, trial: int) -> Choice:
    """Select and place for every sample of the batch.

    Args:
        mode: the selector; the configured one has its parameters, another one its defaults.
        purpose, trial: what the random draws are for, see ``seeding.rng_for``.

    Raises:
        DataError: a sample without any span to choose.
    """
    selector = create(config.select) if mode == config.select.mode else selector_class(mode)()
    selections, placements = [], []
    for sample, evidence in zip(batch.samples, evidences, strict=True):
        rng = rng_for(config.seed, purpose, trial, sample.sample_id)
        with SELECTORS.errors_named(mode, f"sample {sample.sample_id}"):
            selection = select_tokens(selector, SelectionTask(config.select, sample.token_kinds, evidence, rng))
        if not selection.spans:
            raise DataError(
                f"sample {sample.sample_id}: {mode} finds no span of select.span_len = {config.select.span_len} tokens in "
                f"its {len(sample.token_kinds)} demo tokens; lower span_len or lengthen the demo"
            )
        room = config.prefix_len if selector.bounded else max(config.prefix_len, len(selection.kept_tokens))
        modes = config.injection.positioning_mode, config.prefix.padding_mode
        selections.append(selection)
        placements.append(place(selection.kept_tokens, len(sample.demo_token_ids), *modes, room))
    owners, injection = list(range(len(batch.samples))), batch.lm.injection_layers(config.layer_scope.injection)
    return Choice(selections, placements, owners, config.prefix.kv_source, config.prefix.boundary_replay, injection)


def _encode(batch: Batch, choice: Choice, rows: Sequence[int]) -> tuple[Layers, Layers]:
    """Return the K/V of the kept tokens of some rows, as ``KVSource.encode``."""
    source, owners = kv_source(choice.kv_source), [choice.owners[row] for row in rows]
    samples, placements = [batch.samples[owner] for owner in owners], [choice.placements[row] for row in rows]
    demo_rows = [batch.teacher.demo_row[owner] for owner in owners] if source.reads_demo_cache else []
    replay = choice.boundary_replay
    return encode_kept(batch.lm, choice.kv_source, samples, placements, batch.teacher.demo, demo_rows, replay)


def answer(batch: Batch, choice: Choice, rows: Sequence[int], prefix: KVPrefix) -> Answers:
    """Return what some rows answer; row i of ``prefix`` is of rows[i]. The samples repeat in a choice of several trials."""
    of_samples = [row % len(batch.samples) for row in rows]
    samples, names = [batch.samples[row] for row in of_samples], [batch.names[row] for row in of_samples]
    reader, queries = AnswerReader([s.answer_token_ids for s in samples]), [s.query_token_ids for s in samples]
    return reader.read(next_token_logprobs(batch.lm, queries, names, prefix, choice.injection, None, reader.further))
