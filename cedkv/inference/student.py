"""Students: from the teacher's evidence to prefixes and answers, for a batch of samples and any number of conditions.

A ``Batch`` holds what does not depend on the condition, each value computed once: the teacher's pass, the evidence under
each layer scope, causal drops, random arms under the same settings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from cedkv.config.extensions import KV_SOURCES, SELECTORS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import DataError
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, OnSample, Placement, Selection
from cedkv.inference.forward import kl, next_token_logprobs
from cedkv.inference.prefix import kv_source
from cedkv.inference.teacher import TeacherOutput, read_queries, read_teacher
from cedkv.kv.attention import AttentionReader
from cedkv.kv.cache import KVPrefix, Layers, assemble
from cedkv.kv.positioning import place
from cedkv.models.loading import LanguageModel
from cedkv.selectors.base import SelectionTask, candidates, create, select_tokens, selector_class

T = TypeVar("T")
Announce = Callable[[str, int], None]
"""Called before an arm is computed, with the arm's name and its number of evaluations (sample x arm)."""


@dataclass(frozen=True)
class Choice:
    """What is kept of B samples' demos, and where it goes."""

    selections: list[Selection]
    placements: list[Placement]
    kv_source: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What the kept tokens' K/V depend on."""
        return (self.kv_source, *((p.kept_tokens, p.key_positions) for p in self.placements))


@dataclass(frozen=True)
class Student:
    """The prefixes of B samples under one condition.

    owners: for each row the row of the sample whose demo the prefix is of; another one where the selector uses a partner.
    """

    choice: Choice
    prefix: KVPrefix
    owners: list[int]


@dataclass(frozen=True)
class Batch:
    """B samples and everything about them that conditions share.

    teacher: the teacher's pass over demo + query.
    other_query: the same with each sample's other query; None where no condition needs it.
    partners: for each row the row whose prefix ``wrong_demo`` gives it; None where no condition uses partners.
    drops: causal drops by sample and span, which a repetition takes from the run itself.
    """

    lm: LanguageModel
    samples: list[OnSample]
    teacher: TeacherOutput
    other_query: TeacherOutput | None
    partners: list[int] | None
    drops: dict[Any, dict[int, float]] = field(default_factory=dict)
    _cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Sample ids."""
        return [sample.sample_id for sample in self.samples]

    def cached(self, key: Any, compute: Callable[[], T]) -> T:
        """Return the value computed when the key was first asked for."""
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value


def needed_evidence(configs: Sequence[Phase2Config]) -> frozenset[str]:
    """Return the fields of ``Evidence`` beyond attention that these configurations need."""
    fields = {name for config in configs for name in selector_class(config.select.mode).needs}
    if any(config.select.causal_drop_advisory for config in configs):
        fields.add("causal_drop")
    return frozenset(fields)


def read_batch(
    lm: LanguageModel,
    configs: Sequence[Phase2Config],
    samples: list[OnSample],
    partners: list[int] | None,
    announce: Announce,
    keep: Sequence[int] = (),
    drops: dict[Any, dict[int, float]] | None = None,
) -> Batch:
    """Run the teacher once for all configurations, and the other queries over its cache where a selector needs them.

    Args:
        partners: see ``Batch``.
        keep: rows whose demo cache is kept in any case.
        drops: causal drops that are computed already.

    Raises:
        DataError: another query is needed and a sample has none.
        NumericsError: a logit, key or value is not finite.
    """
    needed = needed_evidence(configs)
    layers = frozenset().union(*(lm.selection_layers(config.layer_scope.selection) for config in configs))
    window = max(config.select.query_window for config in configs)
    demos, names = [s.demo_token_ids for s in samples], [s.sample_id for s in samples]
    if needed & {"causal_drop", "other_attention"} or any(kv_source(c.prefix.kv_source).reads_demo_cache for c in configs):
        keep = range(len(samples))
    announce("teacher", len(samples))
    reader = AttentionReader(layers, window, layers if "accumulated" in needed else frozenset())
    teacher = read_teacher(lm, demos, [s.query_token_ids for s in samples], names, reader, keep)
    other_query = None
    if "other_attention" in needed:
        without = [s.sample_id for s in samples if s.other_query_ids is None]
        if without:
            modes = dict.fromkeys(m for m in (c.select.mode for c in configs) if "other_attention" in selector_class(m).needs)
            raise DataError(f'sample {without[0]}: {", ".join(modes)} needs "other_query_text" in every line of data.on_path')
        announce("other query", len(samples))
        queries = [s.other_query_ids or () for s in samples]
        rows = [teacher.demo_row[row] for row in range(len(samples))]
        other_query = read_queries(lm, teacher.demo_kv(), rows, queries, names, AttentionReader(layers, window))
    return Batch(lm, samples, teacher, other_query, partners, {} if drops is None else drops)


def read_evidence(batch: Batch, config: Phase2Config) -> list[Evidence]:
    """Return what the teacher says about each sample's demo, as far as this configuration needs it."""
    needed = needed_evidence([config])
    layers = batch.lm.selection_layers(config.layer_scope.selection)
    window = config.select.query_window
    evidences = []
    for row, sample in enumerate(batch.samples):
        evidence = Evidence(batch.teacher.attention(row, layers, window), gold=sample.gold_tokens)
        if "causal_drop" in needed:
            evidence = replace(evidence, causal_drop=_causal_drops(batch, config, row))
        if "accumulated" in needed:
            evidence = replace(evidence, accumulated=batch.teacher.accumulated(row, layers))
        if "other_attention" in needed and batch.other_query is not None:
            evidence = replace(evidence, other_attention=batch.other_query.attention(row, layers, window))
        evidences.append(evidence)
    return evidences


