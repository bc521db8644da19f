"""Episodes and OFF prompts that a user's file holds as they are, one a row; an error names the row.

ON:  {"demo_text": ..., "query_text": ..., "answer_text": ..., "id": optional, "demo_kinds": optional,
      "gold": optional [start, end], "shots": optional [[start, end], ...], "other_query_text": optional,
      "labels": optional [text, ...], "markup": optional [[start, end], ...]}
OFF: {"prompt_text": ..., "id": optional}

``demo_kinds`` is a list of ``[start, end, kind]`` over the characters of ``demo_text``, where kind is input, delimiter or
answer. Without ``demo_kinds``, answers are what stands in the demo where an answer follows the query (``demo_answers``),
whitespace and punctuation are delimiters, and the rest is input. ``gold``, the characters of ``demo_text`` that hold the
answer, is needed by ``oracle_span`` only; ``other_query_text``, another question about the same demo, by ``transfer_span``
only. ``shots`` are the characters of each solved example; without them, a shot ends with an answer and the whitespace after it.
``labels`` are the answers to choose among, each as ``answer_text`` would be written; ``markup`` the characters of
``demo_text + query_text`` in which text that spells a control token becomes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cedkv.config.fields import Text as PlainText
from cedkv.core.errors import DataError
from cedkv.core.text import near_match, preview
from cedkv.core.values import OnEpisode
from cedkv.tasks.demo_answers import guess_kinds, guess_shots
from cedkv.tasks.rows import Row

Text = Annotated[str, Field(min_length=1)]
Ranges = Annotated[list[tuple[int, int]], Field(min_length=1)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    id: Annotated[PlainText, Field(max_length=200)] | None = None


class OnLine(_Line):
    demo_text: Text
    query_text: Text
    answer_text: Text
    demo_kinds: list[tuple[int, int, Literal["input", "delimiter", "answer"]]] | None = None
    gold: tuple[int, int] | None = None
    other_query_text: Text | None = None
    shots: Ranges | None = None
    labels: Annotated[list[Text], Field(min_length=1)] | None = None
    markup: list[tuple[int, int]] | None = None


class OffLine(_Line):
    prompt_text: Text


LineT = TypeVar("LineT", bound=_Line)
EPISODE_COLUMNS = frozenset({"demo_text", "query_text", "answer_text"})
PROMPT_COLUMN = "prompt_text"


def read_episodes(rows: Sequence[Row]) -> list[OnEpisode]:
    """Return the episodes of rows, in their order.

    Raises:
        DataError: a row that is no episode, or whose id was used already; the message names it.
    """
    lines = _parse(rows, OnLine)
    return [_episode(row, line) for row, line in zip(rows, lines, strict=True)]


def read_prompts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the OFF prompts of rows as ``(sample_id, text)``. Raises DataError as ``read_episodes`` does."""
    return [
        (line.id or f"off-{row.number:05d}", line.prompt_text) for row, line in zip(rows, _parse(rows, OffLine), strict=True)
    ]


def as_line(episode: OnEpisode) -> dict[str, Any]:
    """Return an episode as the object that ``read_episodes`` reads back to the same one."""
    line = {
        "id": episode.sample_id, "demo_text": episode.demo_text, "query_text": episode.query_text,
        "answer_text": episode.answer_text, "demo_kinds": episode.char_kinds, "gold": episode.gold, "shots": episode.shots,
        "other_query_text": episode.other_query_text, "labels": episode.labels, "markup": episode.markup or None,
    }  # fmt: skip
    return {name: value for name, value in line.items() if value is not None}


def _parse(rows: Sequence[Row], model: type[LineT]) -> list[LineT]:
    lines: list[LineT] = []
    place_of_id: dict[str, str] = {}
    for row in rows:
        try:
            line = model.model_validate_json(json.dumps(row.values))
        except ValidationError as error:
            problems = [_describe(item, model) for item in error.errors(include_url=False)[:5]]
            raise DataError(f"{row.place}: {'; '.join(problems)}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{row.place}: not text, numbers and lists of them: {error}; write these") from None
        if line.id is not None and place_of_id.setdefault(line.id, row.place) != row.place:
            raise DataError(
                f"{row.place}: id {preview(line.id)} was already used at {place_of_id[line.id]}; give every row its own id"
            )
        lines.append(line)
    return lines


def _episode(row: Row, line: OnLine) -> OnEpisode:
    for name, ranges, text in (
        ("gold", [line.gold] if line.gold is not None else [], "demo_text"),
        ("shots", line.shots or [], "demo_text"),
        ("demo_kinds", [(start, end) for start, end, _ in line.demo_kinds or []], "demo_text"),
        ("markup", line.markup or [], "demo_text + query_text"),
    ):
        _check_ranges(row, name, ranges, text, len(line.demo_text) + (len(line.query_text) if name == "markup" else 0))
    answers = (line.answer_text, *(line.labels or ()))
    kinds = guess_kinds(line.demo_text, line.query_text, answers, unlisted=True)
    kinds = kinds if line.demo_kinds is None else tuple(line.demo_kinds)
    return OnEpisode(
        sample_id=line.id or f"on-{row.number:05d}",
        demo_text=line.demo_text,
        query_text=line.query_text,
        answer_text=line.answer_text,
        char_kinds=kinds,
        gold=line.gold,
        other_query_text=line.other_query_text,
        shots=tuple(line.shots) if line.shots is not None else guess_shots(line.demo_text, kinds),
        labels=None if line.labels is None else tuple(line.labels),
        markup=tuple(line.markup or ()),
    )


def _check_ranges(row: Row, name: str, ranges: Iterable[tuple[int, int]], text: str, length: int) -> None:
    previous_end = 0
    for start, end in ranges:
        if not previous_end <= start < end <= length:
            raise DataError(
                f"{row.place}: {name} range [{start}, {end}): ranges must ascend without overlap inside {text} (0..{length})"
            )
        previous_end = end


def _describe(item: Any, model: type[_Line]) -> str:
    key = ".".join(map(str, item["loc"])) or "line"
    if item["type"] == "extra_forbidden":
        return f"unknown key {preview(key)}{near_match(key, model.model_fields)}"
    if item["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, found {preview(item['input'])}"
