"""What an arm answers: the distribution after the prompt, and every token of the right answer, all of them in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cedkv.inference.forward import Further, Ids


class Answers(NamedTuple):
    """What B samples answer under one arm.

    logprobs: (B, vocabulary) of the token after the prompt.
    tokens: (B, most answer tokens) float64, log-probability of each token of the right answer given those before it; 0 beyond
        its last one.
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
        return Answers(*(tensor[list(index)] for tensor in self))


class AnswerReader:
    """Reads the right answers' log-probabilities off a pass over prompts that are followed by their answers.

    Attributes:
        further: the answers without their last token, to run behind the prompts; nothing where answers are one token.
    """

    def __init__(self, answers: Sequence[Ids]) -> None:
        """Take the right answers of B prompts, at least one token each."""
        self._answers = answers
        self._tokens = torch.zeros(len(answers), max(map(len, answers)), dtype=torch.float64)
        self._greedy = torch.ones(self._tokens.shape, dtype=torch.bool)
        self.further = Further([answer[:-1] for answer in answers], self._visit)

    def read(self, logprobs: torch.Tensor) -> Answers:
        """Return the answers after the pass; ``logprobs`` is (B, vocabulary) of the token after each prompt."""
        self._visit(0, list(range(len(self._answers))), logprobs)
        return Answers(logprobs, self._tokens, self._greedy.all(dim=1))

    def _visit(self, position: int, rows: list[int], logprobs: torch.Tensor) -> None:
        tokens = torch.tensor([self._answers[row][position] for row in rows], device=logprobs.device)
        self._tokens[rows, position] = logprobs.gather(1, tokens[:, None])[:, 0].cpu().double()
        self._greedy[rows, position] = (logprobs.argmax(dim=1) == tokens).cpu()
