"""Label short texts by their category, where the labels are random words that only the demo gives a meaning.

The categories are well known (animals, fruits, tools, ...); which word stands for which one is drawn per episode, so a model
cannot know an answer without the demonstration. Every round of shots has each category once. A text is a word, and where a
demo needs more of them a word with a qualifier ("old hammer"). The word that is asked for occurs in no shot, so none can be
copied from: gold is the last shot of its category, the nearest of those that its label can be learned from. The other query is
of another category.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from cedkv.core.errors import DataError
from cedkv.tasks.base import TaskRequest
from cedkv.tasks.generated import Draw, GeneratedTask
from cedkv.tasks.shots import Question, Shot, ShotTemplate, demo_shots
from cedkv.tasks.words import draw_two, read_rows, read_words, shuffled, symbols_for

if TYPE_CHECKING:
    from numpy.random import Generator


@dataclass(frozen=True)
class LabelMapping(GeneratedTask):
    """Label short texts of ``categories`` categories, where the labels are random words."""

    name: ClassVar[str] = "label_mapping"
    prefix: ClassVar[str] = "label"

    categories: Annotated[int, Field(ge=2, le=8)] = 4

    @property
    def template(self) -> str:
        return "Text: {input}\nLabel: {output}\n\n"

    def prepare(self, request: TaskRequest, template: ShotTemplate) -> Draw:
        off = request.off_words
        named = [[word for word in words if word not in off] for _, *words in read_rows("categories")]
        named = [words for words in named if len(words) > 1]
        qualifiers = [word for word in read_words("qualifiers") if word not in off]
        if len(named) < self.categories:
            raise DataError(
                f"data.params.categories = {self.categories}, but only {len(named)} categories have two words that occur in no "
                "OFF prompt; lower it, use other OFF prompts, or use data.on_path"
            )
        texts = self.categories * (min(map(len, named)) - 1) * (1 + len(qualifiers))
        if request.data.demo_tokens is None and request.data.pairs > texts:
            raise DataError(
                f"data.pairs = {request.data.pairs}, but {self.categories} categories have {texts:,} texts; lower it, or raise "
                "data.params.categories"
            )
        remedy = "lower data.params.categories, or use data.on_path"
        need = f"data.params.categories = {self.categories}"
        symbols = symbols_for(request, template, read_words("words"), self.categories, need, remedy)

        def draw(rng: Generator) -> tuple[list[Shot], Question]:
            chosen = [named[i] for i in rng.permutation(len(named))[: self.categories]]
            labels = list(islice(shuffled(rng, symbols), self.categories))
            asked, texts = [], []
            for words in chosen:
                first, *others = islice(shuffled(rng, words), len(words))
                asked.append(first)
                texts.append(_texts(rng, others, qualifiers))
            shots = demo_shots(request, _labelled(rng, texts, labels), template)
            shown = [shot.output for shot in shots]
            known = [i for i, label in enumerate(labels) if label in shown]
            queried, other = (known[i] for i in draw_two(rng, len(known)))
            gold = len(shown) - 1 - shown[::-1].index(labels[queried])
            return shots, Question(asked[queried], labels[queried], gold, asked[other], tuple(labels[i] for i in known))

        return draw


def _texts(rng: Generator, words: Sequence[str], qualifiers: Sequence[str]) -> Iterator[str]:
    """Yield every word, then every word with every qualifier, in a random order."""
    yield from words
    orders = [rng.permutation(len(qualifiers)) for _ in words]
    for turn in range(len(qualifiers)):
        yield from (f"{qualifiers[order[turn]]} {word}" for word, order in zip(words, orders, strict=True))


def _labelled(rng: Generator, texts: Sequence[Iterator[str]], labels: Sequence[str]) -> Iterator[Shot]:
    """Yield shots of one category after another, in an order that is drawn anew for every round."""
    while True:
        for i in rng.permutation(len(labels)):
            text = next(texts[i], None)
            if text is None:
                return
            yield Shot(text, labels[i])
