"""A tokenizer's chat template: what it writes around the turns of a conversation.

A template is a program, and the text of a sample is none of its input. It is rendered with placeholders, once per shape of
conversation, and the real text is put in their places: so it is known which characters the template wrote, and text that
spells ``</think>`` or ``<|im_end|>`` changes nothing else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any, Literal

from cedkv.core.errors import DataError
from cedkv.core.text import one_line, preview

Role = Literal["user", "assistant"]
Strip = tuple[bool, bool]
"""Whether a template drops the white space at the start of a turn's text, and at its end."""

_SHOT: tuple[Role, Role] = ("user", "assistant")
_DATE = "01 Jan 2025"
_FIXED_STRFTIME = f"{{% macro strftime_now(format) %}}{_DATE}{{% endmacro %}}\n"
"""Some chat templates print today's date, from ``date_string`` or from this function; a prompt must be the same every day."""
_DRAWS = re.compile(r"\|\s*random\b|\blipsum\b")
"""What Jinja has that draws random numbers."""
_LEFT, _RIGHT = "\t ", " \t"


class _Rejected(Exception):  # noqa: N818  (becomes a DataError that says what the template was wanted for)
    """The template does not render a conversation; the message says how."""


def stripped(text: str, strip: Strip) -> str:
    """Return a turn's text as the template would write it."""
    text = text.lstrip() if strip[0] else text
    return text.rstrip() if strip[1] else text


@dataclass(frozen=True)
class Conversation:
    """What a chat template writes around the shots of a demonstration and a question.

    preface: before the first shot's turn: a system turn, BOS. shots: for each shot the text before the user's turn, between the
    two turns, and after the assistant's. before, after: around the question, up to where its answer begins. gap: the spaces
    between there and an answer. strips: of the user's turns, the assistant's turns, the question.
    """

    preface: str
    shots: tuple[tuple[str, str, str], ...]
    before: str
    after: str
    gap: str
    strips: tuple[Strip, Strip, Strip]


@dataclass(frozen=True)
class _Turns:
    """How a conversation with one shot is written, from which longer ones are taken apart."""

    opening: str
    gap: str
    strips: tuple[Strip, ...]


