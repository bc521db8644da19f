"""Generate text after a prefix, greedily or by sampling, for a batch of queries.

The loop is written out rather than left to ``model.generate``, for three reasons. Positions go on from ``query_start``, which
is neither the length of the cache nor that of the mask (null slots take no position), and how ``generate`` continues given
``position_ids`` has changed between releases of transformers. ``generate`` fills whatever it is not told from the
checkpoint's ``generation_config`` (of Qwen2.5-Instruct: a repetition penalty), so that its greedy token would not be the
model's. And it draws all rows of a batch from one global random state, so that a row's text would depend on its neighbours.
What sampling does to logits is transformers' own (``LogitsProcessorList`` and its warpers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cedkv.core.errors import ConfigError
from cedkv.core.seeding import rng_for
from cedkv.core.text import one_line
from cedkv.inference.decoding import decoding_steps, end_tokens
from cedkv.inference.distributions import log_softmax
from cedkv.inference.forward import Ids
from cedkv.kv.cache import KVPrefix
from cedkv.models.loading import LanguageModel
from cedkv.models.tokenizer import tokens_text


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    seed: of the draws; each row's depend on the seed and its own tokens alone.
    temperature: divides logits; above 0. top_k: only so many most probable tokens; None for all. top_p: only the most
    probable tokens that together have this probability; None for all.
    """

    seed: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def warpers(self) -> LogitsProcessorList:
        """Return what changes logits before a token is drawn, in transformers' order.

        Raises:
            ConfigError: an impossible value.
        """
        try:
            warpers: list[Any] = [] if self.temperature == 1 else [TemperatureLogitsWarper(float(self.temperature))]
            warpers += [] if self.top_k is None else [TopKLogitsWarper(self.top_k)]
            warpers += [] if self.top_p is None else [TopPLogitsWarper(float(self.top_p))]
        except ValueError as error:
            raise ConfigError(f"sampling: {one_line(error)}") from None
        return LogitsProcessorList(warpers)


class _Draws:
    """Draws the next token of B rows; a row's draws do not depend on the other rows."""

    def __init__(self, sampling: Sampling, keys: Sequence[tuple[int, str]]) -> None:
        self._warpers = sampling.warpers()
        self._rngs = [rng_for(sampling.seed, "generate", occurrence, row) for occurrence, row in keys]

    def __call__(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Return the token of each row, (B,), drawn by inverting the cumulative distribution."""
        cumulative = self._warpers(None, logprobs).softmax(dim=-1).cumsum(dim=-1)
        points = torch.tensor([[rng.random()] for rng in self._rngs], dtype=cumulative.dtype, device=cumulative.device)
        drawn = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)[:, 0]
        return drawn.clamp_max(cumulative.shape[1] - 1)


def generate(
    lm: LanguageModel,
    rows: Sequence[Ids],
    names: Sequence[str],
    prefix: KVPrefix,
    injection_layers: frozenset[int] | None,
    owners: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Return the tokens that follow each of B rows, without the token that ends a text; arguments as in ``stream_tokens``."""
    generated: list[list[int]] = [[] for _ in rows]
    keys = draw_keys(rows)

    def compute(indices: list[int]) -> list[list[int]]:
        steps = stream_tokens(
            lm,
            [rows[i] for i in indices],
            [names[i] for i in indices],
            prefix,
            injection_layers,
            [owners[i] for i in indices],
            max_new_tokens,
            sampling,
            [keys[i] for i in indices],
        )
        by_row: list[list[int]] = [[] for _ in indices]
        for step in steps:
            for tokens, token in zip(by_row, step, strict=True):
                if token is not None:
                    tokens.append(token)
        return by_row

    for indices, found in lm.batching.passes([len(row) for row in rows], compute):
        for i, tokens in zip(indices, found, strict=True):
            generated[i] = tokens
    return generated


def draw_keys(rows: Sequence[Ids]) -> list[tuple[int, str]]:
    """Return what each row's draws depend on beside the seed: its tokens, and the how-manieth of equal rows it is."""
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        text = ",".join(map(str, row))
        keys.append((seen[text], text))
        seen[text] += 1
    return keys


def stream_tokens(
    lm: LanguageModel,
    rows: Sequence[Ids],
    names: Sequence[str],
    prefix: KVPrefix,
    injection_layers: frozenset[int] | None,
    owners: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    keys: Sequence[tuple[int, str]] | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each of B rows, step by step, until all rows have ended or ``max_new_tokens`` is reached.

    Args:
        rows: the queries' tokens.
        names: of the rows, for errors.
        prefix: the injected prefixes.
        injection_layers: layers that see the prefix; None for all.
        owners: for each row, the row of ``prefix`` it runs under.
        sampling: None takes the most probable token.
        keys: of ``draw_keys``; None for those of these rows.

    Yields:
        A token per row; None for a row that has ended.

    Raises:
        ConfigError: ``sampling`` has an impossible value.
        NumericsError: a logit is not finite.
    """
    draw = None if sampling is None else _Draws(sampling, draw_keys(rows) if keys is None else keys)
    ended, ends = [False] * len(rows), end_tokens(lm)
    steps = decoding_steps(lm, rows, names, prefix.rows(owners), injection_layers)
    logits = next(steps)
    for left in reversed(range(max_new_tokens)):
        logprobs = log_softmax(logits)
        tokens = logprobs.argmax(dim=-1) if draw is None else draw(logprobs)
        chosen = tokens.tolist()
        ended = [over or token in ends for over, token in zip(ended, chosen, strict=True)]
        yield [None if over else token for over, token in zip(ended, chosen, strict=True)]
        if all(ended) or not left:
            return
        logits = steps.send(tokens)


def pieces_of(tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Yield the text of tokens in pieces, each as soon as it is certain; joined, the pieces are the text of all tokens.

    A character may take several tokens: what could still become another character is held back.
    """
    seen, given = list[int](), 0
    for token in tokens:
        seen.append(token)
        certain = tokens_text(tokenizer, seen, skip_special_tokens=True).rstrip("\ufffd")
        if len(certain) > given:
            yield certain[given:]
            given = len(certain)
    if rest := tokens_text(tokenizer, seen, skip_special_tokens=True)[given:]:
        yield rest
