"""What an arm answers: the distribution after the prompt, and every token of the right answer, all of them in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cedkv.inference.forward import Further, Ids
from cedkv.kv.transfers import index_on


class Answers(NamedTuple):
    """What B samples answer under one arm.

    logprobs: (B, vocabulary) of the token after the prompt.
    tokens: (B, most answer tokens), log-probability of each token of the right answer given those before it; 0 beyond its last
        one.
    correct: (B,) bool, every token of the right answer is the greedy one: what greedy decoding gives begins with the answer.
    """

    logprobs: torch.Tensor
    tokens: torch.Tensor
    correct: torch.Tensor

    @property
    def answer(self) -> torch.Tensor:
        """Log-probability of the whole answer, (B,)."""
        return self.tokens.sum(dim=1)

    def rows(self, index: Sequence[int]) -> Answers:
        """Return the answers of these rows, in this order, repeats allowed."""
        return Answers(*(tensor[index_on(index, tensor.device)] for tensor in self))


class AnswerReader:
    """Reads the right answers' log-probabilities off a pass over prompts that are followed by their answers.

    Attributes:
        further: the answers without their last token, to run behind the prompts; nothing where answers are one token.
    """

    def __init__(self, answers: Sequence[Ids]) -> None:
        """Take the right answers of B prompts, at least one token each."""
        self._answers = answers
        self._tokens = self._greedy = torch.empty(0)
        self.further = Further([answer[:-1] for answer in answers], self._visit)

    def read(self, logprobs: torch.Tensor) -> Answers:
        """Return the answers after the pass; ``logprobs`` is (B, vocabulary) of the token after each prompt."""
        self._visit(0, list(range(len(self._answers))), logprobs)
        return Answers(logprobs, self._tokens, self._greedy.all(dim=1))

    @torch.inference_mode()
    def _visit(self, position: int, rows: list[int], logprobs: torch.Tensor) -> None:
        if not len(self._tokens):
            self._tokens = logprobs.new_zeros(len(self._answers), max(map(len, self._answers)))
            self._greedy = torch.ones_like(self._tokens, dtype=torch.bool)
        at = index_on(rows, logprobs.device)
        tokens = index_on([self._answers[row][position] for row in rows], logprobs.device)
        self._tokens[at, position] = logprobs.gather(1, tokens[:, None])[:, 0]
        self._greedy[at, position] = logprobs.argmax(dim=1) == tokens