class ChatTemplate:
    """The chat template of a tokenizer that has one, under ``model.template_kwargs``."""

    def __init__(self, tokenizer: Any, template_kwargs: dict[str, Any]) -> None:
        self._tokenizer, self._kwargs = tokenizer, template_kwargs
        self.conversation = cache(self._conversation)

    @cached_property
    def source(self) -> str:
        """The template itself. Raises DataError: there are several, and none is the default."""
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError as error:
            raise self._turn_error(_reason(error)) from None

    @cached_property
    def user_turn(self) -> tuple[str, str, Strip]:
        """What is written before and after a single user turn, up to where the model answers, and how its text is stripped.

        Raises:
            DataError: the template does not render that.
        """
        try:
            (before, after), (strip,) = self._around(["user"]), self._strips(["user"])
        except _Rejected as error:
            raise self._turn_error(str(error)) from None
        return before, after, strip

    def _conversation(self, shots: int) -> Conversation:
        """Return what is written around so many shots and a question.

        Raises:
            DataError: the template does not render such a conversation, or it cannot be said where its last turn begins.
        """
        try:
            turns = self._turns
            around = self._around([*_SHOT * shots, "user"])
            starts = [len(before) - len(turns.opening) for before in around[0:-1:2]]
            if not all(before.endswith(turns.opening) for before in around[2:-1:2]):
                raise _Rejected(f"it does not open every user's turn with {turns.opening!r}")
            if not around[0].endswith(turns.opening):
                starts[0] = 0
        except _Rejected as error:
            raise DataError(
                f"data.format = chat: the tokenizer's chat template does not render shots as turns of a user and an assistant "
                f"({error}){self._given()}; use data.format=text"
            ) from None
        befores = [text[start:] for text, start in zip(around[0:-1:2], starts, strict=True)]
        afters = [text[:start] for text, start in zip(around[0:-1:2], starts, strict=True)]
        user, assistant, question = turns.strips
        return Conversation(
            preface=afters[0],
            shots=tuple(zip(befores[:-1], around[1:-1:2], afters[1:], strict=True)),
            before=befores[-1],
            after=around[-1].rstrip(" "),
            gap=turns.gap,
            strips=(user, assistant, question),
        )

    @cached_property
    def _turns(self) -> _Turns:
        """Take a conversation of one shot apart. Raises _Rejected."""
        first, _, between, prompt = self._around([*_SHOT, "user"])
        _, answer, close = self._around(_SHOT, generation_prompt=False)
        if not between.startswith(close):  # Phi-3 ends a conversation that awaits no answer with EOS
            close = close.removesuffix(str(self._tokenizer.eos_token))
        if not between.startswith(close):
            raise _Rejected(f"after an assistant's turn it writes {close!r} at the end and {between!r} before the next turn")
        opening = between[len(close) :]
        if not first.endswith(opening) and first.endswith(opening.lstrip()):
            opening = opening.lstrip()  # white space between turns
        prompt = prompt.rstrip(" ")
        gap = answer[len(prompt) :] if answer.startswith(prompt) else ""
        return _Turns(opening, "" if gap.strip(" ") else gap, self._strips([*_SHOT, "user"]))

    def _around(self, roles: Sequence[Role], generation_prompt: bool = True, pad: bool = False) -> list[str]:
        """Return what is written before each turn's text, and after the last. Raises _Rejected."""
        names = [f"cedkvturn{i}x" for i in range(len(roles))]
        turns = [
            {"role": role, "content": f"{_LEFT}{name}{_RIGHT}" if pad else name}
            for role, name in zip(roles, names, strict=True)
        ]
        arguments = {"date_string": _DATE, **self._kwargs, "tokenize": False, "add_generation_prompt": generation_prompt}
        source = _FIXED_STRFTIME + self.source if "strftime_now" in self.source else self.source
        drawn = random.getstate()
        try:
            text = str(self._tokenizer.apply_chat_template(turns, chat_template=source, **arguments))
        except Exception as error:  # a template is a program of the model's authors and may raise anything
            raise _Rejected(_reason(error)) from None
        if _DRAWS.search(source) and random.getstate() != drawn:
            raise _Rejected("it draws random numbers, and a prompt must be the same in every run")
        around, rest = [], text
        for role, name in zip(roles, names, strict=True):
            if text.count(name) != 1 or name not in rest:
                turn = "the prompt" if len(roles) == 1 else f"{'a user' if role == 'user' else 'an assistant'}'s turn"
                fault = f"it leaves {turn} out" if name not in text else f"it does not write {turn} once and in its place"
                raise _Rejected(f"{fault} and gives {text[:120].replace(name, '...')!r}")
            before, rest = rest.split(name)
            around.append(before)
        return [*around, rest]

    def _strips(self, roles: Sequence[Role]) -> tuple[Strip, ...]:
        """Return how each turn's text is stripped. Raises _Rejected: white space becomes something else."""
        right, strips, left = "", list[list[bool]](), ""
        plain, padded = self._around(roles), self._around(roles, pad=True)
        for i, (without, text) in enumerate(zip(plain, padded, strict=True)):
            rights, lefts = (("",) if i == 0 else (_RIGHT, "")), (("",) if i == len(roles) else (_LEFT, ""))
            found = next(((a, b) for a, b in product(rights, lefts) if a + without + b == text), None)
            if found is None:
                raise _Rejected("it changes the white space around a turn's text")
            right, left = found
            if i > 0:
                strips[-1].append(not right)
            if i < len(roles):
                strips.append([not left])
        return tuple((start, end) for start, end in strips)

    def _turn_error(self, reason: str) -> DataError:
        return DataError(
            f"the tokenizer's chat template does not render a single user turn ({reason}){self._given()}; "
            "model.chat_template=false gives OFF prompts as plain text"
        )

    def _given(self) -> str:
        return f" with model.template_kwargs = {preview(self._kwargs)}" if self._kwargs else ""


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
