"""Words that episodes are made of: lists that come with the package, invented words, and symbols that are one token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cedkv.core.errors import DataError
from cedkv.tasks.base import TaskRequest
from cedkv.tasks.shots import ShotTemplate
from cedkv.tasks.tokenize import single_token_symbols

if TYPE_CHECKING:
    from numpy.random import Generator

_ONSETS = ("b", "bl", "br", "d", "dr", "f", "fl", "g", "gl", "gr", "k", "kl", "l", "m", "n", "p", "pl", "r", "s", "sk",
           "sl", "sn", "t", "tr", "v", "w", "z", "zw")  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "oo", "ai")
_CODAS = ("b", "ck", "d", "ft", "g", "lk", "mp", "ng", "nt", "p", "sk", "t", "v", "x", "zz")
Digits = Annotated[int, Field(ge=1, le=18)]
"""Digits of a number."""
_PROBE = "dax"
"""What a query asks about where its symbols are looked at: an answer's tokens depend on what stands right before it."""


@cache
def read_rows(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the lines of a list in ``tasks/data``, each split at its tabs."""
    text = files("cedkv.tasks").joinpath("data", f"{name}.txt").read_text(encoding="utf-8")
    return tuple(tuple(line.split("\t")) for line in text.splitlines())


def read_words(name: str) -> tuple[str, ...]:
    """Return all entries of a list in ``tasks/data``."""
    return tuple(chain.from_iterable(read_rows(name)))


def spelt_words(text: str) -> frozenset[str]:
    """Return the lower-case words of a text, as ``TaskRequest.off_words`` has them."""
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def invented_words(rng: Generator, taken: Iterable[str]) -> Iterator[str]:
    """Yield pronounceable words, each once and none of ``taken``; of two syllables, because one gives too many real words."""
    used = set(taken)
    while True:
        syllables = [_ONSETS[rng.integers(len(_ONSETS))] + _VOWELS[rng.integers(len(_VOWELS))] for _ in range(2)]
        word = "".join(syllables) + _CODAS[rng.integers(len(_CODAS))]
        if word not in used:
            used.add(word)
            yield word


def numbers(rng: Generator, digits: int) -> Iterator[str]:
    """Yield different numbers of so many digits until there are no more; none begins with 0."""
    used = set[int]()
    low, high = 10 ** (digits - 1), 10**digits
    while len(used) < high - low:
        number = int(rng.integers(low, high))
        if number not in used:
            used.add(number)
            yield str(number)


def shuffled(rng: Generator, values: Sequence[str]) -> Iterator[str]:
    """Yield values in a random order, and when all were given in another one, without end."""
    while True:
        yield from (values[i] for i in rng.permutation(len(values)))


def draw_two(rng: Generator, n: int) -> tuple[int, int]:
    """Return two different numbers below ``n``."""
    first = int(rng.integers(n))
    return first, int(first + 1 + rng.integers(n - 1)) % n


def symbols_for(
    request: TaskRequest, template: ShotTemplate, words: Sequence[str], least: int, need: str, remedy: str
) -> tuple[str, ...]:
    """Return the words that can be symbols in a run.

    They occur in no OFF prompt, and are a single token where they follow a query; for answers of several tokens
    (``data.answer``), those of more tokens too where fewer than ``least`` are single ones.

    Args:
        need, remedy: what needs so many, as ``data.pairs = 13``, and what to change, for the message.

    Raises:
        DataError: there are fewer than ``least``.
    """
    unused = tuple(word for word in words if word not in request.off_words)
    single = single_token_symbols(request.tokenizer, template.query(_PROBE), unused, template.answer(""))
    if request.data.answer != "single" and len(single) < least:
        single = unused
    if len(single) < least:
        raise DataError(
            f"{need}, but only {len(single)} of the built-in symbols are one token of this tokenizer and occur in no OFF "
            f"prompt ({', '.join(single[:12]) or 'none'}{', ...' * (len(single) > 12)}); {remedy}"
        )
    return single
