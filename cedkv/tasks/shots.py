"""From solved examples to an episode: the one place where shots become the text of a demonstration and a query.

Word: dax           template "Word: {input}\\nSymbol: {output}\\n\\n"; whitespace in front of {output} is part of the answer,
Symbol: red         so that a query ends where a token of the answer can begin
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cedkv.core.errors import DataError
from cedkv.core.values import OnEpisode, TokenKind
from cedkv.tasks.base import TaskRequest


@dataclass(frozen=True)
class Shot:
    """A solved example: what is asked, and its answer; without an answer, a sentence that stands between others."""

    input: str
    output: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked about a demonstration.

    gold: the shot of the demo that holds the answer; None where none does.
    other_input: another question about the same demo; None for none.
    labels: the answers to choose among; None where answers are of no known set.
    """

    input: str
    answer: str
    gold: int | None = None
    other_input: str | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ShotTemplate:
    """How a shot is written as plain text: what stands before its input, between input and answer, and after the answer."""

    before: str
    between: str
    gap: str
    after: str

    @classmethod
    def parse(cls, template: str) -> ShotTemplate:
        """Return the parts of a template that has ``{input}``, then ``{output}``."""
        before, rest = template.split("{input}")
        between, after = rest.split("{output}")
        stripped = between.rstrip(" ")
        return cls(before, stripped, between[len(stripped) :], after)

    def pieces(self, shot: Shot) -> list[tuple[str, TokenKind]]:
        """Return a shot's text piece by piece; whitespace before the input is read as part of it, as before the answer.

        A sentence without an answer is written as it is, on a line of its own: words are input, the rest is delimiters.
        """
        if not shot.output:
            words = re.findall(r" ?\w+|\W", f"{shot.input}\n")
            return [(word, "input" if word[-1].isalnum() else "delimiter") for word in words]
        before = self.before.rstrip(" ")
        return [
            (before, "delimiter"),
            (self.before[len(before) :] + shot.input, "input"),
            (self.between, "delimiter"),
            (self.gap + shot.output, "answer"),
            (self.after, "delimiter"),
        ]

    def query(self, text: str) -> str:
        """Return a query's text, up to where its answer begins."""
        return self.before + text + self.between

    def answer(self, text: str) -> str:
        """Return an answer as it follows a query."""
        return self.gap + text


def template_for(request: TaskRequest, default: str) -> ShotTemplate:
    """Return how shots are written in a run: as ``data.template`` says, else by a task's own template."""
    return ShotTemplate.parse(request.data.template or default)


def demo_shots(request: TaskRequest, shots: Iterable[Shot], template: ShotTemplate) -> list[Shot]:
    """Return the shots of a demo: the first ``data.pairs``, or where it is set, as many as fit ``data.demo_tokens``.

    Raises:
        DataError: fewer than two; a query asks for one of several.
    """
    data = request.data
    if data.demo_tokens is None:
        return list(islice(shots, data.pairs))
    fitting = shots_that_fit(shots, data.demo_tokens, template, request.tokenizer)
    if len(fitting) < 2:
        raise DataError(
            f"data.demo_tokens = {data.demo_tokens} has no room for two shots, and a query asks for one of them; raise it"
        )
    return fitting


def shots_that_fit(shots: Iterable[Shot], demo_tokens: int, template: ShotTemplate, tokenizer: Any) -> list[Shot]:
    """Return the first shots whose demonstration has about ``demo_tokens`` tokens at most; one where not even that fits."""
    total, fitting = 0, list[Shot]()
    for shot in shots:
        text = "".join(text for text, _ in template.pieces(shot))
        # The character after a shot is counted with it: many tokenizers split line breaks where text follows.
        total += len(tokenizer(text + text[:1], add_special_tokens=False).input_ids) - 1
        if fitting and total > demo_tokens:
            break
        fitting.append(shot)
    return fitting


def episode_of(sample_id: str, shots: Sequence[Shot], question: Question, template: ShotTemplate) -> OnEpisode:
    """Return the episode of a demonstration of these shots and one question about it."""
    demo = ""
    kinds: list[tuple[int, int, TokenKind]] = []
    ranges: list[tuple[int, int]] = []
    for shot in shots:
        start = len(demo)
        for text, kind in template.pieces(shot):
            if text:
                kinds.append((len(demo), len(demo) + len(text), kind))
            demo += text
        ranges.append((start, len(demo)))
    return OnEpisode(
        sample_id=sample_id,
        demo_text=demo,
        query_text=template.query(question.input),
        answer_text=template.answer(question.answer),
        char_kinds=tuple(kinds),
        gold=None if question.gold is None else ranges[question.gold],
        other_query_text=None if question.other_input is None else template.query(question.other_input),
        shots=tuple(ranges),
        labels=None if question.labels is None else tuple(template.answer(label) for label in question.labels),
    )
