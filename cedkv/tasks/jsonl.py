"""Read the user's own samples, one JSON object per line; an error names the line.

ON:  {"demo_text": ..., "query_text": ..., "answer_text": ..., "id": optional, "demo_kinds": optional,
      "gold": optional [start, end], "shots": optional [[start, end], ...], "other_query_text": optional}
OFF: {"prompt_text": ..., "id": optional}

``demo_kinds`` is a list of ``[start, end, kind]`` over the characters of ``demo_text``, where kind is input, delimiter or
answer. Without ``demo_kinds``, occurrences of any ``answer_text`` of the file are answers, whitespace and punctuation are
delimiters, and the rest is input. ``gold``, the characters of ``demo_text`` that hold the answer, is needed by
``oracle_span`` only; ``other_query_text``, another question about the same demo, by ``transfer_span`` only. ``shots`` are the
characters of each solved example; without them, a shot ends with an answer and the whitespace after it.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cedkv.config.fields import Text as PlainText
from cedkv.core.errors import DataError
from cedkv.core.files import open_user_text
from cedkv.core.text import near_match, preview
from cedkv.core.values import OnEpisode, TokenKind

MAX_LINE = 10_000_000
"""Most characters per line; without a limit, a file without line ends would be read into memory as a whole."""

Text = Annotated[str, Field(min_length=1)]


class TooFewLinesError(DataError):
    """A file has fewer lines than are needed; ``lines``: how many it has."""

    def __init__(self, message: str, lines: int) -> None:
        super().__init__(message)
        self.lines = lines


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
    shots: Annotated[list[tuple[int, int]], Field(min_length=1)] | None = None


class OffLine(_Line):
    prompt_text: Text


LineT = TypeVar("LineT", bound=_Line)


def read_on(path: str, n: int) -> list[OnEpisode]:
    """Return the first ``n`` episodes of a file.

    Raises:
        DataError: the file is unreadable or has a bad line; the message names file and line.
        TooFewLinesError: it has too few.
    """
    lines = _read(path, n, OnLine, "data.on_path", "eval.on_samples (-P max_on)")
    answers = {line.answer_text.strip() for line in lines} - {""}
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(a)}(?!\w)" for a in sorted(answers, key=len, reverse=True)) or r"(?!)")
    episodes = []
    for number, line in enumerate(lines, 1):
        sample_id = line.id or f"on-{number:05d}"
        kinds = _checked_kinds(path, number, line) if line.demo_kinds is not None else _guess_kinds(line.demo_text, pattern)
        if line.gold is not None and not 0 <= line.gold[0] < line.gold[1] <= len(line.demo_text):
            raise DataError(
                f"{path}:{number}: gold {list(line.gold)} is not a range inside demo_text (0..{len(line.demo_text)})"
            )
        previous_end = 0
        for start, end in line.shots or ():
            if not previous_end <= start < end <= len(line.demo_text):
                raise DataError(
                    f"{path}:{number}: shots range [{start}, {end}): ranges must ascend without overlap inside demo_text "
                    f"(0..{len(line.demo_text)})"
                )
            previous_end = end
        episodes.append(
            OnEpisode(
                sample_id=sample_id,
                demo_text=line.demo_text,
                query_text=line.query_text,
                answer_text=line.answer_text,
                char_kinds=kinds,
                gold=line.gold,
                other_query_text=line.other_query_text,
                shots=tuple(line.shots) if line.shots is not None else _guess_shots(line.demo_text, kinds),
            )
        )
    return episodes


def read_off(path: str, n: int) -> list[tuple[str, str]]:
    """Return the first ``n`` OFF prompts of a file, as ``(sample_id, text)``. Raises DataError as ``read_on`` does."""
    lines = _read(path, n, OffLine, "data.off_path", "eval.off_samples (-P max_off)")
    return [(line.id or f"off-{number:05d}", line.prompt_text) for number, line in enumerate(lines, 1)]


def _read(path: str, n: int, model: type[LineT], key: str, count_key: str) -> list[LineT]:
    lines: list[LineT] = []
    line_of_id: dict[str, int] = {}
    try:
        with open_user_text(Path(path)) as file:
            for number, text in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                if len(lines) == n:
                    break
                if len(text) > MAX_LINE:
                    raise DataError(f"{path}:{number}: more than {MAX_LINE:,} characters; write one JSON object per line")
                if not text.strip():
                    raise DataError(f"{path}:{number}: empty line; write one JSON object on every line")
                line = _parse(path, number, text, model)
                if line.id is not None and line_of_id.setdefault(line.id, number) != number:
                    raise DataError(
                        f"{path}:{number}: id {preview(line.id)} was already used on line {line_of_id[line.id]}; give every "
                        "line its own id"
                    )
                lines.append(line)
    except ValueError as error:
        raise DataError(f"{key} = {preview(path, 200)} cannot be read: {error}; give the path of a JSONL file") from None
    if len(lines) < n:
        message = f"{path}: {len(lines)} lines, but {count_key} = {n}; add lines or lower it to {len(lines)}"
        raise TooFewLinesError(message, len(lines))
    return lines


def _parse(path: str, number: int, text: str, model: type[LineT]) -> LineT:
    try:
        value: Any = json.loads(text, parse_constant=_reject_constant, object_pairs_hook=_unique_keys)
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        problems = [_describe(item, model) for item in error.errors(include_url=False)[:5]]
        raise DataError(f"{path}:{number}: {'; '.join(problems)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not a JSON object: {error}; write one on every line, as the README shows") from None


def _describe(item: Any, model: type[_Line]) -> str:
    key = ".".join(map(str, item["loc"])) or "line"
    if item["type"] == "extra_forbidden":
        return f"unknown key {preview(key)}{near_match(key, model.model_fields)}"
    if item["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, found {preview(item['input'])}"


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in [earlier for earlier, _ in pairs[:i]])
        raise ValueError(f"key {preview(repeated)} appears twice")
    return values


def _checked_kinds(path: str, number: int, line: OnLine) -> tuple[tuple[int, int, TokenKind], ...]:
    previous_end = 0
    for start, end, _ in line.demo_kinds or ():
        if not previous_end <= start < end <= len(line.demo_text):
            raise DataError(
                f"{path}:{number}: demo_kinds range [{start}, {end}): ranges must ascend without overlap inside "
                f"demo_text (0..{len(line.demo_text)})"
            )
        previous_end = end
    return tuple(line.demo_kinds or ())


def _guess_kinds(demo: str, answers: re.Pattern[str]) -> tuple[tuple[int, int, TokenKind], ...]:
    kinds: list[tuple[int, int, TokenKind]] = []
    position = 0
    for match in [*answers.finditer(demo), None]:
        stop = match.start() if match else len(demo)
        for piece in re.finditer(r"\w+|\W+", demo[position:stop]):
            kind: TokenKind = "input" if piece.group()[0].isalnum() or piece.group()[0] == "_" else "delimiter"
            kinds.append((position + piece.start(), position + piece.end(), kind))
        if match:
            kinds.append((match.start(), match.end(), "answer"))
            position = match.end()
    return tuple(kinds)


def _guess_shots(demo: str, kinds: tuple[tuple[int, int, TokenKind], ...]) -> tuple[tuple[int, int], ...] | None:
    """Return the shots of a demo: each ends with an answer and the whitespace after it. None without answers."""
    ends = [end + len(demo[end:]) - len(demo[end:].lstrip()) for _, end, kind in kinds if kind == "answer"]
    edges = sorted({0, *ends})
    return tuple(itertools.pairwise(edges)) or None
