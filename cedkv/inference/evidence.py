"""The teacher's evidence on a batch: what its passes say about each demo, computed once for all conditions.

The passes that any condition asks for are run together: demo + query, and over the demos' caches the other query, a null
query and a replay of the demo. What they read stays per layer and head on the device until a condition's aggregation reduces
it; what hides spans or tries selections runs when a selector first asks, and is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool1d

from cedkv.config.schema import Phase2Config
from cedkv.core.values import Evidence, OnSample
from cedkv.inference.ablation import answer_odds, causal_drops, divergence
from cedkv.inference.answers import AnswerReader
from cedkv.inference.batch import Announce, Batch
from cedkv.inference.distributions import require_finite
from cedkv.inference.passes import extra_queries, needed_evidence, plan_passes, replay_rows, span_drop, token_scores
from cedkv.inference.prefix import kv_source
from cedkv.inference.teacher import TeacherOutput, read_queries, read_teacher
from cedkv.kv.key_scores import key_scores
from cedkv.kv.readers import AttentionReader, layer_readers
from cedkv.kv.readings import QueryAttention, Reading, ReplayAttention, TokenScore, ValueNorm
from cedkv.kv.transfers import download
from cedkv.models.loading import LanguageModel
from cedkv.models.output_projection import grams
from cedkv.selectors.base import candidates


def read_batch(
    lm: LanguageModel,
    configs: Sequence[Phase2Config],
    samples: list[OnSample],
    partners: list[int] | None,
    announce: Announce,
    keep: Sequence[int] = (),
) -> Batch:
    """Run the teacher once for all configurations, and over its cache the other passes that a selector needs.

    Args:
        partners: see ``Batch``.
        keep: rows whose demo cache is kept in any case.

    Raises:
        DataError: another query is needed and a sample has none.
        ModelError: values are weighed, and the model's output projection is not known.
        NumericsError: a logit, key or value is not finite.
    """
    passes = plan_passes(configs)
    if keeps_every_demo(configs):
        keep = range(len(samples))
    names = [sample.sample_id for sample in samples]
    scopes = {score.scope for config in configs for score in token_scores(config)}
    if any(sample.gold_tokens is not None for sample in samples):
        scopes.add("all")  # attention to gold tokens is shown for every layer
    layers = frozenset().union(*(lm.selection_layers(scope) for scope in scopes))
    weigh = grams(lm) if any(reading.weighs_values for reading in passes.own) else {}

    def reader(readings: frozenset[Reading]) -> AttentionReader:
        return AttentionReader(layers, layer_readers(readings, weigh, lm.rope_layouts))

    announce("teacher", len(samples))
    demos, queries = [s.demo_token_ids for s in samples], [s.query_token_ids for s in samples]
    answers = AnswerReader([s.answer_token_ids for s in samples])
    teacher = read_teacher(lm, demos, queries, names, reader(passes.own), keep, answers.further)

    outputs: dict[str, TeacherOutput] = {}
    for name, extra in extra_queries(passes, lm.tokenizer, samples).items():
        announce(name, len(samples))
        owners = [teacher.demo_row[row] for row in range(len(samples))]
        rows, read = extra.rows, reader(extra.readings)
        outputs[name] = read_queries(lm, teacher.demo_kv(), owners, rows, names, read, extra.counts)
    return Batch(
        lm=lm,
        samples=samples,
        teacher=teacher,
        teacher_answers=answers.read(teacher.logprobs),
        other_query=outputs.get("other query"),
        null_query=outputs.get("null query"),
        replay=outputs.get("replay"),
        partners=partners,
    )


def keeps_every_demo(configs: Sequence[Phase2Config]) -> bool:
    """Return whether the K/V of every demo of a batch are kept, because a condition runs over them or takes K/V out of them."""
    return (
        plan_passes(configs).over_cache
        or not needed_evidence(configs).isdisjoint({"causal_drop", "answer_odds", "divergence"})
        or any(kv_source(c.prefix.kv_source).reads_demo_cache or c.eval.n_lds_masks for c in configs)
    )


def read_evidence(batch: Batch, config: Phase2Config) -> list[Evidence]:
    """Return what a configuration's selector may know about each sample."""
    needed = needed_evidence([config])
    configured, asked = token_scores(config)
    evidences = []
    for row, sample in enumerate(batch.samples):
        optional: dict[str, Any] = {"gold": sample.gold_tokens, "shots": sample.shot_tokens}
        if "causal_drop" in needed:
            optional["causal_drop"] = causal_drops(batch, config, row)
        if "span_drop" in needed:
            optional["span_drop"] = span_drops(batch, config, row)
        if "answer_odds" in needed:
            optional["answer_odds"] = answer_odds(batch, row)
        if "divergence" in needed:
            optional["divergence"] = divergence(batch, config, row)
        evidences.append(Evidence(token_score(batch, configured, row), token_score(batch, asked, row), **optional))
    return evidences


