"""Look up the symbol that the demo pairs with an invented word.

The words are invented, so a model cannot know an answer without the demonstration. The symbols are the twelve colours or common
words (``symbols``), each a single token where it follows a query. A symbol stands for one word only, unless ``repeats`` is true
or ``data.demo_tokens`` has room for more words than there are symbols. Gold is the pair that is asked for; the other query asks
for another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Literal

from cedkv.tasks.base import TaskRequest
from cedkv.tasks.generated import Draw, GeneratedTask
from cedkv.tasks.shots import Question, Shot, ShotTemplate, demo_shots
from cedkv.tasks.words import draw_two, invented_words, read_words, shuffled, symbols_for

if TYPE_CHECKING:
    from numpy.random import Generator

SYMBOLS = ("red", "blue", "green", "black", "white", "yellow", "orange", "purple", "brown", "pink", "gray", "gold")


@dataclass(frozen=True)
class SymbolLookup(GeneratedTask):
    """Look up the symbol that the demo pairs with an invented word."""

    name: ClassVar[str] = "symbol_lookup"
    prefix: ClassVar[str] = "on"

    symbols: Literal["colours", "words"] = "colours"
    repeats: bool = False

    @property
    def template(self) -> str:
        return "Word: {input}\nSymbol: {output}\n\n"

    def prepare(self, request: TaskRequest, template: ShotTemplate) -> Draw:
        data = request.data
        least = 2 if self.repeats or data.demo_tokens is not None else data.pairs
        words = SYMBOLS if self.symbols == "colours" else read_words("words")
        remedies = ["lower data.pairs"] if least > 2 else []
        remedies += ["set data.params={symbols: words}"] if self.symbols == "colours" else []
        remedies += ["set data.params={repeats: true}"] if least > 2 else []
        need = f"data.pairs = {data.pairs}" if least == data.pairs else f"{least} symbols are needed"
        symbols = symbols_for(request, template, words, least, need, ", ".join([*remedies, "or use data.on_path"]))

        def draw(rng: Generator) -> tuple[list[Shot], Question]:
            inputs = invented_words(rng, {*request.off_words, *symbols})
            if data.demo_tokens is None:  # all words are drawn before the symbols
                inputs = iter(list(islice(inputs, data.pairs)))
            pairs = (Shot(word, symbol) for word, symbol in zip(inputs, shuffled(rng, symbols), strict=False))
            shots = demo_shots(request, pairs, template)
            queried, other = draw_two(rng, len(shots))
            asked = shots[queried]
            labels = tuple(dict.fromkeys(shot.output for shot in shots))
            return shots, Question(asked.input, asked.output, queried, shots[other].input, labels)

        return draw
