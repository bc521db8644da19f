"""OFF prompts: base's own greedy answer to each, and how far a prefix moves the distribution at every token of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cedkv.inference.decoding import decode, end_tokens
from cedkv.inference.distributions import kl, log_softmax
from cedkv.inference.forward import Further, Ids
from cedkv.kv.transfers import download, index_on
from cedkv.models.devices import sum_dtype
from cedkv.models.loading import LanguageModel

ASKED = 8
"""Tokens after which a card is asked whether an answer still goes on: every time, the host would wait for it."""


@dataclass(frozen=True)
class OffBase:
    """What base says to N OFF prompts.

    logprobs: (N, vocabulary) of the token after the prompt.
    tokens: its greedy answer, without the token that ends it.
    further: (N, most tokens, vocabulary) logits after each of these tokens, in the model's dtype; what is beyond a prompt's
        answer means nothing. They are the largest tensor of a unit: 4 bytes x vocabulary for each token of an answer.
    """

    logprobs: torch.Tensor
    tokens: list[tuple[int, ...]]
    further: torch.Tensor

    def entropy(self) -> torch.Tensor:
        """Return the entropy of the distribution after each prompt, (N,) in nats."""
        return -(self.logprobs.exp() * self.logprobs).sum(dim=1)


class OffAnswers(NamedTuple):
    """What N OFF prompts are answered under prefixes.

    logprobs: (N, vocabulary) of the token after the prompt.
    kl: (N, most tokens), KL(here || base) after each token of base's answer, all of them given, in nats.
    same: (N, most tokens) bool, the greedy token there is base's.
    """

    logprobs: torch.Tensor
    kl: torch.Tensor
    same: torch.Tensor


class OffReader:
    """Compares with base, token by token, a pass over some OFF prompts that are followed by base's answers.

    Attributes:
        further: base's answers, to run behind the prompts.
    """

    def __init__(self, base: OffBase, prompts: Sequence[int]) -> None:
        """Take the prompts of the pass, by their index in ``base``."""
        self._base, self._prompts = base, prompts
        device = base.further.device
        self._kl = torch.zeros(len(prompts), base.further.shape[1], dtype=sum_dtype(device), device=device)
        self._same = torch.zeros_like(self._kl, dtype=torch.bool)
        self.further = Further([base.tokens[prompt] for prompt in prompts], self._visit)

    def read(self, logprobs: torch.Tensor) -> OffAnswers:
        """Return the answers after the pass; ``logprobs`` is (prompts, vocabulary) of the token after each prompt."""
        return OffAnswers(logprobs, self._kl, self._same)

    def _visit(self, position: int, rows: list[int], logprobs: torch.Tensor) -> None:
        at, prompts = (index_on(where, logprobs.device) for where in (rows, [self._prompts[row] for row in rows]))
        base = log_softmax(self._base.further[prompts, position - 1])
        self._kl[at, position - 1] = kl(logprobs, base)
        self._same[at, position - 1] = logprobs.argmax(dim=1) == base.argmax(dim=1)


def read_off_base(lm: LanguageModel, prompts: Sequence[Ids], names: Sequence[str], tokens: int) -> OffBase:
    """Answer OFF prompts by base, greedily, one token at a time over a growing cache.

    Args:
        names: ids of the prompts, for errors.
        tokens: length of an answer, which ends earlier where the model ends it (``end_tokens``); 0 for the distribution
            after the prompts alone.

    Raises:
        NumericsError: a logit is not finite.
    """
    ends = index_on(sorted(end_tokens(lm)), lm.device)
    answers = torch.zeros(len(prompts), tokens, dtype=torch.long, device=lm.device)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=lm.device)
    logprobs = further = torch.empty(0)

    def choose(done: int, rows: list[int], logits: torch.Tensor) -> torch.Tensor | None:
        nonlocal logprobs, further
        at = index_on(rows, lm.device)
        if done == 0:
            if not len(logprobs):
                further = logits.new_zeros(len(prompts), tokens, logits.shape[1])
            after = log_softmax(logits)
            logprobs = logprobs if len(logprobs) else after.new_empty(len(prompts), after.shape[1])
            logprobs[at], lengths[at] = after, 0
        else:
            further[at, done - 1] = logits
        if done == tokens:
            return None
        chosen = logits.argmax(dim=1)
        going = (lengths[at] == done) & ~torch.isin(chosen, ends)
        answers[at, done] = chosen
        lengths[at] += going
        asked = lm.device.type == "cpu" or (done + 1) % ASKED == 0
        return None if asked and not going.any() else chosen

    decode(lm, prompts, names, tokens, choose)
    given, counts = (tensor.tolist() for tensor in download([answers, lengths]))
    return OffBase(logprobs, [tuple(a[:n]) for a, n in zip(given, counts, strict=True)], further)
