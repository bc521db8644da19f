"""Students: from the teacher's evidence to prefixes and answers, for a batch of samples and any number of conditions.

What does not depend on the condition is in the ``Batch``, each value computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import DataError
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, Placement, Selection
from cedkv.inference.batch import Announce, Batch
from cedkv.inference.evidence import read_evidence
from cedkv.inference.forward import next_token_logprobs
from cedkv.inference.prefix import encode_kept, kv_source
from cedkv.kv.cache import KVPrefix, Layers, assemble
from cedkv.kv.positioning import place
from cedkv.selectors.base import SelectionTask, create, select_tokens, selector_class


@dataclass(frozen=True)
class Choice:
    """What is kept of B samples' demos, and where it goes."""

    selections: list[Selection]
    placements: list[Placement]
    kv_source: str
    boundary_replay: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What the kept tokens' K/V depend on."""
        return (self.kv_source, self.boundary_replay, *((p.kept_tokens, p.key_positions) for p in self.placements))


@dataclass(frozen=True)
class Student:
    """The prefixes of B samples under one condition.

    owners: for each row the row of the sample whose demo the prefix is of; another one where the selector uses a partner.
    """

    choice: Choice
    prefix: KVPrefix
    owners: list[int]


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
    return Choice(selections, placements, config.prefix.kv_source, config.prefix.boundary_replay)


def _encode(batch: Batch, choice: Choice) -> tuple[Layers, Layers]:
    source = kv_source(choice.kv_source)
    rows = [batch.teacher.demo_row[row] for row in range(len(batch.samples))] if source.reads_demo_cache else []
    return encode_kept(
        batch.lm, choice.kv_source, batch.samples, choice.placements, batch.teacher.demo, rows, choice.boundary_replay
    )


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
    swapped = Choice(
        [choice.selections[i] for i in partners],
        [choice.placements[i] for i in partners],
        choice.kv_source,
        choice.boundary_replay,
    )
    return Student(swapped, student.prefix.rows(partners), partners)
