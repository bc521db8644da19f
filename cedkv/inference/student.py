"""Students: from the teacher's evidence to states and answers, for a batch of samples and any number of conditions.

A ``Batch`` holds what does not depend on the condition, each thing computed once: the teacher's pass, what it says under
each scope, causal drops, random arms under the same settings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from cedkv import selectors
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import DataError
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, OnSample, Placement, Selection
from cedkv.inference.forward import kl, next_token_logprobs
from cedkv.inference.prefix import kept_kv
from cedkv.inference.teacher import TeacherOutput, read_queries, read_teacher
from cedkv.kv.attention import AttentionReader
from cedkv.kv.cache import KVPrefix, Layers, assemble
from cedkv.kv.positioning import place
from cedkv.models.loading import LanguageModel
from cedkv.selectors.base import SelectionTask, candidates

T = TypeVar("T")
Announce = Callable[[str, int], None]


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
    """The states of B samples under one selector. ``owners`` are the rows of the samples whose demos they are of."""

    choice: Choice
    prefix: KVPrefix
    owners: list[int]


@dataclass(frozen=True)
class Batch:
    """B samples and everything about them that conditions share.

    partners: for each row the row whose prefix ``wrong_demo`` gives it; None when no condition asks for it.
    drops: causal drops by sample and span, which a repetition takes from the run itself.
    """

    lm: LanguageModel
    samples: list[OnSample]
    reading: TeacherOutput
    other: TeacherOutput | None
    partners: list[int] | None
    drops: dict[Any, dict[int, float]] = field(default_factory=dict)
    _memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [sample.sample_id for sample in self.samples]

    def cached(self, key: Any, compute: Callable[[], T]) -> T:
        """The value computed when the key was first asked for."""
        if key not in self._memo:
            self._memo[key] = compute()
        found: T = self._memo[key]
        return found


def wanted(configs: Sequence[Phase2Config]) -> frozenset[str]:
    """The fields of ``Evidence`` beyond attention that these conditions need."""
    found = {name for config in configs for name in selectors.needs(config.select.mode)}
    if any(config.select.causal_drop_advisory for config in configs):
        found.add("causal_drop")
    return frozenset(found)


def read(
    lm: LanguageModel,
    configs: Sequence[Phase2Config],
    samples: list[OnSample],
    partners: list[int] | None,
    announce: Announce,
    keep: Sequence[int] = (),
    drops: dict[Any, dict[int, float]] | None = None,
) -> Batch:
    """The teacher's one pass for all conditions, and another query over its cache where ``transfer_span`` asks for it.

    Args:
        keep: rows whose demo's cache is wanted in any case.
        drops: causal drops that are known already.
    """
    needed = wanted(configs)
    layers = frozenset().union(*(lm.selection_layers(config.layer_scope.selection) for config in configs))
    window = max(config.select.query_window for config in configs)
    demos, names = [s.demo_token_ids for s in samples], [s.sample_id for s in samples]
    if needed & {"causal_drop", "other_attention"} or any(c.prefix.kv_source == "gather" for c in configs):
        keep = range(len(samples))
    announce("teacher", len(samples))
    reader = AttentionReader(layers, window, layers if "accumulated" in needed else frozenset())
    reading = read_teacher(lm, demos, [s.query_token_ids for s in samples], names, reader, keep)
    other = None
    if "other_attention" in needed:
        missing = [s.sample_id for s in samples if s.other_query_ids is None]
        if missing:
            raise DataError(f'sample {missing[0]}: transfer_span needs "other_query_text" in every line of data.on_path')
        announce("other query", len(samples))
        queries = [s.other_query_ids or () for s in samples]
        rows = [reading.demo_row[row] for row in range(len(samples))]
        other = read_queries(lm, reading.demo_kv(), rows, queries, names, AttentionReader(layers, window))
    return Batch(lm, samples, reading, other, partners, {} if drops is None else drops)


def evidence(batch: Batch, config: Phase2Config) -> list[Evidence]:
    """What the teacher says about each sample's demo, as far as this condition asks for it."""
    needed = wanted([config])
    layers = batch.lm.selection_layers(config.layer_scope.selection)
    window = config.select.query_window
    found = []
    for row, sample in enumerate(batch.samples):
        known = Evidence(batch.reading.attention(row, layers, window), gold=sample.gold_tokens)
        if "causal_drop" in needed:
            known = replace(known, causal_drop=_causal_drops(batch, config, row))
        if "accumulated" in needed:
            known = replace(known, accumulated=batch.reading.accumulated(row, layers))
        if "other_attention" in needed and batch.other is not None:
            known = replace(known, other_attention=batch.other.attention(row, layers, window))
        found.append(known)
    return found


