"""The certificate's measurements: this pipeline against the model left alone, on a probe made of the model's own vocabulary.

*Left alone* is transformers' own eager attention, one unpadded row a call, with no mask, no positions and no cache given: what
anyone gets who loads the model and calls it. Gate A's measurements run on the same probe.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from cedkv.checks.consistency import measure, snapshot
from cedkv.checks.reference import CheckInputs
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ModelError
from cedkv.core.seeding import rng_for
from cedkv.core.values import OnEpisode, OnSample
from cedkv.inference.forward import Ids, kl, log_softmax, next_token_logprobs
from cedkv.inference.prefix import encode
from cedkv.inference.teacher import TeacherOutput, read_teacher
from cedkv.kv import attention
from cedkv.kv.attention import AttentionReader
from cedkv.kv.cache import KVPrefix
from cedkv.kv.positioning import place
from cedkv.models import cpu
from cedkv.models.loading import LanguageModel

DEMOS, QUERIES = (24, 17, 21, 24), (5, 3, 7, 4)
"""Tokens of the probe's demos and queries: of different lengths, so that batches are padded, two demos alike in length."""
WEIGHING = "cedkv-weighing"
"""Name of the eager implementation that tells the weights it gives to values."""
LEAST_REACH = 16
"""Tokens without which a model cannot be probed."""


@dataclass(frozen=True)
class Probed:
    """What was measured, the worst over the probe's samples.

    figures: check -> figure; KL in nats, ``attention_rows`` absolute, ``rotation_equivariance`` relative.
    floor: largest KL between two ways of calling the model left alone that are equal on paper, in nats.
    fault: smallest KL that a planted fault makes here (a query one position too far, a kept token missing), in nats.
    effect: mean KL(teacher || base) in nats.
    """

    figures: dict[str, float]
    floor: float
    fault: float
    effect: float


def probe_samples(lm: LanguageModel) -> list[OnSample]:
    """Samples of tokens drawn from the vocabulary, BOS in front where the tokenizer adds one.

    Raises:
        ModelError: the model's reach or vocabulary is too short.
    """
    reach = min([lm.capabilities.max_positions, *(limit.tokens for limit in lm.capabilities.context_limits)])
    size = min(len(lm.tokenizer), lm.model.config.get_text_config().vocab_size)
    special = set(lm.tokenizer.all_special_ids)
    ordinary = [token for token in range(size) if token not in special]
    if reach < LEAST_REACH or len(ordinary) < LEAST_REACH:
        raise ModelError(
            f"the model sees {reach} tokens and has {len(ordinary)} ordinary ones: {LEAST_REACH} of each are needed to probe it"
        )
    share = min(1.0, reach / (max(DEMOS) + max(QUERIES) + 2))
    start = [token for token in lm.tokenizer("").input_ids if token == lm.tokenizer.bos_token_id][:1]
    samples = []
    for i, (demo_length, query_length) in enumerate(zip(DEMOS, QUERIES, strict=True)):
        length, asked = max(4, math.floor(demo_length * share)), max(2, math.floor(query_length * share))
        drawn = rng_for(0, "certificate", 0, str(i)).choice(ordinary, length + asked).tolist()
        demo, query = tuple(start + drawn[len(start) : length]), tuple(drawn[length:])
        kinds = tuple("bos" if t < len(start) else "input" for t in range(length))
        samples.append(OnSample(OnEpisode(f"probe-{i}", "", "", "", ()), demo, query, query[0], kinds))  # type: ignore[arg-type]
    return samples


def _weighing(module: Any, query: Any, key: torch.Tensor, value: Any, mask: Any, **more: Any) -> tuple[Any, torch.Tensor]:
    """The model's own eager attention, and the weight each value has in it, (B, H_q, T_q, T): what comes out where the values
    are unit vectors. The map it returns itself may be another (Granite SWA's lacks the sink's share)."""
    eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]  # by that name in every model
    units = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
    return eager(module, query, key, value, mask, **more)[0], eager(module, query, key, units, mask, **more)[0].transpose(1, 2)


AttentionInterface.register(WEIGHING, _weighing)
AttentionMaskInterface.register(WEIGHING, eager_mask)


@contextmanager
def left_alone(model: Any, implementation: str = "eager") -> Iterator[None]:
    """The model as transformers gives it: eager attention, torch's own matrix products."""
    with cpu.torch_linear(model):
        model.set_attn_implementation(implementation)
        try:
            yield
        finally:
            model.set_attn_implementation(attention.NAME)


