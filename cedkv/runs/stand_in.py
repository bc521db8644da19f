"""A stand-in for a model whose weights are not loaded: a Llama of a few random numbers, on which the engine makes its passes.

Which tokens go through a model depends on the samples, the settings, and what the model supports; on its weights only through
the spans that are chosen and through where base's answers to OFF prompts end. So the engine can be rehearsed on a stand-in.
Token ids are replaced by their rank among those that occur: equal tokens stay equal, and the vocabulary is as small as the
samples allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cedkv.config.schema import KL_LIMIT, Phase2Config
from cedkv.core.values import OffSample, OnSample
from cedkv.inference.evidence import head_weights_key
from cedkv.inference.head_weights import fitted_scores
from cedkv.inference.passes import extra_queries, plan_passes
from cedkv.kv import attention
from cedkv.models.batching import Batching
from cedkv.models.capabilities import scope_layers
from cedkv.models.loading import LanguageModel
from cedkv.models.opening import ModelSpec
from cedkv.models.rope_detection import detect_rope_layouts

HIDDEN = 8
"""Size of a hidden state, and of its only head."""
SPARE_TOKENS = 128
"""Tokens of the vocabulary beyond those that occur: more than ``reporting.topk_tokens`` asks for at most."""
IdRanks = dict[int, int]
"""Token id -> its rank among the tokens that occur."""


@dataclass(frozen=True)
class RankedTokenizer:
    """A tokenizer whose token ids are ranks, and which ends no text: base answers OFF prompts at full length."""

    original: Any
    ranks: IdRanks
    eos_token_id: None = None

    def __call__(self, text: str, **options: Any) -> Any:
        """Return the token ids of a text, as ``input_ids``."""
        ids = self.original(text, **options).input_ids
        return SimpleNamespace(input_ids=[self.ranks.get(token, 0) for token in ids])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def rank_ids(spec: ModelSpec, configs: Sequence[Phase2Config], on: Sequence[OnSample], off: Sequence[OffSample]) -> IdRanks:
    """Return the rank of every token that the passes of these configurations run, or compare an answer with."""
    occurring: set[int] = set()
    for sample in on:
        occurring.update(sample.teacher_ids, sample.answer_token_ids, sample.other_query_ids or (), sample.label_token_ids)
    for prompt in off:
        occurring.update(prompt.token_ids)
    for extra in extra_queries(plan_passes(configs), spec.tokenizer, on[:1]).values():
        occurring.update(*extra.rows)
    return {token: rank for rank, token in enumerate(sorted(occurring))}


def ranked_on(sample: OnSample, ranks: IdRanks) -> OnSample:
    """Return a sample with ranks in place of token ids."""

    def ranked(ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(ranks[token] for token in ids)

    return replace(
        sample,
        demo_token_ids=ranked(sample.demo_token_ids),
        query_token_ids=ranked(sample.query_token_ids),
        answer_token_ids=ranked(sample.answer_token_ids),
        other_query_ids=None if sample.other_query_ids is None else ranked(sample.other_query_ids),
        label_token_ids=ranked(sample.label_token_ids),
    )


def ranked_off(prompt: OffSample, ranks: IdRanks) -> OffSample:
    """Return an OFF prompt with ranks in place of token ids."""
    return replace(prompt, token_ids=tuple(ranks[token] for token in prompt.token_ids))


def stand_in(spec: ModelSpec, configs: Sequence[Phase2Config], ranks: IdRanks) -> LanguageModel:
    """Return a model that makes the passes of the one that ``spec`` describes: same tokenizer, positions and passes' size.

    It has only as many layers as the scopes of the configurations need to be what they are in the model: all layers, or not.
    """
    n_layers = next(n for n in range(1, spec.capabilities.n_layers + 1) if _suffices(n, spec.capabilities.n_layers, configs))
    model_config = LlamaConfig(
        vocab_size=len(ranks) + SPARE_TOKENS,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=n_layers,
        num_attention_heads=1,
        max_position_embeddings=spec.capabilities.max_positions,
        initializer_range=0.3,  # with the usual 0.02 every token would be attended to alike
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(model_config, attn_implementation=attention.register()).eval()
    device, capabilities = torch.device("cpu"), replace(spec.capabilities, n_layers=n_layers)
    rotary = capabilities.positions == "rotary"
    layouts = detect_rope_layouts(model, device, capabilities.max_positions, KL_LIMIT["float32"]) if rotary else None
    nameless = dict.fromkeys(("model_revision", "model_commit", "gguf", "device_name"))
    meta = {"model_id": configs[0].model.id, "trust_remote_code": False, "torch_dtype": "float32", "device": "cpu"}
    meta |= {**nameless, "torch_threads": torch.get_num_threads(), "versions": {}}
    batching, tokenizer = Batching(configs[0].rows_per_pass, spec.device), RankedTokenizer(spec.tokenizer, ranks)
    lm = LanguageModel(model, tokenizer, capabilities, device, batching, layouts, meta)
    for score in fitted_scores(configs):
        lm.measured[head_weights_key(score.reading)] = torch.ones(n_layers, 1)
    return lm


def _suffices(n: int, n_layers: int, configs: Sequence[Phase2Config]) -> bool:
    """Return whether every scope is all of ``n`` layers where it is all of ``n_layers``, and only there."""
    for config in configs:
        for scope in (config.layer_scope.selection, config.layer_scope.injection):
            if not isinstance(scope, str) and max(scope) >= n:
                return False
            if (len(scope_layers(scope, n, "")) == n) != (len(scope_layers(scope, n_layers, "")) == n_layers):
                return False
    return True
