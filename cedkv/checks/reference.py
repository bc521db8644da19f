"""Gate A, second half: what the arms did, computed again in another way: in one row and one pass without any cache, in
float64, by the rules written a second time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cedkv.checks.base import CheckInputs, MeasuredCheck, relative
from cedkv.config.extensions import KV_SOURCES, PADDING, POSITIONING
from cedkv.config.schema import Phase2Config
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, OffSample, OnSample, Placement, Selection
from cedkv.inference.batch import Batch
from cedkv.inference.distributions import kl, log_softmax
from cedkv.inference.evidence import token_score
from cedkv.inference.forward import Ids, forward_with_prefix, next_token_logprobs, prefill
from cedkv.inference.passes import token_scores
from cedkv.inference.prefix import encode
from cedkv.kv.cache import KVPrefix
from cedkv.models.loading import LanguageModel
from cedkv.selectors.base import SelectionTask, create, select_tokens


def alone_batch(inputs: CheckInputs, sample: OnSample) -> Batch:
    """Return one sample in a batch of its own, with the teacher's passes over it."""
    batch: Batch = inputs.cached(("alone", sample.sample_id), lambda: inputs.alone(sample))
    return batch


def alone_prefix(lm: LanguageModel, config: Phase2Config, inputs: CheckInputs, row: int) -> KVPrefix:
    """Return a row's prefix, made in a batch of one."""
    owner, placement = inputs.owners[row], inputs.placements[row]
    source = config.prefix.kv_source
    demo = alone_batch(inputs, owner).teacher.demo if KV_SOURCES.get(source).reads_demo_cache else None
    return encode(lm, source, [owner], [placement], demo, [0], config.prefix.boundary_replay)


def alone_student(
    lm: LanguageModel, config: Phase2Config, inputs: CheckInputs, row: int, query: Sequence[int], name: str
) -> torch.Tensor:
    """Return log-probabilities (1, vocabulary) after a query under a row's prefix, everything in batches of one.

    Args:
        name: sample id of the query, for errors.
    """
    prefix = alone_prefix(lm, config, inputs, row)
    return next_token_logprobs(lm, [query], [name], prefix, lm.injection_layers(config.layer_scope.injection))


def alone_base(lm: LanguageModel, inputs: CheckInputs, sample: OnSample) -> torch.Tensor:
    """Return base's log-probabilities on one sample in a batch of its own, (1, vocabulary)."""
    logprobs: torch.Tensor = inputs.cached(
        ("base alone", sample.sample_id), lambda: next_token_logprobs(lm, [sample.base_ids], [sample.sample_id])
    )
    return logprobs


def is_one_pass(lm: LanguageModel, config: Phase2Config) -> bool:
    """Return whether a student is one uncached pass of kept tokens and query: when the kept tokens see each other only and
    every layer sees them."""
    isolated = KV_SOURCES.get(config.prefix.kv_source).isolated
    return bool(isolated and lm.injection_layers(config.layer_scope.injection) is None)


class AttentionAlone(MeasuredCheck):
    """Token scores of a batch of one = those that spans were selected by.

    Largest difference of a demo's scores over the largest score: the configured attention, and the selector's own score. A
    unit without a sample of Gate A has its last sample looked at.

    Why: spans must be chosen by the sample's own scores. Cannot see: a score that is wrong alone and in a batch alike; the
    certificate compares attention with the eager implementation's.
    """

    name, unit = "attention_alone", "relative"
    of_every_unit = True

    def limit(self, config: Phase2Config) -> float:
        return config.difference_limit("batch_kl_max")

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        configured, asked = token_scores(config)
        errors = []
        for owner, evidence in zip(inputs.owners, inputs.evidence, strict=True):
            batch = alone_batch(inputs, owner)
            pairs = ((configured, evidence.attention), (asked, evidence.scores))
            errors.append(max(_difference(token_score(batch, score, 0), batched) for score, batched in pairs))
        return errors


def _difference(alone: NDArray[np.float64], batched: NDArray[np.float64]) -> float:
    if alone.shape != batched.shape:
        return 1.0
    return relative(float(np.abs(alone - batched).max()), float(np.abs(alone).max()))


class SelectionRules(MeasuredCheck):
    """Kept tokens are BOS, sinks and the selector's spans, at the positions of the configured modes.

    1 for a sample whose kept tokens, positions or slots are others, else 0. Positions and slots of built-in modes are
    written here a second time; those of other packages are what their own mode says.

    Why: what is kept must be what the selector chose from the evidence, where the mode puts it. Cannot see: wrong evidence,
    and a selector's own mistake: it is asked again.
    """

    name, unit = "selection_rules", "samples"

    def limit(self, config: Phase2Config) -> float:
        return 0.0

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float]:
        rows = zip(inputs.owners, inputs.selections, inputs.evidence, inputs.placements, strict=True)
        return [0.0 if _follows_rules(config, *row) else 1.0 for row in rows]


