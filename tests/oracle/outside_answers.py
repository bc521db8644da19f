"""Whole answers and base's own answers to OFF prompts of a finished run, found again by ``generate`` and by plain passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.oracle.outside import Plain, divergence

if TYPE_CHECKING:
    from tests.oracle.outside_run import Comparison

After = Callable[[Sequence[int]], np.ndarray]
"""Log-probabilities of an arm after its prompt and after each of some tokens behind it, (1 + tokens, vocabulary)."""
NEAR_TIE = 1e-4


def check_answer(
    found: Comparison, name: str, after: After, answer: Sequence[int], right: bool, logprob: float, generated: list[int] | None
) -> float:
    """Compare an arm's answer, token by token; return its log-probability.

    Args:
        after: of the arm; what it decodes greedily is found from it, one token at a time.
        right, logprob: as recorded.
        generated: what ``generate`` gives; None for an arm with a prefix.
    """
    decoded: list[int] = []
    while len(decoded) < len(answer):
        last = after(decoded)[-1]
        if np.ptp(np.sort(last)[-2:]) < NEAR_TIE:
            break
        decoded.append(int(last.argmax()))
    else:
        found.same(f"{name} correct", right, decoded == list(answer))
        if generated is not None:
            found.same(f"{name} generated", generated[: len(answer)] == list(answer), right)
    forced = after(answer[:-1])
    total = sum(logprobs[token] for logprobs, token in zip(forced, answer, strict=True))
    found.number("answer", logprob / len(answer), total / len(answer))  # a token: roundings add up over the answer
    return float(total)


def check_further(
    found: Comparison, plain: Plain, record: dict[str, Any], tokens: Sequence[int], under: After, off_tokens: int
) -> None:
    """Compare what is recorded along base's own answer to an OFF prompt.

    Args:
        tokens: of the prompt.
        under: of the select arm.
        off_tokens: ``eval.off_tokens`` of the run.
    """
    name, answer = record["sample_id"], record["further_token_ids"]
    generated = plain.generate(tokens, off_tokens)
    end = plain.model.generation_config.eos_token_id
    found.same(f"{name} base's own answer", answer, generated[: generated.index(end)] if end in generated else generated)
    found.same(f"{name} further figures", (len(record["further_kl"]), len(record["further_same"])), (len(answer), len(answer)))
    alone, moved = plain.after(tokens, answer), under(answer)
    found.number("kl", record["base_entropy"], -float(np.sum(np.exp(alone[0]) * alone[0])))
    for position in range(1, len(answer) + 1):
        found.number("kl", record["further_kl"][position - 1], divergence(moved[position], alone[position]))
        if np.ptp(np.sort(moved[position])[-2:]) >= NEAR_TIE:
            same = int(moved[position].argmax()) == int(alone[position].argmax())
            found.same(f"{name} greedy token after {position}", record["further_same"][position - 1], same)
