"""Samples of the user's own, one JSON object a line, each line checked and named when it is wrong.

ON:  {"demo_text": ..., "query_text": ..., "answer_text": ..., "id": optional, "demo_kinds": optional,
      "gold": optional [start, end], "other_query_text": optional}
OFF: {"prompt_text": ..., "id": optional}

``demo_kinds`` is a list of ``[start, end, kind]`` over the characters of ``demo_text``, kind being input, delimiter or
answer. Without it, occurrences of the answers found in the file's ``answer_text`` are answers, whitespace and
punctuation are delimiters, and the rest is input. ``gold``, the characters of ``demo_text`` that hold the answer, and
``other_query_text``, another question about the same demo, are needed by ``oracle_span`` and ``transfer_span`` only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cedkv.config.resolve import near_match
from cedkv.config.schema import Phase2Config
from cedkv.config.schema import Text as PlainText
from cedkv.core.errors import DataError
from cedkv.core.files import open_user_text
from cedkv.core.text import preview
from cedkv.core.values import OnEpisode, TokenKind

MAX_LINE = 10_000_000
"""Characters of a line; a file without line ends would be read into memory as a whole."""

Text = Annotated[str, Field(min_length=1)]


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


class OffLine(_Line):
    prompt_text: Text


LineT = TypeVar("LineT", bound=_Line)


def check_files(config: Phase2Config) -> None:
    """Read the files a configuration names, before a run is started for them. Raises DataError as ``read_on``."""
    if config.data.on_path is not None:
        read_on(config.data.on_path, config.eval.on_samples)
    if config.data.off_path is not None:
        read_off(config.data.off_path, config.eval.off_samples)


def read_on(path: str, n: int) -> list[OnEpisode]:
    """The first ``n`` episodes of a file.

    Raises:
        DataError: unreadable, a bad line, or too few lines; the message names file and line.
    """
    lines = _read(path, n, OnLine, "data.on_path", "eval.on_samples (-P max_on)")
    answers = {line.answer_text.strip() for line in lines} - {""}
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(a)}(?!\w)" for a in sorted(answers, key=len, reverse=True)) or r"(?!)")
    found = []
    for number, line in enumerate(lines, 1):
        sample_id = line.id or f"on-{number:05d}"
        kinds = _given_kinds(path, number, line) if line.demo_kinds is not None else _guessed_kinds(line.demo_text, pattern)
        if line.gold is not None and not 0 <= line.gold[0] < line.gold[1] <= len(line.demo_text):
            raise DataError(f"{path}:{number}: gold {list(line.gold)} is no range inside demo_text (0..{len(line.demo_text)})")
        found.append(
            OnEpisode(sample_id, line.demo_text, line.query_text, line.answer_text, kinds, line.gold, line.other_query_text)
        )
    return found


def read_off(path: str, n: int) -> list[tuple[str, str]]:
    """The first ``n`` OFF prompts of a file, as ``(sample_id, text)``. Raises DataError as ``read_on`` does."""
    lines = _read(path, n, OffLine, "data.off_path", "eval.off_samples (-P max_off)")
    return [(line.id or f"off-{number:05d}", line.prompt_text) for number, line in enumerate(lines, 1)]


def _read(path: str, n: int, model: type[LineT], key: str, count_key: str) -> list[LineT]:
    found: list[LineT] = []
    ids: dict[str, int] = {}
    try:
        with open_user_text(Path(path)) as file:
            for number, text in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                if len(found) == n:
                    break
                if len(text) > MAX_LINE:
                    raise DataError(f"{path}:{number}: more than {MAX_LINE:,} characters; write one JSON object a line")
                if not text.strip():
                    raise DataError(f"{path}:{number}: empty line; write one JSON object on every line")
                line = _parse(path, number, text, model)
                if line.id is not None and ids.setdefault(line.id, number) != number:
                    raise DataError(
                        f"{path}:{number}: id {preview(line.id)} was used on line {ids[line.id]} already; give each its own"
                    )
                found.append(line)
    except ValueError as error:
        raise DataError(f"{key} = {preview(path, 200)} cannot be read: {error}; give the path of a JSONL file") from None
    if len(found) < n:
        raise DataError(f"{path}: {len(found)} lines, but {count_key} = {n}; add lines or lower it to {len(found)}")
    return found


def _parse(path: str, number: int, text: str, model: type[LineT]) -> LineT:
    try:
        value: Any = json.loads(text, parse_constant=_not_json, object_pairs_hook=_once)
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        problems = [_problem(item, model) for item in error.errors(include_url=False)[:5]]
        raise DataError(f"{path}:{number}: {'; '.join(problems)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not a JSON object: {error}; write one on every line, as the README shows") from None


def _problem(item: Any, model: type[_Line]) -> str:
    key = ".".join(map(str, item["loc"])) or "line"
    if item["type"] == "extra_forbidden":
        return f"unknown key {preview(key)}{near_match(key, model.model_fields)}"
    if item["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, found {preview(item['input'])}"


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if key in [before for before, _ in pairs[:at]])
        raise ValueError(f"key {preview(twice)} appears twice")
    return found


def _given_kinds(path: str, number: int, line: OnLine) -> tuple[tuple[int, int, TokenKind], ...]:
    end_before = 0
    for start, end, _ in line.demo_kinds or ():
        if not end_before <= start < end <= len(line.demo_text):
            raise DataError(
                f"{path}:{number}: demo_kinds range [{start}, {end}): ranges must ascend without overlap inside "
                f"demo_text (0..{len(line.demo_text)})"
            )
        end_before = end
    return tuple(line.demo_kinds or ())


def _guessed_kinds(demo: str, answers: re.Pattern[str]) -> tuple[tuple[int, int, TokenKind], ...]:
    kinds: list[tuple[int, int, TokenKind]] = []
    at = 0
    for match in [*answers.finditer(demo), None]:
        stop = match.start() if match else len(demo)
        for piece in re.finditer(r"\w+|\W+", demo[at:stop]):
            kind: TokenKind = "input" if piece.group()[0].isalnum() or piece.group()[0] == "_" else "delimiter"
            kinds.append((at + piece.start(), at + piece.end(), kind))
        if match:
            kinds.append((match.start(), match.end(), "answer"))
            at = match.end()
    return tuple(kinds)
