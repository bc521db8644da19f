"""Decoding one token at a time over a growing cache, as a model generates text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch

from cedkv.inference.batched import map_rows
from cedkv.inference.distributions import require_finite
from cedkv.inference.forward import Ids, forward_with_prefix, hidden_slots, left_padded, share_head
from cedkv.kv.attention import hide_prefix
from cedkv.kv.cache import KVPrefix, cache_argument, output_cache
from cedkv.models.loading import LanguageModel

Choose = Callable[[int, list[int], torch.Tensor], torch.Tensor | None]
"""Called with the number of tokens decoded so far, the rows of the pass and their logits, (rows, vocabulary); returns the next
token of each row, (rows,), or None to end the pass. A pass that ran out of memory starts anew."""


@torch.inference_mode()
def decode(
    lm: LanguageModel,
    rows: Sequence[Ids],
    names: Sequence[str],
    tokens: int,
    choose: Choose,
    prefix: KVPrefix | None = None,
    injection_layers: frozenset[int] | None = None,
) -> None:
    """Run rows, then up to ``tokens`` tokens that ``choose`` gives, each in a pass of its own over the growing cache.

    Args:
        rows, names, prefix, injection_layers: as in ``next_token_logprobs``; row i runs under prefix i.
        tokens: how many are run at most. ``choose`` is called once more than that.

    Raises:
        NumericsError: a logit is not finite.
    """
    rows, prefix, owners = share_head(lm, rows, names, prefix, injection_layers, None)

    def compute(indices: list[int]) -> torch.Tensor:
        under = None if prefix is None else prefix.rows([owners[i] for i in indices])
        steps = decoding_steps(lm, [rows[i] for i in indices], [names[i] for i in indices], under, injection_layers)
        logits = next(steps)
        for done in range(tokens + 1):
            chosen = choose(done, indices, logits)
            if chosen is None or done == tokens:
                break
            logits = steps.send(chosen)
        return torch.zeros(len(indices))

    map_rows(lm, [len(row) + tokens for row in rows], compute)


@torch.inference_mode()
def decoding_steps(
    lm: LanguageModel,
    rows: Sequence[Ids],
    names: Sequence[str],
    prefix: KVPrefix | None,
    injection_layers: frozenset[int] | None,
) -> Generator[torch.Tensor, torch.Tensor, None]:
    """Yield the logits of the next token, (B, vocabulary), and be sent the token that each row goes on with, (B,); without end.

    Args:
        rows, names, prefix, injection_layers: as in ``decode``; all rows are in one pass.

    Raises:
        NumericsError: a logit is not finite.
    """
    ids, mask, positions = left_padded(rows, lm.device)
    hidden = None
    if prefix is None:
        output = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    else:
        output = forward_with_prefix(lm.model, lm.device, rows, prefix, injection_layers, logits_to_keep=1)
        mask = torch.cat([prefix.visible.to(mask), mask], dim=1)
        positions, hidden = positions + prefix.query_start.to(mask.device)[:, None], hidden_slots(prefix, injection_layers)
    place = positions[:, -1:]
    while True:
        logits = output.logits[:, -1]
        require_finite(logits, "logits", names)
        tokens = yield logits
        mask, place = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), place + 1
        with hide_prefix(hidden):
            output = lm.model(
                input_ids=tokens[:, None].to(lm.device),
                attention_mask=mask,
                position_ids=place,
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(lm.model, output_cache(output)),
            )


def end_tokens(lm: LanguageModel) -> frozenset[int]:
    """Return the tokens that end a text, by the model's generation settings, its configuration, or the tokenizer."""
    ends: set[int] = set()
    for source in (getattr(lm.model, "generation_config", None), lm.model.config.get_text_config(), lm.tokenizer):
        end = getattr(source, "eos_token_id", None)
        ends |= set(end if isinstance(end, list | tuple) else [] if end is None else [end])
    return frozenset(ends)
