"""Students: from the teacher's evidence to states and answers, for a batch of samples and any number of conditions.

A ``Batch`` holds what does not depend on the condition, each thing computed once: the teacher's pass, what it says under
each scope, causal drops, random arms under the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from cedkv import selectors
from cedkv.config import Phase2Config
from cedkv.digest import generator
from cedkv.errors import DataError
from cedkv.lm.attention import AttentionReader
from cedkv.lm.cache import PrefixBatch
from cedkv.lm.prefix import encode
from cedkv.lm.scoring import TeacherReading, kl, next_token_logprobs, read_teacher
from cedkv.lm.source import LanguageModel
from cedkv.positioning import place
from cedkv.selectors.common import SelectionTask, candidates
from cedkv.types import Evidence, OnSample, Placement, Selection

T = TypeVar("T")
Announce = Callable[[str, int], None]


@dataclass(frozen=True)
class Student:
    """The states of B samples under one selector. ``owners`` are the samples whose demos the kept tokens are of."""

    selections: list[Selection]
    placements: list[Placement]
    prefix: PrefixBatch
    owners: list[OnSample]


@dataclass(frozen=True)
class Batch:
    """B samples and everything about them that conditions share.

    partners: for each row the row whose prefix ``wrong_demo`` gives it; None when no condition asks for it.
    """

    lm: LanguageModel
    samples: list[OnSample]
    reading: TeacherReading
    other: TeacherReading | None
    partners: list[int] | None
    _memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [sample.sample_id for sample in self.samples]

    def once(self, key: Any, compute: Callable[[], T]) -> T:
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
    keep_cache: bool,
    announce: Announce,
) -> Batch:
    """The teacher's one pass for all conditions, and one over another query where ``transfer_span`` asks for it."""
    needed = wanted(configs)
    layers = frozenset().union(*(lm.selection_layers(config.layer_scope.selection) for config in configs))
    window = max(config.select.query_window for config in configs)
    demos, names = [s.demo_token_ids for s in samples], [s.sample_id for s in samples]
    keep_cache = keep_cache or "causal_drop" in needed or any(c.prefix.kv_source == "gather" for c in configs)
    announce("teacher", len(samples))
    reader = AttentionReader(layers, window, layers if "accumulated" in needed else frozenset())
    reading = read_teacher(lm, demos, [s.query_token_ids for s in samples], names, reader, keep_cache)
    other = None
    if "other_attention" in needed:
        missing = [s.sample_id for s in samples if s.other_query_ids is None]
        if missing:
            raise DataError(f'sample {missing[0]}: transfer_span needs "other_query_text" in every line of data.on_path')
        announce("other query", len(samples))
        queries = [s.other_query_ids or () for s in samples]
        other = read_teacher(lm, demos, queries, names, AttentionReader(layers, window), keep_cache=False)
    return Batch(lm, samples, reading, other, partners)


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


def student(batch: Batch, config: Phase2Config, known: Sequence[Evidence], mode: str, purpose: str, trial: int) -> Student:
    """Select, place and encode: the states of a batch.

    Raises:
        DataError: a sample without any span to choose.
    """
    selections, placements = [], []
    for sample, its in zip(batch.samples, known, strict=True):
        rng = generator(config.seed, purpose, trial, sample.sample_id)
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
    prefix = encode(batch.lm, config.prefix.kv_source, batch.samples, placements, batch.reading.demo, batch.reading.offsets)
    made = Student(selections, placements, prefix, batch.samples)
    return _swapped(made, batch.partners) if selectors.uses_partner(mode) else made


def answer(batch: Batch, config: Phase2Config, state: Student) -> torch.Tensor:
    """Log-probabilities (B, vocabulary) after each sample's query, under its state."""
    rows = [sample.query_token_ids for sample in batch.samples]
    return next_token_logprobs(
        batch.lm, rows, batch.names, state.prefix, batch.lm.injection_layers(config.layer_scope.injection)
    )


def random_key(config: Phase2Config, trial: int) -> tuple[Any, ...]:
    """What a random trial depends on: conditions that agree in it share the trial."""
    select = config.select.model_copy(update={"mode": "random_span", "causal_drop_advisory": False})
    blocks = (select, config.layer_scope, config.prefix, config.injection)
    return ("random", trial, config.seed, config.prefix_len, *(block.model_dump_json() for block in blocks))


def random_answer(
    batch: Batch, config: Phase2Config, known: Sequence[Evidence], trial: int, announce: Announce
) -> tuple[list[Selection], list[Placement], torch.Tensor]:
    """One random trial: its states (without the K/V, which nothing needs any more) and answers."""

    def compute() -> tuple[list[Selection], list[Placement], torch.Tensor]:
        announce(f"random {trial + 1}/{config.eval.n_random_trials}", len(batch.samples))
        state = student(batch, config, known, "random_span", "random", trial)
        return state.selections, state.placements, answer(batch, config, state)

    return batch.once(random_key(config, trial), compute)


def _swapped(made: Student, partners: list[int] | None) -> Student:
    if partners is None:
        raise ValueError("wrong_demo needs a batch with partners")
    return Student(
        [made.selections[i] for i in partners],
        [made.placements[i] for i in partners],
        made.prefix.rows(partners),
        [made.owners[i] for i in partners],
    )


def _causal_drops(batch: Batch, config: Phase2Config, row: int) -> dict[int, float]:
    """KL(teacher || teacher without the span) for every candidate: the query over the demo's cache with the span masked."""

    def compute() -> dict[int, float]:
        lm, sample, demo, offset = batch.lm, batch.samples[row], batch.reading.demo, batch.reading.offsets[row]
        if demo is None:
            raise ValueError("causal drops need the teacher's cache")
        found = candidates(sample.token_kinds, config.select)
        drops: dict[int, float] = {}
        for at in range(0, len(found), lm.batch_size):
            part = found[at : at + lm.batch_size]
            hidden = demo.rows([row] * len(part)).hide([(offset + c.start, offset + c.end) for c in part])
            queries, names = [sample.query_token_ids] * len(part), [sample.sample_id] * len(part)
            without = next_token_logprobs(lm, queries, names, hidden)
            moved = kl(batch.reading.logprobs[row].expand_as(without), without).tolist()
            drops.update((c.start, value) for c, value in zip(part, moved, strict=True))
        return drops

    return batch.once(("causal_drop", row, config.select.span_len, config.select.center_policy), compute)
