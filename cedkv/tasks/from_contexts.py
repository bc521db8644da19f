"""Episodes from rows that carry a demonstration of their own: records of keys and values, or a text that holds the answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cedkv.config.data import DataBlock
from cedkv.core.errors import DataError
from cedkv.core.text import preview
from cedkv.core.values import OnEpisode, TokenKind
from cedkv.tasks.base import TaskRequest
from cedkv.tasks.columns import Columns, answer_of, as_text, sample_ids
from cedkv.tasks.demo_answers import guess_kinds, guess_shots, occurrences
from cedkv.tasks.from_rows import RowTask, empty_rows, query_order
from cedkv.tasks.rows import Row, Rows
from cedkv.tasks.shots import Question, Shot, ShotTemplate, episode_of, shots_that_fit, template_for

RECORD = "{input}: {output}\n"
"""How a record of a key and a value is written."""
QUESTION = "Question: {input}\nAnswer: {output}"
"""How a question about a context is written; one that ends with a colon has its own words and stands as it is."""
AS_IT_IS = "{input} {output}"


@dataclass(frozen=True)
class Records:
    """A row of key-value retrieval: the records, and which of them is asked for."""

    records: tuple[Shot, ...]
    asked: int


@dataclass(frozen=True)
class RecordRows(RowTask):
    """Key-value retrieval: the demonstration is a row's records, the answer the value of one of its keys."""

    items: tuple[Records, ...]

    def episodes(self, request: TaskRequest) -> Iterator[OnEpisode]:
        template = template_for(request, RECORD)
        return (self._episode(row, request, template) for row in self.order)

    def lacking(self, field: str, data: DataBlock, seed: int, n: int) -> str | None:
        if field != "other_query_text":
            return None
        return next((self.ids[row] for row in self.order[:n] if len(self.items[row].records) == 1), None)

    def _episode(self, row: int, request: TaskRequest, template: ShotTemplate) -> OnEpisode:
        item = self.items[row]
        start, records = self._window(item, request, template)
        asked = item.asked - start
        other = records[(asked + len(records) // 2) % len(records)] if len(records) > 1 else None
        question = Question(records[asked].input, records[asked].output, asked, None if other is None else other.input)
        return episode_of(self.ids[row], records, question, template)

    def _window(self, item: Records, request: TaskRequest, template: ShotTemplate) -> tuple[int, Sequence[Shot]]:
        """Return the records that fit ``data.demo_tokens``: neighbours of the one asked for, which keeps its depth."""
        records, limit = item.records, request.data.demo_tokens
        if limit is None or len(records) < 3:
            return 0, records
        n, fitting = len(records), len(shots_that_fit(records, limit, template, request.tokenizer))
        fitting = max(fitting, 2)
        start = round(item.asked * (n - fitting) / (n - 1))
        return start, records[start : start + fitting]


@dataclass(frozen=True)
class Context:
    """A row with a text that holds the answer.

    answers: what is an answer wherever it occurs in the text. gold: the characters of ``text`` that hold the answer.
    """

    text: str
    question: str
    answer: str
    template: str
    answers: tuple[str, ...]
    gold: tuple[int, int] | None = None
    labels: tuple[str, ...] | None = None
    other: str | None = None

    @property
    def kinds(self) -> tuple[tuple[int, int, TokenKind], ...]:
        """The kinds of the text's characters."""
        return guess_kinds(self.text, ShotTemplate.parse(self.template).query(self.question), self.answers)


@dataclass(frozen=True)
class ContextRows(RowTask):
    """A text and a question about it: the demonstration is the text."""

    items: tuple[Context, ...]

    def episodes(self, request: TaskRequest) -> Iterator[OnEpisode]:
        return (self._episode(row, request) for row in self.order)

    def lacking(self, field: str, data: DataBlock, seed: int, n: int) -> str | None:
        for row in self.order[:n]:
            item = self.items[row]
            if {"gold": item.gold, "other_query_text": item.other, "shots": _shots(item)}[field] is None:
                return self.ids[row]
        return None

    def _episode(self, row: int, request: TaskRequest) -> OnEpisode:
        item = self.items[row]
        template = ShotTemplate.parse(request.data.template or item.template)
        return OnEpisode(
            sample_id=self.ids[row],
            demo_text=item.text,
            query_text=template.query(item.question),
            answer_text=template.answer(item.answer),
            char_kinds=item.kinds,
            gold=item.gold,
            other_query_text=None if item.other is None else template.query(item.other),
            shots=_shots(item),
            labels=None if item.labels is None else tuple(template.answer(label) for label in item.labels),
        )


def _shots(item: Context) -> tuple[tuple[int, int], ...] | None:
    """Return the shots of a text whose answers are labels; None for other texts, whose answer is one place among others."""
    return None if item.labels is None else guess_shots(item.text, item.kinds)


def record_rows(rows: Rows, columns: Columns, data: DataBlock, seed: int) -> tuple[RecordRows, list[str]]:
    """Return the task of rows of key-value retrieval, and notes on them.

    Raises:
        DataError: a row whose records are no pairs, or whose key is none of them or has another value there.
    """
    ids, note = sample_ids(rows, columns)
    items = tuple(_records(row, columns) for row in rows.rows)
    return RecordRows(rows.path, ids, query_order(len(items), seed), items), [note] if note else []


def _records(row: Row, columns: Columns) -> Records:
    listed = row.values.get(columns.context or "")
    found = []
    for pair in listed if isinstance(listed, list) else ():
        texts = [as_text(part, row.place, str(columns.context)) for part in pair] if isinstance(pair, list) else []
        if len(texts) != 2 or texts[0] is None or texts[1] is None:
            raise DataError(f"{row.place}: a record of {columns.context} should be [key, value], found {preview(pair)}")
        found.append(Shot(texts[0], texts[1]))
    key = as_text(row.values.get(columns.input), row.place, columns.input)
    value = as_text(row.values.get(columns.output), row.place, columns.output)
    asked = [i for i, record in enumerate(found) if record == Shot(key or "", value or "")]
    if not asked:
        raise DataError(
            f"{row.place}: {columns.context} has no record of key {preview(key)} and value {preview(value)}, so that the "
            "demonstration does not hold the answer; add it"
        )
    return Records(tuple(found), asked[0])


def context_rows(rows: Rows, columns: Columns, data: DataBlock, seed: int) -> tuple[ContextRows, list[str]]:
    """Return the task of rows with a text of their own, and notes on them.

    Raises:
        DataError: rows without text, question or answer; settings that are for demonstrations of shots.
    """
    for key, value in (("demo_tokens", data.demo_tokens), ("shots_from", data.shots_from), ("verbalizer", data.verbalizer)):
        if value is not None:
            raise DataError(
                f"data.{key} is for demonstrations made of shots, and each row of {rows.path} carries a text of its own "
                f"(column {columns.context or columns.input}); leave it out"
            )
    if data.format == "chat":
        raise DataError(
            f"data.format = chat writes shots as turns, and each row of {rows.path} carries a text of its own (column "
            f"{columns.context or columns.input}); leave it at text"
        )
    ids, note = sample_ids(rows, columns)
    read = _needle if columns.kind == "needle" else _context
    found = [(ids[i], row, read(row, columns)) for i, row in enumerate(rows.rows)]
    empty = [row for _, row, item in found if item is None]
    notes = empty_rows(rows, empty, "text, question or answer", data.unusable == "skip")
    kept = [(name, item) for name, _, item in found if item is not None]
    items = _with_others([item for _, item in kept])
    task = ContextRows(rows.path, tuple(name for name, _ in kept), query_order(len(items), seed), items)
    return task, [*([note] if note else []), *notes]


def _needle(row: Row, columns: Columns) -> Context | None:
    """Return a row of RULER: the text, and the beginning of its answer as the query (else the text's last line)."""
    text = as_text(row.values.get(columns.input), row.place, columns.input)
    answer = as_text(row.values.get(columns.output), row.place, columns.output)
    prefix = None if columns.prefix is None else row.values.get(columns.prefix)
    if text is not None and (not isinstance(prefix, str) or not prefix.strip()):
        text, _, prefix = text.rpartition("\n")
    if not text or answer is None or not isinstance(prefix, str) or not prefix.strip():
        return None
    text += "" if prefix[0].isspace() else "\n"
    return Context(text, prefix.rstrip(), answer, AS_IT_IS, (answer,), _gold(text, answer, None))


def _context(row: Row, columns: Columns) -> Context | None:
    text = as_text(row.values.get(columns.context or ""), row.place, str(columns.context))
    asked = as_text(row.values.get(columns.input), row.place, columns.input)
    answer, choices = answer_of(row, columns)
    if text is None or asked is None or answer is None:
        return None
    own_words = asked.endswith(":")
    raw, value = str(row.values.get(columns.context or "")), row.values.get(columns.output)
    lead = len(raw) - len(raw.lstrip())
    starts = value.get("answer_start") if isinstance(value, dict) else None
    start = starts[0] - lead if isinstance(starts, list) and starts and isinstance(starts[0], int) else None
    text += "\n" if own_words else "\n\n"
    answers = choices or (answer,)
    item = Context(text, asked, answer, AS_IT_IS if own_words else QUESTION, answers, None, choices or None)
    with_answer = [shot for shot in _shots(item) or () if text[slice(*shot)].rstrip().endswith(answer)]
    return replace(item, gold=with_answer[-1] if with_answer else None if choices else _gold(text, answer, start))


def _gold(text: str, answer: str, start: int | None) -> tuple[int, int] | None:
    """Return the sentence that holds the answer: where it is said to start, else where it occurs last; None for nowhere."""
    if start is None or text[start : start + len(answer)] != answer:
        places = occurrences(text, (answer,))
        if not places:
            return None
        start, end = ([place for place in places if text[slice(*place)] == answer] or places)[-1]
    else:
        end = start + len(answer)
    before = [match.end() for match in re.finditer(r"[.!?]\s+|\n+", text[:start])]
    after = re.search(r"[.!?](?=\s|$)|\n", text[end:])
    return before[-1] if before else 0, len(text.rstrip()) if after is None else end + after.end()


def _with_others(items: Sequence[Context]) -> tuple[Context, ...]:
    """Return the rows, each with another row's question about the same text, where there is one."""
    questions: dict[str, list[str]] = {}
    for item in items:
        asked = questions.setdefault(item.text, [])
        if item.question not in asked:
            asked.append(item.question)

    def other(item: Context) -> str | None:
        asked = questions[item.text]
        return None if len(asked) == 1 else asked[(asked.index(item.question) + 1) % len(asked)]

    return tuple(replace(item, other=other(item)) for item in items)
