"""Find the value of a key among many: keys and values of words, digits or UUIDs (as in Liu et al. 2023, arXiv 2307.03172).

Words as keys are invented; as values they are common ones, each a single token where it follows a query, and they recur
where there are more pairs than words. Digits and UUIDs are several tokens: use ``data.answer=whole`` for them as values. They
follow an equals sign without a space, so that an answer's first token is a digit and not a space. Gold is the pair that is
asked for; the other query asks for another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal
from uuid import UUID

from cedkv.core.errors import DataError
from cedkv.tasks.base import TaskRequest
from cedkv.tasks.generated import Draw, GeneratedTask
from cedkv.tasks.shots import Question, Shot, ShotTemplate, demo_shots
from cedkv.tasks.words import Digits, draw_two, invented_words, numbers, read_words, shuffled, symbols_for

if TYPE_CHECKING:
    from numpy.random import Generator

Strings = Literal["words", "digits", "uuid"]


@dataclass(frozen=True)
class KVRetrieval(GeneratedTask):
    """Find the value of a key among many; ``digits`` is the length of numbers."""

    name: ClassVar[str] = "kv_retrieval"
    prefix: ClassVar[str] = "kv"

    keys: Strings = "digits"
    values: Strings = "words"
    digits: Digits = 4

    @property
    def template(self) -> str:
        return "{input}: {output}\n" if self.values == "words" else "{input}={output}\n"

    def prepare(self, request: TaskRequest, template: ShotTemplate) -> Draw:
        data = request.data
        available = 9 * 10 ** (self.digits - 1)
        if data.demo_tokens is None and data.pairs > available and "digits" in (self.keys, self.values):
            raise DataError(
                f"data.pairs = {data.pairs}, but there are {available:,} numbers of data.params.digits = {self.digits}; raise "
                "digits, or lower data.pairs"
            )
        words: tuple[str, ...] = ()
        if self.values == "words":
            remedy = "set data.params={values: digits} and data.answer=whole, or use data.on_path"
            words = symbols_for(request, template, read_words("words"), 2, "2 values are needed", remedy)

        def draw(rng: Generator) -> tuple[list[Shot], Question]:
            keys = invented_words(rng, {*request.off_words, *words}) if self.keys == "words" else self._drawn(rng, self.keys)
            values = shuffled(rng, words) if self.values == "words" else self._drawn(rng, self.values)
            shots = demo_shots(request, (Shot(k, v) for k, v in zip(keys, values, strict=False)), template)
            queried, other = draw_two(rng, len(shots))
            asked = shots[queried]
            labels = tuple(dict.fromkeys(shot.output for shot in shots)) if self.values == "words" else None
            return shots, Question(asked.input, asked.output, queried, shots[other].input, labels)

        return draw

    def _drawn(self, rng: Generator, kind: Strings) -> Iterator[str]:
        """Return different numbers or UUIDs, which all begin with a digit from 1 to 9."""
        return numbers(rng, self.digits) if kind == "digits" else _uuids(rng)


def _uuids(rng: Generator) -> Iterator[str]:
    while True:
        yield f"{rng.integers(1, 10)}{str(UUID(bytes=rng.bytes(16), version=4))[1:]}"