@torch.inference_mode()
def probe(lm: LanguageModel) -> Probed:
    """Measure everything on one probe; seconds at 135M."""
    samples = probe_samples(lm)
    names = [sample.sample_id for sample in samples]
    demos, queries = [s.demo_token_ids for s in samples], [s.query_token_ids for s in samples]
    layers = frozenset(range(lm.capabilities.n_layers))
    reading = read_teacher(lm, demos, queries, names, AttentionReader(layers, 2), keep=range(len(samples)))
    base = next_token_logprobs(lm, [s.base_ids for s in samples], names)
    slots = max(map(len, demos)) // 2 + 3
    config = Phase2Config().model_copy(update={"prefix_len": slots})
    kept = [(0, *range(1 + i, len(demo), 2)) for i, demo in enumerate(demos)]
    placements = [place(k, len(d), "compact", "null_pad", slots) for k, d in zip(kept, demos, strict=True)]
    prefix = encode(lm, "prefill", samples, placements, None, ())
    untouched = [snapshot(reading.demo_prefixes(range(len(samples)))), snapshot(prefix)]
    select = next_token_logprobs(lm, queries, names, prefix)
    given = CheckInputs(
        samples,
        samples,
        base,
        reading.logprobs,
        select,
        reading.demo_prefixes(range(len(samples))),
        placements,
        prefix,
        untouched,
        _once(),
    )
    figures = {name: max(values) for name, values in measure(lm, config, given).items()}
    short = [tuple(demo[t] for t in k) + query for demo, k, query in zip(demos, kept, queries, strict=True)]
    with left_alone(lm.model):
        alone = {
            "base": (base, _plainly(lm, [s.base_ids for s in samples])),
            "teacher": (reading.logprobs, _plainly(lm, [s.teacher_ids for s in samples])),
            "select": (select, _plainly(lm, short)),
        }
        floor = _batched_alone(lm, [s.teacher_ids for s in samples])
    with left_alone(lm.model, WEIGHING):
        figures["attention_rows"] = _rows(lm, samples, reading, layers)
    figures["left_alone"] = max(float(kl(ours, its).max()) for ours, its in alone.values())
    figures["slots_have_no_place"] = _gaps(lm, samples, kept, reading)
    figures["hidden_prefix"] = _hidden(lm, queries, names, prefix)
    return Probed(figures, floor, _fault(lm, queries, names, prefix, select), float(kl(reading.logprobs, base).mean()))


def _once() -> Callable[[Any, Callable[[], Any]], Any]:
    known: dict[Any, Any] = {}

    def once(key: Any, compute: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = compute()
        return known[key]

    return once


def _plainly(lm: LanguageModel, rows: Sequence[Ids]) -> torch.Tensor:
    """Log-probabilities after each row, (B, vocabulary), of a call with ids and nothing else."""
    return torch.cat([log_softmax(lm.model(torch.tensor([list(row)], device=lm.device)).logits[:, -1]) for row in rows])


def _batched_alone(lm: LanguageModel, rows: Sequence[Ids]) -> float:
    """KL between rows of one length called together and one by one: what this model's rounding does."""
    width = min(map(len, rows))
    same = [list(row[:width]) for row in rows]
    together = log_softmax(lm.model(torch.tensor(same, device=lm.device)).logits[:, -1])
    return float(kl(together, _plainly(lm, same)).max())


def _rows(lm: LanguageModel, samples: Sequence[OnSample], reading: TeacherOutput, layers: frozenset[int]) -> float:
    """Largest absolute difference, over layers, of the attention read and what eager gives to values, mean over heads."""
    worst = 0.0
    for row, sample in enumerate(samples):
        maps = lm.model(torch.tensor([list(sample.teacher_ids)], device=lm.device), output_attentions=True).attentions
        for at, layer in enumerate(sorted(layers)):
            expected = maps[layer][0].float().mean(dim=0)[-2:, : len(sample.demo_token_ids)]
            worst = max(worst, float((reading.rows[row][at] - expected).abs().max()))
    return worst


def _gaps(lm: LanguageModel, samples: Sequence[OnSample], kept: Sequence[Ids], reading: TeacherOutput) -> float:
    """KL(kept tokens in their places, in as many slots || the whole demo's slots with the rest hidden).

    Where a slot stands in the cache must not matter, only the position it was given.
    """
    names, queries = [s.sample_id for s in samples], [s.query_token_ids for s in samples]
    lengths = [len(s.demo_token_ids) for s in samples]
    placements = [place(k, n, "absolute", "shrink_to_selected", n) for k, n in zip(kept, lengths, strict=True)]
    demo = reading.demo_prefixes(range(len(samples)))
    few = encode(lm, "gather", samples, placements, demo, range(len(samples)))
    visible = torch.zeros_like(demo.visible)
    for row, tokens in enumerate(kept):
        visible[row, list(tokens)] = True
    whole = replace(demo, visible=visible)
    return float(kl(next_token_logprobs(lm, queries, names, few), next_token_logprobs(lm, queries, names, whole)).max())


def _hidden(lm: LanguageModel, queries: Sequence[Ids], names: Sequence[str], prefix: KVPrefix) -> float:
    """KL(a prefix that no layer sees || the same slots, masked out)."""
    masked = replace(prefix, visible=torch.zeros_like(prefix.visible))
    unseen = next_token_logprobs(lm, queries, names, prefix, frozenset())
    return float(kl(unseen, next_token_logprobs(lm, queries, names, masked)).max())


def _fault(lm: LanguageModel, queries: Sequence[Ids], names: Sequence[str], prefix: KVPrefix, select: torch.Tensor) -> float:
    """The smallest KL a planted fault makes, each the largest over the samples."""
    last = prefix.visible.cumsum(dim=1) == prefix.visible.sum(dim=1, keepdim=True)
    planted = (replace(prefix, query_start=prefix.query_start + 1), replace(prefix, visible=prefix.visible & ~last))
    return min(float(kl(next_token_logprobs(lm, queries, names, wrong), select).max()) for wrong in planted)
