"""Find one fact in filler text: the needle in a haystack, at a given depth.

Every shot is a sentence on a line of its own: ``data.pairs`` counts sentences. Two of them are facts, the one that is asked for
and another, which the other query asks for; the rest is filler, put together from parts that say nothing about
a fact. ``depth`` is where the fact stands among the sentences, 0 for the first and 1 for the last; null draws it per episode.
The other fact stands anywhere else. Values are common words, each a single token where it follows a query, or numbers of
``digits`` digits (several tokens: use ``data.answer=whole``). ``data.template`` is how a fact is written. Gold is the sentence
of the fact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from cedkv.core.errors import DataError
from cedkv.tasks.base import TaskRequest
from cedkv.tasks.generated import Draw, GeneratedTask
from cedkv.tasks.shots import Question, Shot, ShotTemplate, demo_shots
from cedkv.tasks.words import Digits, numbers, read_rows, read_words, shuffled, spelt_words, symbols_for

if TYPE_CHECKING:
    from numpy.random import Generator

Depth = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Needle(GeneratedTask):
    """Find one fact in filler text, at a given depth."""

    name: ClassVar[str] = "needle"
    prefix: ClassVar[str] = "needle"

    depth: Depth | None = None
    values: Literal["words", "digits"] = "words"
    digits: Digits = 4

    @property
    def template(self) -> str:
        return f"The secret code of {{input}} is {'' if self.values == 'words' else '#'}{{output}}.\n"

    def prepare(self, request: TaskRequest, template: ShotTemplate) -> Draw:
        cities = tuple(city for _, city in read_rows("capitals") if not spelt_words(city) & request.off_words)
        if len(cities) < 2:
            raise DataError("task needle: nearly all cities occur in OFF prompts; use other OFF prompts, or data.on_path")
        words: tuple[str, ...] = ()
        if self.values == "words":
            filler = spelt_words(" ".join(read_words("filler")))
            remedy = "set data.params={values: digits} and data.answer=whole, or use data.on_path"
            free = [word for word in read_words("words") if word not in filler]
            words = symbols_for(request, template, free, 2, "2 values are needed", remedy)

        def draw(rng: Generator) -> tuple[list[Shot], Question]:
            things = shuffled(rng, cities)
            values = shuffled(rng, words) if self.values == "words" else numbers(rng, self.digits)
            fact, other = (Shot(next(things), next(values)) for _ in range(2))
            _, _, *sentences = demo_shots(request, chain((fact, other), _filler(rng)), template)
            sentences.insert(int(rng.integers(len(sentences) + 1)), other)
            at = int(rng.integers(len(sentences) + 1)) if self.depth is None else round(self.depth * len(sentences))
            sentences.insert(at, fact)
            labels = (fact.output, other.output) if self.values == "words" else None
            return sentences, Question(fact.input, fact.output, at, other.input, labels)

        return draw


def _filler(rng: Generator) -> Iterator[Shot]:
    """Yield different sentences, each of one part of a kind: when, who, what, where."""
    parts = read_rows("filler")
    sizes = [len(part) for part in parts]
    for sentence in rng.permutation(prod(sizes)):
        when, who, what, where = (part[i] for part, i in zip(parts, np.unravel_index(sentence, sizes), strict=True))
        yield Shot(f"{when}, {who} {what} {where}.")
