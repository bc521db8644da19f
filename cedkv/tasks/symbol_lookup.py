"""Built-in ON episodes: look up the symbol that a demonstration pairs with an invented word.

    Word: blick          x pairs, then the query     Word: dax
    Symbol: red                                      Symbol:            (answer: the symbol dax was paired with)

The words are invented, so a model cannot know the answer without the demonstration. The symbols are colours, each a single
token of the tokenizer where it follows a query (``single_token_symbols``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cedkv.core.errors import DataError
from cedkv.core.seeding import rng_for
from cedkv.core.values import OnEpisode, TokenKind
from cedkv.tasks.base import Task, TaskRequest
from cedkv.tasks.tokenize import single_token_symbols

SYMBOLS = ("red", "blue", "green", "black", "white", "yellow", "orange", "purple", "brown", "pink", "gray", "gold")
_ONSETS = ("b", "bl", "br", "d", "dr", "f", "fl", "g", "gl", "gr", "k", "kl", "l", "m", "n", "p", "pl", "r", "s", "sk",
           "sl", "sn", "t", "tr", "v", "w", "z", "zw")  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "oo", "ai")
_CODAS = ("b", "ck", "d", "ft", "g", "lk", "mp", "ng", "nt", "p", "sk", "t", "v", "x", "zz")


def invented_word(rng: np.random.Generator, taken: set[str]) -> str:
    """Return a pronounceable word that is not in ``taken``; of two syllables, because one gives too many real words."""
    while True:
        syllables = [_ONSETS[rng.integers(len(_ONSETS))] + _VOWELS[rng.integers(len(_VOWELS))] for _ in range(2)]
        word = "".join(syllables) + _CODAS[rng.integers(len(_CODAS))]
        if word not in taken:
            return word


def episode(index: int, seed: int, pairs: int, symbols: Sequence[str], forbidden: frozenset[str]) -> OnEpisode:
    """Return episode ``index`` of a seed, which is independent of all other indices.

    Args:
        pairs: number of word-symbol pairs in the demo.
        symbols: symbols that are single tokens of the tokenizer, at least ``pairs`` of them.
        forbidden: words that must not be used, because they occur in OFF prompts.
    """
    sample_id = f"on-{seed}-{index:05d}"
    rng = rng_for(seed, "symbol_lookup", 0, sample_id)
    taken = set(forbidden) | set(symbols)
    words: list[str] = []
    for _ in range(pairs):
        words.append(invented_word(rng, taken))
        taken.add(words[-1])
    answers = [symbols[i] for i in rng.permutation(len(symbols))[:pairs]]
    queried = int(rng.integers(pairs))
    other = int(queried + 1 + rng.integers(pairs - 1)) % pairs
    demo = ""
    shots: list[tuple[int, int]] = []
    kinds: list[tuple[int, int, TokenKind]] = []
    for word, symbol in zip(words, answers, strict=True):
        pair_start = len(demo)
        pieces: tuple[tuple[str, TokenKind], ...] = (
            ("Word:", "delimiter"),
            (f" {word}", "input"),
            ("\nSymbol:", "delimiter"),
            (f" {symbol}", "answer"),
            ("\n\n", "delimiter"),
        )
        for piece, kind in pieces:
            kinds.append((len(demo), len(demo) + len(piece), kind))
            demo += piece
        shots.append((pair_start, len(demo)))
    return OnEpisode(
        sample_id=sample_id,
        demo_text=demo,
        query_text=f"Word: {words[queried]}\nSymbol:",
        answer_text=f" {answers[queried]}",
        char_kinds=tuple(kinds),
        gold=shots[queried],
        other_query_text=f"Word: {words[other]}\nSymbol:",
        shots=tuple(shots),
    )


class SymbolLookup(Task):
    """Look up the symbol that the demo pairs with an invented word; ``data.pairs`` pairs per demo."""

    def episodes(self, request: TaskRequest) -> list[OnEpisode]:
        pairs = request.data.pairs
        unused = [symbol for symbol in SYMBOLS if symbol not in request.off_words]
        symbols = single_token_symbols(request.tokenizer, "Word: dax\nSymbol:", unused)
        if len(symbols) < pairs:
            raise DataError(
                f"data.pairs = {pairs}, but only {len(symbols)} of the built-in symbols are one token of this "
                f"tokenizer and occur in no OFF prompt ({', '.join(symbols) or 'none'}); lower data.pairs or use data.on_path"
            )
        return list(episodes(request.n, request.seed, pairs, symbols, request.off_words))

    def source(self, request: TaskRequest) -> str:
        return f"symbol_lookup(pairs={request.data.pairs}, seed={request.seed})"


def episodes(n: int, seed: int, pairs: int, symbols: Sequence[str], forbidden: frozenset[str]) -> Iterator[OnEpisode]:
    """Yield the first ``n`` episodes of a seed; arguments as in ``episode``."""
    return (episode(i, seed, pairs, symbols, forbidden) for i in range(n))