def span_drops(batch: Batch, config: Phase2Config, row: int) -> dict[int, float]:
    """Return start -> closed-form drop of every candidate of a row, summed over the layers of the selection scope."""
    layers, reading = batch.lm.selection_layers(config.layer_scope.selection), span_drop(config)

    def compute() -> list[torch.Tensor]:
        return download([batch.teacher.map(reading, each, layers).sum(dim=(0, 1)) for each in range(len(batch.samples))])

    drops = batch.cached(("span drops", reading, layers), compute)[row].tolist()
    return {span.start: drops[span.start] for span in candidates(batch.samples[row].token_kinds, config.select)}


def token_score(batch: Batch, score: TokenScore, row: int) -> NDArray[np.float64]:
    """Return a score of each demo token of one sample, (L,). Raises NumericsError: one of the batch is not finite."""

    def compute() -> list[NDArray[np.float64]]:
        layers, weights = batch.lm.selection_layers(score.scope), batch.lm.measured.get(head_weights_key(score.reading))
        scores = []
        for each, name in enumerate(batch.names):
            scores.append(pool(head_map(batch, score.reading, each, layers), score, weights))
            require_finite(scores[-1][None], "token scores", [name])
        return [pooled.double().numpy() for pooled in download(scores)]

    return batch.cached(("token scores", score), compute)[row]


def head_weights_key(reading: Reading) -> tuple[str, Reading]:
    """Return where ``LanguageModel.measured`` holds the fitted weights of a reading's heads, (layers, H)."""
    return ("head weights", reading)


def pool(per_head: torch.Tensor, score: TokenScore, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Aggregate a reading over heads, then layers, then neighbouring tokens.

    Args:
        per_head: (layers, H, L).
        weights: (layers, H), for ``heads="fitted"``.

    Returns:
        (L,).
    """
    if score.heads == "fitted":
        if weights is None:
            raise ValueError("head weights are not fitted: inference.head_weights.ensure_head_weights fits them")
        pooled = torch.einsum("nhl,nh->l", per_head, weights.to(per_head))
    else:
        by_layer = per_head.mean(dim=1) if score.heads == "mean" else per_head.amax(dim=1)
        pooled = by_layer.mean(dim=0) if score.layers == "mean" else by_layer.amax(dim=0)
    if score.kernel > 1:
        pooled = avg_pool1d(pooled[None], score.kernel, stride=1, padding=score.kernel // 2)[0]
    return pooled


def head_map(batch: Batch, reading: Reading, row: int, layers: frozenset[int]) -> torch.Tensor:
    """Return a reading of one sample, (layers, H, L) float32. Raises NumericsError: it is not finite."""
    if isinstance(reading, QueryAttention):
        source = batch.teacher if reading.query == "own" else batch.other_query
        found = _read(source, reading.rows, row, layers)
        if reading.null_query:
            found = found - _read(batch.null_query, reading.rows, row, layers)
    elif isinstance(reading, ReplayAttention):
        found = _read(batch.replay, replay_rows(reading), row, layers)
    elif reading.from_cache:
        length = len(batch.samples[row].demo_token_ids)
        demo = batch.teacher.demo_prefixes([row])
        scores = [key_scores(reading, demo.keys[n][0, :, :length], demo.values[n][0, :, :length]) for n in sorted(layers)]
        return torch.stack([score.to(scores[0].device) for score in scores])
    else:
        return batch.teacher.map(reading, row, layers)
    return found * batch.teacher.map(ValueNorm(), row, layers) if reading.weighs_values else found


def _read(source: TeacherOutput | None, reading: Reading, row: int, layers: frozenset[int]) -> torch.Tensor:
    if source is None:
        raise ValueError(f"{reading} was not read")
    return source.map(reading, row, layers)
