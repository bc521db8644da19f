"""From solved examples to an episode: the one place where shots become the text of a demonstration and a query.

Word: dax           template "Word: {input}\\nSymbol: {output}\\n\\n"; whitespace in front of {output} is part of the answer,
Symbol: red         so that a query ends where a token of the answer can begin
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

from cedkv.core.errors import DataError
from cedkv.core.values import OnEpisode, TokenKind
from cedkv.tasks.base import TaskRequest
from cedkv.tasks.chat import ChatTemplate, Strip, stripped


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
    """How a shot is written: what stands before its input, between input and answer, and after the answer.

    gap: spaces in front of an answer, which are read as part of it. strip_input, strip_output: white space that is dropped at
    the start and at the end. markup: these texts are a chat template's, where control tokens are real.
    """

    before: str
    between: str
    gap: str
    after: str
    strip_input: Strip = (False, False)
    strip_output: Strip = (False, False)
    markup: bool = False

    @classmethod
    def parse(cls, template: str) -> ShotTemplate:
        """Return the parts of a template that has ``{input}``, then ``{output}``."""
        before, rest = template.split("{input}")
        between, after = rest.split("{output}")
        return cls(before, *_gap(between), after)

    def pieces(self, shot: Shot) -> list[tuple[str, TokenKind]]:
        """Return a shot's text piece by piece; whitespace before the input is read as part of it, as before the answer.

        A sentence without an answer is written as it is, on a line of its own: words are input, the rest is delimiters.

        Raises:
            DataError: such a sentence in a chat, which has no turn for it.
        """
        if not shot.output:
            if self.markup:
                raise DataError(
                    "data.format = chat: this task has sentences between its shots, which are no turn of a chat; use "
                    "data.format=text"
                )
            words = re.findall(r" ?\w+|\W", f"{shot.input}\n")
            return [(word, "input" if word[-1].isalnum() else "delimiter") for word in words]
        before = self.before.rstrip(" ")
        return [
            (before, "delimiter"),
            (self.before[len(before) :] + stripped(shot.input, self.strip_input), "input"),
            (self.between, "delimiter"),
            (self.answer(shot.output), "answer"),
            (self.after, "delimiter"),
        ]

    def query(self, text: str) -> str:
        """Return a query's text, up to where its answer begins."""
        return self.before + stripped(text, self.strip_input) + self.between

    def answer(self, text: str) -> str:
        """Return an answer as it follows a query."""
        return self.gap + stripped(text, self.strip_output)

    def layout(self, shots: int) -> Layout:
        """Return how so many shots and a question are written."""
        return Layout("", (self,) * shots, self)


@dataclass(frozen=True)
class Layout:
    """How a demonstration and a question are written: what precedes the first shot, each shot, and the question."""

    preface: str
    shots: tuple[ShotTemplate, ...]
    question: ShotTemplate


@dataclass(frozen=True)
class ChatShotTemplate(ShotTemplate):
    """How a single shot, and a question after it, are written as turns of a chat template; see ``layout`` for more shots."""

    chat: ChatTemplate = field(kw_only=True)

    @classmethod
    def of(cls, chat: ChatTemplate) -> ChatShotTemplate:
        """Return the template of a tokenizer's chat. Raises DataError: it does not render shots as turns."""
        question = _chat_layout(chat, 1).question
        return cls(**{part.name: getattr(question, part.name) for part in fields(question)}, chat=chat)

    def layout(self, shots: int) -> Layout:
        """Return how so many shots and a question are written: each shot a user's turn and an assistant's turn."""
        return _chat_layout(self.chat, shots)


def _chat_layout(chat: ChatTemplate, shots: int) -> Layout:
    written = chat.conversation(shots)
    user, assistant, question = written.strips
    return Layout(
        written.preface,
        tuple(ShotTemplate(before, *_gap(between), after, user, assistant, True) for before, between, after in written.shots),
        ShotTemplate(written.before, written.after, written.gap, "", question, assistant, True),
    )


def _gap(between: str) -> tuple[str, str]:
    """Return the text between input and answer, and the spaces at its end."""
    text = between.rstrip(" ")
    return text, between[len(text) :]


def template_for(request: TaskRequest, default: str) -> ShotTemplate:
    """Return how shots are written in a run: as ``data.template`` says, else by a task's own template; or as turns of a chat.

    Raises:
        DataError: ``data.format`` is chat, and the tokenizer has no chat template, or one that does not render shots as turns.
    """
    if request.data.format == "text":
        return ShotTemplate.parse(request.data.template or default)
    if not request.tokenizer.chat_template:
        raise DataError(
            "data.format = chat, but the model's tokenizer has no chat template; use data.format=text, or a model that has one"
        )
    return ChatShotTemplate.of(ChatTemplate(request.tokenizer, request.template_kwargs))


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

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    layout = template.layout(1)
    total, fitting = count(layout.preface), list[Shot]()
    for shot in shots:
        text = "".join(text for text, _ in layout.shots[0].pieces(shot))
        # The character after a shot is counted with it: many tokenizers split line breaks where text follows.
        total += count(text + text[:1]) - 1
        if fitting and total > demo_tokens:
            break
        fitting.append(shot)
    return fitting


def episode_of(sample_id: str, shots: Sequence[Shot], question: Question, template: ShotTemplate) -> OnEpisode:
    """Return the episode of a demonstration of these shots and one question about it."""
    layout = template.layout(len(shots))
    demo, asked = layout.preface, layout.question
    kinds: list[tuple[int, int, TokenKind]] = [(0, len(demo), "delimiter")] if demo else []
    ranges: list[tuple[int, int]] = []
    for shot, written in zip(shots, layout.shots, strict=True):
        start = len(demo)
        for text, kind in written.pieces(shot):
            if text:
                kinds.append((len(demo), len(demo) + len(text), kind))
            demo += text
        ranges.append((start, len(demo)))
    query = asked.query(question.input)
    edges = [0, len(asked.before), len(query) - len(asked.between), len(query)]
    markup = [(start, end) for start, end, kind in kinds if kind == "delimiter"]
    markup += [(len(demo) + start, len(demo) + end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    return OnEpisode(
        sample_id=sample_id,
        demo_text=demo,
        query_text=query,
        answer_text=asked.answer(question.answer),
        char_kinds=tuple(kinds),
        gold=None if question.gold is None else ranges[question.gold],
        other_query_text=None if question.other_input is None else asked.query(question.other_input),
        shots=tuple(ranges),
        labels=None if question.labels is None else tuple(asked.answer(label) for label in question.labels),
        markup=tuple(markup) if asked.markup else (),
    )