def students(batch: Batch, configs: Sequence[Phase2Config]) -> Iterator[tuple[list[Evidence], Student]]:
    """Yield the select arm's evidence and prefixes under each configuration in turn.

    Spans are chosen for all configurations first: kept tokens that several have in common (another padding, a partner's
    prefix) are then encoded once.

    Raises:
        DataError: a sample without any span to choose.
    """
    evidences = [read_evidence(batch, config) for config in configs]
    choices = [
        choose(batch, config, evidence, config.select.mode, "select", 0)
        for config, evidence in zip(configs, evidences, strict=True)
    ]
    uses_left = Counter(choice.key for choice in choices)
    encoded: dict[Any, tuple[Layers, Layers]] = {}
    for config, evidence, choice in zip(configs, evidences, choices, strict=True):
        if choice.key not in encoded:
            encoded[choice.key] = _encode(batch, choice)
        uses_left[choice.key] -= 1
        keys, values = encoded[choice.key] if uses_left[choice.key] else encoded.pop(choice.key)
        student = Student(choice, assemble(keys, values, choice.placements), list(range(len(batch.samples))))
        swap = selector_class(config.select.mode).uses_partner
        yield evidence, _give_to_partners(student, batch.partners) if swap else student


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
    return Choice(selections, placements, config.prefix.kv_source)


def _encode(batch: Batch, choice: Choice) -> tuple[Layers, Layers]:
    source = kv_source(choice.kv_source)
    rows = [batch.teacher.demo_row[row] for row in range(len(batch.samples))] if source.reads_demo_cache else []
    with KV_SOURCES.errors_named(choice.kv_source):
        return source.encode(batch.lm, batch.samples, choice.placements, batch.teacher.demo, rows)


def answer(batch: Batch, config: Phase2Config, prefix: KVPrefix) -> torch.Tensor:
    """Return the log-probabilities (B, vocabulary) after each sample's query, under its prefix."""
    rows = [sample.query_token_ids for sample in batch.samples]
    return next_token_logprobs(batch.lm, rows, batch.names, prefix, batch.lm.injection_layers(config.layer_scope.injection))


def random_key(config: Phase2Config, trial: int) -> tuple[Any, ...]:
    """Return what a random trial depends on: conditions that agree in it share the trial."""
    select = config.select.model_copy(update={"mode": "random_span", "params": {}, "causal_drop_advisory": False})
    blocks = (select, config.layer_scope, config.prefix, config.injection)
    return ("random", trial, config.seed, config.prefix_len, *(block.model_dump_json() for block in blocks))


def random_answer(
    batch: Batch, config: Phase2Config, evidences: Sequence[Evidence], trial: int, announce: Announce
) -> tuple[Choice, torch.Tensor]:
    """Return one random trial: what was kept (its K/V is needed no more), and the log-probabilities (B, vocabulary)."""

    def compute() -> tuple[Choice, torch.Tensor]:
        announce(f"random {trial + 1}/{config.eval.n_random_trials}", len(batch.samples))
        choice = choose(batch, config, evidences, "random_span", "random", trial)
        return choice, answer(batch, config, assemble(*_encode(batch, choice), choice.placements))

    return batch.cached(random_key(config, trial), compute)


def _give_to_partners(student: Student, partners: list[int] | None) -> Student:
    if partners is None:
        raise ValueError("a selector that uses partners needs a batch with partners")
    choice = student.choice
    swapped = Choice([choice.selections[i] for i in partners], [choice.placements[i] for i in partners], choice.kv_source)
    return Student(swapped, student.prefix.rows(partners), partners)


def _causal_drops(batch: Batch, config: Phase2Config, row: int) -> dict[int, float]:
    """Return start -> KL(teacher || teacher without the span) in nats for every candidate of a row.

    The query runs over the demo's cache with the span masked out, all candidates in one batch.
    """
    lm, sample, teacher = batch.lm, batch.samples[row], batch.teacher
    key = (sample.sample_id, config.select.span_len, config.select.center_policy)
    if key not in batch.drops:
        spans = candidates(sample.token_kinds, config.select)
        hidden = teacher.demo_prefixes([row] * len(spans)).hide([(span.start, span.end) for span in spans])
        queries, names = [sample.query_token_ids] * len(spans), [sample.sample_id] * len(spans)
        without = next_token_logprobs(lm, queries, names, hidden)
        drops = kl(teacher.logprobs[row].expand_as(without), without).tolist()
        batch.drops[key] = {span.start: drop for span, drop in zip(spans, drops, strict=True)}
    return batch.drops[key]