def students(batch: Batch, configs: Sequence[Phase2Config]) -> Iterator[tuple[list[Evidence], Student]]:
    """The select arm's states under each condition in turn, with the evidence they were chosen by.

    Spans are chosen for all conditions first: kept tokens that several conditions have in common (other padding, a
    partner's prefix) are then encoded once.

    Raises:
        DataError: a sample without any span to choose.
    """
    evidences = [evidence(batch, config) for config in configs]
    choices = [choose(batch, c, known, c.select.mode, "select", 0) for c, known in zip(configs, evidences, strict=True)]
    left = Counter(choice.key for choice in choices)
    encoded: dict[Any, tuple[Layers, Layers]] = {}
    for config, known, choice in zip(configs, evidences, choices, strict=True):
        if choice.key not in encoded:
            encoded[choice.key] = _kept_kv(batch, choice)
        left[choice.key] -= 1
        keys, values = encoded[choice.key] if left[choice.key] else encoded.pop(choice.key)
        made = Student(choice, assemble(keys, values, choice.placements), list(range(len(batch.samples))))
        yield known, _swapped(made, batch.partners) if selectors.uses_partner(config.select.mode) else made


def choose(batch: Batch, config: Phase2Config, known: Sequence[Evidence], mode: str, purpose: str, trial: int) -> Choice:
    """Select and place for every sample of the batch. Raises DataError for a sample without any span to choose."""
    selections, placements = [], []
    for sample, its in zip(batch.samples, known, strict=True):
        rng = rng_for(config.seed, purpose, trial, sample.sample_id)
        selection = selectors.select(mode, SelectionTask(config.select, sample.token_kinds, its, rng))
        if not selection.spans:
            raise DataError(
                f"sample {sample.sample_id}: {mode} finds no span of select.span_len = {config.select.span_len} tokens in "
                f"its {len(sample.token_kinds)} demo tokens; lower span_len or lengthen the demo"
            )
        room = max(config.prefix_len, len(selection.kept_tokens)) if selectors.is_unbounded(mode) else config.prefix_len
        selections.append(selection)
        placements.append(
            place(
                selection.kept_tokens,
                len(sample.demo_token_ids),
                config.injection.positioning_mode,
                config.prefix.padding_mode,
                room,
            )
        )
    return Choice(selections, placements, config.prefix.kv_source)


def _kept_kv(batch: Batch, choice: Choice) -> tuple[Layers, Layers]:
    rows = [batch.reading.demo_row[row] for row in range(len(batch.samples))] if choice.kv_source == "gather" else []
    return kept_kv(batch.lm, choice.kv_source, batch.samples, choice.placements, batch.reading.demo, rows)


def answer(batch: Batch, config: Phase2Config, prefix: KVPrefix) -> torch.Tensor:
    """Log-probabilities (B, vocabulary) after each sample's query, under its state."""
    rows = [sample.query_token_ids for sample in batch.samples]
    return next_token_logprobs(batch.lm, rows, batch.names, prefix, batch.lm.injection_layers(config.layer_scope.injection))


def random_key(config: Phase2Config, trial: int) -> tuple[Any, ...]:
    """What a random trial depends on: conditions that agree in it share the trial."""
    select = config.select.model_copy(update={"mode": "random_span", "causal_drop_advisory": False})
    blocks = (select, config.layer_scope, config.prefix, config.injection)
    return ("random", trial, config.seed, config.prefix_len, *(block.model_dump_json() for block in blocks))


def random_answer(
    batch: Batch, config: Phase2Config, known: Sequence[Evidence], trial: int, announce: Announce
) -> tuple[Choice, torch.Tensor]:
    """One random trial: what was kept (the K/V is needed no more) and the answers."""

    def compute() -> tuple[Choice, torch.Tensor]:
        announce(f"random {trial + 1}/{config.eval.n_random_trials}", len(batch.samples))
        choice = choose(batch, config, known, "random_span", "random", trial)
        return choice, answer(batch, config, assemble(*_kept_kv(batch, choice), choice.placements))

    return batch.cached(random_key(config, trial), compute)


def _swapped(made: Student, partners: list[int] | None) -> Student:
    if partners is None:
        raise ValueError("wrong_demo needs a batch with partners")
    choice = made.choice
    swapped = Choice([choice.selections[i] for i in partners], [choice.placements[i] for i in partners], choice.kv_source)
    return Student(swapped, made.prefix.rows(partners), partners)


def _causal_drops(batch: Batch, config: Phase2Config, row: int) -> dict[int, float]:
    """KL(teacher || teacher without the span) for every candidate: the query over the demo's cache with the span masked."""
    lm, sample, reading = batch.lm, batch.samples[row], batch.reading
    key = (sample.sample_id, config.select.span_len, config.select.center_policy)
    if key not in batch.drops:
        found = candidates(sample.token_kinds, config.select)
        hidden = reading.demo_prefixes([row] * len(found)).hide([(c.start, c.end) for c in found])
        queries, names = [sample.query_token_ids] * len(found), [sample.sample_id] * len(found)
        without = next_token_logprobs(lm, queries, names, hidden)
        moved = kl(reading.logprobs[row].expand_as(without), without).tolist()
        batch.drops[key] = {c.start: value for c, value in zip(found, moved, strict=True)}
    return batch.drops[key]
