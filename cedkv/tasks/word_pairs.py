"""Apply the relation that the demo's pairs have in common: opposites, capitals, plurals.

The shots are other pairs of the list, so the answer has to be known and the relation inferred: no shot holds it, and there is
no gold. With ``shown: true`` the pair that is asked for is among the shots, and is gold. Where an answer must be one token
(``data.answer=single``), only pairs whose answer is one are asked for, if there are any; shots may be any pairs. The longest
demo is the whole list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cedkv.core.errors import DataError
from cedkv.tasks.base import GIVEN, TaskRequest
from cedkv.tasks.generated import Draw, GeneratedTask
from cedkv.tasks.shots import Question, Shot, ShotTemplate, demo_shots
from cedkv.tasks.tokenize import single_token_symbols
from cedkv.tasks.words import read_rows, spelt_words

if TYPE_CHECKING:
    from numpy.random import Generator


@dataclass(frozen=True)
class WordPairs(GeneratedTask):
    """Apply the relation of the demo's pairs: antonyms, capitals or plurals."""

    name: ClassVar[str] = "word_pairs"
    prefix: ClassVar[str] = "pair"

    relation: Literal["antonyms", "capitals", "plurals"] = "antonyms"
    shown: bool = False

    @property
    def gives(self) -> frozenset[str]:
        return GIVEN if self.shown else GIVEN - {"gold"}

    @property
    def template(self) -> str:
        return "{input} -> {output}\n"

    def prepare(self, request: TaskRequest, template: ShotTemplate) -> Draw:
        data = request.data
        rows = [row for row in read_rows(self.relation) if not spelt_words(" ".join(row)) & request.off_words]
        most = len(rows) - (0 if self.shown else 2)
        if most < 2 or (data.demo_tokens is None and data.pairs > most):
            raise DataError(
                f"data.pairs = {data.pairs}, but the {self.relation} have {max(most, 0)} pairs for a demo, of which no word "
                "occurs in an OFF prompt; lower data.pairs, use other OFF prompts, or use data.on_path"
            )
        pairs = [Shot(*row) for row in rows]
        askable = list(range(len(pairs)))
        if data.answer == "single":
            outputs = [pair.output for pair in pairs]
            single = set(single_token_symbols(request.tokenizer, template.query(outputs[0]), outputs, template.answer("")))
            askable = [i for i in askable if outputs[i] in single] or askable

        def draw(rng: Generator) -> tuple[list[Shot], Question]:
            queried = askable[rng.integers(len(askable))]
            other, *rest = (i for i in rng.permutation(len(pairs)).tolist() if i != queried)
            asked, gold = pairs[queried], None
            if self.shown:
                shots = demo_shots(request, (pairs[i] for i in (queried, other, *rest)), template)
                order = rng.permutation(len(shots)).tolist()
                shots, gold = [shots[i] for i in order], order.index(0)
            else:
                shots = demo_shots(request, (pairs[i] for i in rest), template)
            return shots, Question(asked.input, asked.output, gold, pairs[other].input)

        return draw