def _follows_rules(
    config: Phase2Config, owner: OnSample, selection: Selection, evidence: Evidence, placement: Placement
) -> bool:
    rng = rng_for(config.seed, "select", 0, owner.sample_id)
    expected = select_tokens(create(config.select), SelectionTask(config.select, owner.token_kinds, evidence, rng))
    length = len(owner.demo_token_ids)
    kept = set(range(min(int(owner.has_bos) + config.select.keep_sink, length)))
    kept |= {token for span in expected.spans for token in range(span.start, span.end)}
    positions, start = _positions(config, sorted(kept), owner)
    by_rule = Placement(tuple(sorted(kept)), tuple(positions), start, _slots(config, len(kept)))
    return selection.spans == expected.spans and selection.kept_tokens == by_rule.kept_tokens and placement == by_rule


class LeftAlone(MeasuredCheck):
    """Select = kept tokens and query in one uncached pass of one row.

    KL(one uncached pass at the positions the mode means || select). It applies where a student is such a pass.

    Why: it holds the whole way of the select arm (encode, place, pad, inject, batch) against the simplest computation of
    the same thing. Cannot see: prefixes taken from the demo's cache, or hidden from some layers: it does not apply to them.
    """

    name, threshold = "left_alone", "batch_kl_max"
    counts_to_floor = True

    def expected(self, config: Phase2Config) -> bool:
        return bool(KV_SOURCES.get(config.prefix.kv_source).isolated and config.layer_scope.injection == "all")

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float] | None:
        if not is_one_pass(lm, config):
            return None
        kls = [
            kl(_uncached(lm, config, owner, selection, sample.query_token_ids), select[None])
            for sample, owner, selection, select in zip(
                inputs.samples, inputs.owners, inputs.selections, inputs.select, strict=True
            )
        ]
        return torch.cat(kls).tolist()


class FirstLayer(MeasuredCheck):
    """K/V of the first layer taken from a demo's cache = the model's own at those positions.

    Largest difference over the largest value. In the first layer K/V depend on nothing but token and position, wherever
    they were taken from.

    Why: it is the one layer whose gathered K/V can be known without what the demo's tokens saw. Cannot see: deeper layers.
    """

    name, unit, threshold = "first_layer", "relative", "rotation_rel_error_max"

    def expected(self, config: Phase2Config) -> bool:
        return bool(KV_SOURCES.get(config.prefix.kv_source).reads_demo_cache)

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float] | None:
        if not self.expected(config):
            return None
        kept = [selection.kept_tokens for selection in inputs.selections]
        tokens = [[owner.demo_token_ids[t] for t in row] for owner, row in zip(inputs.owners, kept, strict=True)]
        positions = [_positions(config, row, owner)[0] for owner, row in zip(inputs.owners, kept, strict=True)]
        keys, values = prefill(lm, tokens, positions, inputs.names)
        errors = []
        for row, tokens_kept in enumerate(kept):
            n = len(tokens_kept)
            pairs = ((inputs.prefix.keys[0], keys[0]), (inputs.prefix.values[0], values[0]))
            errors.append(float(np.max([_relative(of[row, :, :n], own[row, :, :n]) for of, own in pairs])))
        return errors


class BoundaryReplay(MeasuredCheck):
    """Every kept token run again = the prefix of prefill.

    KL(select with all runs of kept tokens replayed whole || select with K/V of prefill), at the same positions. It applies
    where ``prefix.boundary_replay`` is set.

    Why: a replay of everything is a prefill. Cannot see: how many tokens the run itself replays.
    """

    name, threshold = "boundary_replay", "batch_kl_max"
    counts_to_floor = True

    def expected(self, config: Phase2Config) -> bool:
        return config.prefix.boundary_replay > 0

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float] | None:
        if not self.expected(config):
            return None
        demos = [alone_batch(inputs, owner).teacher.demo for owner in inputs.owners]
        injection = lm.injection_layers(config.layer_scope.injection)
        kls = []
        for demo, owner, placement, query, name in zip(
            demos, inputs.owners, inputs.placements, inputs.queries, inputs.names, strict=True
        ):
            whole = len(placement.kept_tokens)
            replayed = encode(lm, config.prefix.kv_source, [owner], [placement], demo, [0], whole)
            prefilled = encode(lm, "prefill", [owner], [placement], None, ())
            pair = (next_token_logprobs(lm, [query], [name], prefix, injection) for prefix in (replayed, prefilled))
            kls.append(float(kl(*pair)))
        return kls


