"""Evidence by ablation: the teacher with spans of its demo hidden, and selections tried as prefixes.

Each is one or more query rows over the demo's cache, or prefixes of candidate selections, in batches of one sample. Results are
kept with the batch, so that checks and repetitions take them from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from cedkv.config.schema import Phase2Config
from cedkv.core.values import Selection
from cedkv.inference.batch import Batch
from cedkv.inference.distributions import kl
from cedkv.inference.forward import next_token_logprobs
from cedkv.inference.prefix import encode, kv_source
from cedkv.kv.positioning import place
from cedkv.kv.transfers import upload
from cedkv.selectors.base import candidates


def causal_drops(batch: Batch, config: Phase2Config, row: int) -> dict[int, float]:
    """Return start -> KL(teacher || teacher without the span) in nats for every candidate of a row.

    The query runs over the demo's cache with the span masked out, all candidates in one batch.
    """
    lm, sample, teacher = batch.lm, batch.samples[row], batch.teacher
    key = ("causal drop", sample.sample_id, config.select.span_len, config.select.center_policy)
    if key not in batch.drops:
        spans = candidates(sample.token_kinds, config.select)
        hidden = teacher.demo_prefixes([row] * len(spans)).hide([[(span.start, span.end)] for span in spans])
        queries, names = [sample.query_token_ids] * len(spans), [sample.sample_id] * len(spans)
        without = next_token_logprobs(lm, queries, names, hidden)
        drops = kl(teacher.logprobs[row].expand_as(without), without).tolist()
        batch.drops[key] = {span.start: drop for span, drop in zip(spans, drops, strict=True)}
    found: dict[int, float] = batch.drops[key]
    return found


def answer_odds(batch: Batch, row: int) -> Callable[[NDArray[np.bool_]], NDArray[np.float64]]:
    """Return the function of ``Evidence.answer_odds`` for a row.

    log p / (1 - p) of the teacher's greedy token, with the query over the demo's cache and the tokens that a mask leaves out
    hidden (ContextCite, Cohen-Wang et al. 2024). BOS is always visible.
    """
    sample, teacher = batch.samples[row], batch.teacher

    def compute(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        key = ("answer odds", sample.sample_id, masks.shape, masks.tobytes())
        if key not in batch.drops:
            demo = teacher.demo_prefixes([row] * len(masks))
            visible = demo.visible.clone()
            kept = torch.from_numpy(masks).clone()
            kept[:, : int(sample.has_bos)] = True
            visible[:, : kept.shape[1]] &= upload(kept, visible.device)
            queries, names = [sample.query_token_ids] * len(masks), [sample.sample_id] * len(masks)
            logprobs = next_token_logprobs(batch.lm, queries, names, replace(demo, visible=visible))
            batch.drops[key] = log_odds(logprobs, greedy_tokens(batch)[row]).cpu().numpy()
        found: NDArray[np.float64] = batch.drops[key]
        return found

    return compute


def greedy_tokens(batch: Batch) -> list[int]:
    """Return the teacher's greedy token of every sample."""
    return batch.cached("greedy tokens", lambda: batch.teacher.logprobs.argmax(dim=1).tolist())


def log_odds(logprobs: torch.Tensor, token: int) -> torch.Tensor:
    """Return log p / (1 - p) of a token from (B, vocabulary) log-probabilities, (B,); 1 - p is summed over the other tokens."""
    others = torch.cat([logprobs[:, :token], logprobs[:, token + 1 :]], dim=1).logsumexp(dim=1)
    return logprobs[:, token] - others


def divergence(batch: Batch, config: Phase2Config, row: int) -> Callable[[Sequence[Selection]], list[float]]:
    """Return the function of ``Evidence.divergence`` for a row: every selection encoded, placed and answered as configured."""
    lm, sample, teacher = batch.lm, batch.samples[row], batch.teacher
    modes = config.injection.positioning_mode, "shrink_to_selected"
    key = ("divergence", sample.sample_id, config.prefix.model_dump_json(), modes, str(config.layer_scope.injection))

    def compute(selections: Sequence[Selection]) -> list[float]:
        known: dict[tuple[int, ...], float] = batch.drops.setdefault(key, {})
        new = [kept for kept in dict.fromkeys(s.kept_tokens for s in selections) if kept not in known]
        if new:
            length = len(sample.demo_token_ids)
            placements = [place(kept, length, *modes, len(kept)) for kept in new]
            reads_cache = kv_source(config.prefix.kv_source).reads_demo_cache
            rows = [teacher.demo_row[row]] * len(new) if reads_cache else []
            replay = config.prefix.boundary_replay
            prefix = encode(lm, config.prefix.kv_source, [sample] * len(new), placements, teacher.demo, rows, replay)
            queries, names = [sample.query_token_ids] * len(new), [sample.sample_id] * len(new)
            injection = lm.injection_layers(config.layer_scope.injection)
            logprobs = next_token_logprobs(lm, queries, names, prefix, injection)
            values = kl(logprobs, teacher.logprobs[row].expand_as(logprobs)).tolist()
            known.update(zip(new, values, strict=True))
        return [known[s.kept_tokens] for s in selections]

    return compute
