"""What runs after prefixes, one query or many: next-token distributions, text, and the arguments of a pass of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from transformers import DynamicCache

from cedkv.core.errors import ConfigError
from cedkv.core.text import near_match, preview
from cedkv.inference import generation
from cedkv.inference.context_window import require_fits
from cedkv.inference.forward import left_padded, next_token_logprobs
from cedkv.inference.generation import Sampling
from cedkv.kv.cache import KVPrefix, cache_argument
from cedkv.models.loading import LanguageModel
from cedkv.models.tokenizer import tokens_text
from cedkv.tasks.context_use import ContextUse

Rows = Sequence[tuple[int, ...]]
"""The tokens of queries."""


class PrefixCache(NamedTuple):
    """A fresh cache that holds a prefix, and what a forward pass over it must be told.

    past_key_values: the cache; grows in place, so each sequence of passes needs its own.
    attention_mask: (B, V) int64, 1 for kept tokens, 0 for null slots; a pass's mask is this one with a 1 for every token since.
    query_start: (B,) position of the query's first token. Not V: null slots take no position.
    """

    past_key_values: DynamicCache
    attention_mask: torch.Tensor
    query_start: torch.Tensor


def row_of(kv: KVPrefix, row: int, slots: int) -> KVPrefix:
    """Return one row of prefixes without the null slots that only the batch's longest row needs."""
    own = kv.rows([row])
    keys, values = (tuple(tensor[:, :, :slots] for tensor in layers) for layers in (own.keys, own.values))
    return KVPrefix(keys, values, own.visible[:, :slots], own.query_start)


def row_names(rows: Rows) -> list[str]:
    """Return what errors call these queries."""
    return [f"query {number}" for number in range(1, len(rows) + 1)]


class SamplingOptions(TypedDict, total=False):
    """How ``generate`` takes the next token; without any of them the most probable one."""

    do_sample: bool
    """True draws the token."""
    temperature: float
    """Divides the logits; 1 by default."""
    top_k: int
    """Draw among so many most probable tokens; all by default."""
    top_p: float
    """Draw among the most probable tokens that together have this probability; all by default."""
    seed: int
    """The same text for the same seed, whatever else is in the batch; by default one of torch's global generator."""


def sampling_of(options: SamplingOptions) -> Sampling | None:
    """Return how tokens are drawn; None where they are not.

    Raises:
        ConfigError: an unknown option, settings of a draw that is not made, or an impossible value.
    """
    known = list(SamplingOptions.__annotations__)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"generate takes no {preview(unknown[0])}{near_match(unknown[0], known)}")
    of_draws: dict[str, Any] = {name: value for name, value in options.items() if name != "do_sample" and value is not None}
    if not options.get("do_sample", False):
        if of_draws:
            raise ConfigError(f"generate: {', '.join(of_draws)} would change nothing without do_sample=True; set it too")
        return None
    sampling = Sampling(**{"seed": int(torch.randint(2**62, ())), **of_draws})
    sampling.warpers()
    return sampling


def check_room(
    lm: LanguageModel,
    rows: Rows,
    kv: KVPrefix,
    owners: Sequence[int],
    injection: str | list[int],
    new_tokens: int | None = None,
) -> frozenset[int] | None:
    """Return the layers that see the prefix, once prefixes, queries and new tokens are known to be within the model's limits.

    Args:
        owners: for each query, the row of ``kv`` it runs under.
        new_tokens: tokens to generate, of which the last one is not run; None for none.

    Raises:
        ConfigError: no queries, or no tokens to generate.
        ModelError: they are not; names the query, what it needs and the limit.
    """
    if not rows:
        raise ConfigError("query is an empty list; give at least one query")
    if new_tokens is not None and new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {new_tokens}; give at least 1")
    starts, width, given = kv.query_start.tolist(), max(map(len, rows)), (new_tokens or 1) - 1
    uses = [  # the slots that pad a shorter query count as well
        ContextUse("select", "query", name, starts[owner], kv.slots + width - len(row), len(row), given, "the prefix")
        for name, row, owner in zip(row_names(rows), rows, owners, strict=True)
    ]
    require_fits(lm.capabilities, uses)
    return lm.injection_layers(injection)


def logprobs_after(
    lm: LanguageModel, rows: Rows, kv: KVPrefix, owners: Sequence[int], injection: str | list[int]
) -> torch.Tensor:
    """Return the log-probabilities of the token after each query, (B, vocabulary); query i runs under prefix ``owners[i]``."""
    layers = check_room(lm, rows, kv, owners, injection)
    return next_token_logprobs(lm, rows, row_names(rows), kv, layers, owners)


def texts_after(
    lm: LanguageModel,
    rows: Rows,
    kv: KVPrefix,
    owners: Sequence[int],
    injection: str | list[int],
    max_new_tokens: int,
    sampling: Sampling | None,
) -> list[str]:
    """Return the text that follows each query, without control tokens; query i runs under prefix ``owners[i]``."""
    layers = check_room(lm, rows, kv, owners, injection, max_new_tokens)
    tokens = generation.generate(lm, rows, row_names(rows), kv, layers, owners, max_new_tokens, sampling)
    return [tokens_text(lm.tokenizer, row, skip_special_tokens=True) for row in tokens]


def cache_of(lm: LanguageModel, kv: KVPrefix, injection: str | list[int]) -> PrefixCache:
    """Return a fresh cache with prefixes. Raises ConfigError: only some layers see them, which no mask can say."""
    if lm.injection_layers(injection) is not None:
        raise ConfigError(
            f"layer_scope.injection = {injection} hides the prefix from some layers, which a cache and a mask cannot say; use "
            "generate or logprobs, or select with injection_layers='all'"
        )
    return PrefixCache(kv.fresh_cache(), kv.visible.long(), kv.query_start)


def inputs_of(lm: LanguageModel, rows: Rows, kv: KVPrefix, injection: str | list[int]) -> dict[str, Any]:
    """Return the arguments of a pass over prefixes and queries, see ``SelectedPrefix.inputs``; row i is under prefix i."""
    check_room(lm, rows, kv, range(len(rows)), injection)
    cache = cache_of(lm, kv, injection)
    ids, mask, positions = left_padded(rows, lm.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([cache.attention_mask.to(mask.device), mask], dim=1),
        "position_ids": positions + cache.query_start.to(mask.device)[:, None],
        **cache_argument(lm.model, cache.past_key_values),
    }