class UnseenLayers(MeasuredCheck):
    """What layers outside layer_scope.injection hold changes nothing.

    KL(select with other K/V in those layers || select).

    Why: a layer that must not see the prefix must not, whatever is in it. Cannot see: whether the other layers see it.
    """

    name, threshold = "unseen_layers", "batch_kl_max"

    def expected(self, config: Phase2Config) -> bool:
        return False

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> list[float] | None:
        injection = lm.injection_layers(config.layer_scope.injection)
        if injection is None:
            return None

        def negated(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(t if layer in injection else -t for layer, t in enumerate(tensors))

        changed = replace(inputs.prefix, keys=negated(inputs.prefix.keys), values=negated(inputs.prefix.values))
        return kl(next_token_logprobs(lm, inputs.queries, inputs.names, changed, injection), inputs.select).tolist()


class OffAlone(MeasuredCheck):
    """An OFF prompt in a batch of one = in the batch, under the prefix of its ON sample.

    KL(an OFF prompt behind that prefix, alone || in the batch used), for the longest two prompts of every unit and its
    shortest one.

    Why: harm means nothing unless it is measured under the right prefix, and a long prompt must not change those beside it.
    Cannot see: what is wrong in the OFF prompt alone, and prompts that were not taken.
    """

    name, threshold = "off_alone", "batch_kl_max"
    counts_to_floor = of_off_prompts = True

    def expected(self, config: Phase2Config) -> bool:
        return False

    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> Sequence[float | None] | None:
        if not inputs.off:
            return None
        kls: list[list[float]] = [[] for _ in inputs.samples]
        for row, prompt, batched in inputs.off:
            kls[row].append(float(kl(off_alone(lm, config, inputs, row, prompt)[:1], batched[None])))
        return [float(np.max(of_row)) if of_row else None for of_row in kls]  # NaN stays NaN


def off_alone(lm: LanguageModel, config: Phase2Config, inputs: CheckInputs, row: int, prompt: OffSample) -> torch.Tensor:
    """Return the log-probabilities after an OFF prompt under a row's prefix, and after each token of base's answer to it.

    Everything is in batches of one, prompt and answer in one row as if the answer belonged to the prompt.

    Returns:
        (1 + tokens of the answer, vocabulary).
    """
    answer = next((tokens for _, other, tokens, _ in inputs.off_further if other is prompt), ())

    def compute() -> torch.Tensor:
        if is_one_pass(lm, config):
            return _uncached(lm, config, inputs.owners[row], inputs.selections[row], prompt.student_ids, answer)
        return _alone_behind_prefix(lm, config, inputs, row, prompt.student_ids, answer)

    return inputs.cached_here(f"OFF alone {prompt.sample_id}", compute)


@torch.inference_mode()
def _alone_behind_prefix(
    lm: LanguageModel, config: Phase2Config, inputs: CheckInputs, row: int, query: Ids, given: Ids
) -> torch.Tensor:
    prefix, injection = alone_prefix(lm, config, inputs, row), lm.injection_layers(config.layer_scope.injection)
    tokens, keep = [[*query, *given]], 1 + len(given)
    output = forward_with_prefix(lm.model, lm.device, tokens, prefix, injection, logits_to_keep=keep)
    return log_softmax(output.logits[0, -keep:])


def _positions(config: Phase2Config, kept: Sequence[int], owner: OnSample) -> tuple[list[int], int]:
    """Return positions of kept tokens and of the query, written apart from ``kv.positioning`` for the built-in modes."""
    mode, length = config.injection.positioning_mode, len(owner.demo_token_ids)
    if mode == "absolute":
        return list(kept), length
    if mode == "compact":
        return list(range(len(kept))), len(kept)
    positions, start = POSITIONING.get(mode)(kept, length)
    return list(positions), start


def _slots(config: Phase2Config, n_kept: int) -> int:
    """Return the slots of a prefix, written apart from ``kv.positioning`` for the built-in modes."""
    room = max(config.prefix_len, n_kept)
    if config.prefix.padding_mode in PADDING.builtin:
        return room if config.prefix.padding_mode == "null_pad" else n_kept
    return int(PADDING.get(config.prefix.padding_mode)(n_kept, room))


@torch.inference_mode()
def _uncached(
    lm: LanguageModel, config: Phase2Config, owner: OnSample, selection: Selection, query: Ids, given: Ids = ()
) -> torch.Tensor:
    """Return log-probabilities after kept tokens and query in one row, by the model's own forward pass.

    Returns:
        (1 + given, vocabulary): after the query, and after each of the given tokens that follow it.
    """
    positions, start = _positions(config, selection.kept_tokens, owner)
    kept, tokens, keep = [owner.demo_token_ids[t] for t in selection.kept_tokens], [*query, *given], 1 + len(given)
    ids = torch.tensor([[*kept, *tokens]], device=lm.device)
    places = torch.tensor([[*positions, *range(start, start + len(tokens))]], device=lm.device)
    output: Any = lm.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places, use_cache=False, logits_to_keep=keep
    )
    return log_softmax(output.logits[0, -keep:])


def _relative(values: torch.Tensor, expected: torch.Tensor) -> float:
    return relative(float((values - expected).float().abs().max()), float(expected.float().abs().max()))
