"""Decoding one token at a time over a growing cache, as a model generates text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cedkv.inference.forward import (
    Ids,
    forward_with_prefix,
    hidden_slots,
    left_padded,
    map_rows,
    require_finite,
    share_head,
)
from cedkv.kv.attention import hide_prefix
from cedkv.kv.cache import KVPrefix
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
        pass_rows, pass_names = [rows[i] for i in indices], [names[i] for i in indices]
        ids, mask, positions = left_padded(pass_rows, lm.device)
        hidden = None
        if prefix is None:
            output = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        else:
            under = prefix.rows([owners[i] for i in indices])
            output = forward_with_prefix(lm.model, lm.device, pass_rows, under, injection_layers, logits_to_keep=1)
            mask = torch.cat([under.visible.to(mask.dtype), mask], dim=1)
            positions, hidden = positions + under.query_start[:, None], hidden_slots(under, injection_layers)
        place = positions[:, -1:]
        for done in range(tokens + 1):
            logits = output.logits[:, -1]
            require_finite(logits, "logits", pass_names)
            chosen = choose(done, indices, logits)
            if chosen is None or done == tokens:
                break
            mask, place = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), place + 1
            with hide_prefix(hidden):
                output = lm.model(
                    input_ids=chosen[:, None].to(lm.device),
                    attention_mask=mask,
                    position_ids=place,
                    past_key_values=output.past_key_values,
                    use_cache=True,
                    logits_to_keep=1,
                )
        return torch.zeros(len(indices))

    map_rows(lm, [len(row) + tokens for row in rows], compute)
