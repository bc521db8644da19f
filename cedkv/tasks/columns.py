"""Which column of a user's rows is what: as ``data.fields`` says, else by names that are well known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cedkv.config.fields import check_text
from cedkv.core.errors import DataError
from cedkv.core.text import near_match, preview
from cedkv.tasks.rows import MAX_LINE, Row, Rows

ROLES = {"input": "input", "text": "input", "output": "output", "label": "output", "id": "id", "context": "context",
         "choices": "choices"}  # fmt: skip
"""Names of ``data.fields`` -> what they mean; text and label are other words for input and output."""
_TEXTS = ("text", "sentence", "sms", "review", "tweet", "content", "message", "document", "body", "comment", "utterance",
          "description", "title")  # fmt: skip
_LABELS = ("label_text", "label_name", "label", "labels", "class", "class_index", "category", "label_coarse", "coarse_label",
           "sentiment", "intent", "emotion", "topic", "target")  # fmt: skip
_PAIRS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("instruction",), ("output", "response", "completion")),
    (("input",), ("output", "target", "answer", "answers")),
    (("question",), ("answer", "answers", "answerkey")),
    (("prompt",), ("completion", "response")),
    (("source",), ("target",)),
    (_TEXTS, _LABELS),
)
"""Inputs and outputs, the better known first."""
_CHOICES = ("choices", "all_classes", "options")
_IDS = ("id", "idx", "uid", "guid", "sample_id")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PREFIXES = ("gen_prefix", "answer_prefix")

Kind = Literal["shots", "records", "needle", "context"]


@dataclass(frozen=True)
class Columns:
    """The columns of a file that episodes are built from.

    kind: shots: rows are solved examples, of which demonstrations are made; the others carry a demonstration of their own:
        records of keys and values, a text with an answer prefix (RULER), or a context.
    more_input: what follows the input, where an instruction has one. given_id: whether ``data.fields`` names the ids.
    """

    kind: Kind
    input: str
    output: str
    more_input: str | None = None
    context: str | None = None
    choices: str | None = None
    prefix: str | None = None
    id: str | None = None
    given_id: bool = False

    def __str__(self) -> str:
        names = {"input": self.input, "output": self.output, "context": self.context, "choices": self.choices, "id": self.id}
        return ", ".join(f"{role}: {name}" for role, name in names.items() if name is not None)


def find_columns(rows: Rows, fields: Mapping[str, str], key: str) -> Columns:
    """Return which column is what.

    Args:
        fields: ``data.fields``: what -> column.
        key: the configuration key of the file, for messages.

    Raises:
        DataError: ``fields`` names a column that there is not, or the columns cannot be told by their names.
    """
    known = {_plain(name): name for name in reversed(rows.columns)}
    roles = _given(rows, fields)

    def first(role: str, names: Sequence[str]) -> str | None:
        return roles.get(role) or next((known[name] for name in names if name in known), None)

    if not roles and {"ordered_kv_records", "key", "value"} <= known.keys():
        return Columns("records", known["key"], known["value"], context=known["ordered_kv_records"], id=first("id", _IDS))
    if not roles and {"input", "outputs"} <= known.keys():
        return Columns("needle", known["input"], known["outputs"], prefix=first("", _PREFIXES), id=first("id", _IDS))
    pair = _pair(known, roles)
    if pair is None:
        raise DataError(
            f"{rows.path}: which columns are the input and the output cannot be told by their names; found "
            f"{preview(rows.columns, 400)}. Write data.fields={{input: ..., output: ...}} with two of them"
            + ("" if known.keys() & {"input", "question", "text"} else " (in CSV the first line names the columns)")
        )
    more = known.get("input") if _plain(pair[0]) == "instruction" and "input" in known and not roles.get("input") else None
    context = roles.get("context")
    if context is None and "input" not in roles and _plain(pair[0]) in ("input", "question"):
        context = known.get("context")
    choices = first("choices", _CHOICES)
    id_column = first("id", _IDS)
    kind: Kind = "shots" if context is None else "context"
    return Columns(kind, *pair, more, context, choices, None, id_column, "id" in roles)


def _given(rows: Rows, fields: Mapping[str, str]) -> dict[str, str]:
    roles: dict[str, str] = {}
    for name, column in fields.items():
        if name.lower() not in ROLES:
            raise DataError(f"data.fields: {preview(name)} is nothing that a column can be{near_match(name, ROLES)}")
        role = ROLES[name.lower()]
        if role in roles:
            raise DataError(f"data.fields names two columns as {role}: {preview(roles[role])} and {preview(column)}; name one")
        found = [known for known in rows.columns if known.lower() == column.lower()]
        if column not in rows.columns and len(found) != 1:
            raise DataError(
                f"data.fields.{name}: {rows.path} has no column {preview(column)}{near_match(column, rows.columns)}"
            )
        roles[role] = column if column in rows.columns else found[0]
    return roles


def _pair(known: Mapping[str, str], roles: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the columns of input and output; None where one of them cannot be told."""
    taken = set(roles.values())
    inputs = tuple(name for names, _ in _PAIRS for name in names)
    outputs = tuple(name for _, names in _PAIRS for name in names)
    for some_inputs, some_outputs in (*_PAIRS, (inputs, outputs)):
        source = roles.get("input") or next((known[n] for n in some_inputs if n in known and known[n] not in taken), None)
        target = roles.get("output") or next(
            (known[n] for n in some_outputs if n in known and known[n] not in (*taken, source)), None
        )
        if source is not None and target is not None:
            return source, target
    return None


def _plain(name: str) -> str:
    """Return a column's name as it is compared: ``Class Index`` as ``class_index``."""
    return re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_") if name.strip("_ ") else name


def as_text(value: Any, place: str, column: str) -> str | None:
    """Return a value as text, the first of a list of answers; None where it is empty.

    Raises:
        DataError: a value that is no text, number or list of them.
    """
    if isinstance(value, dict) and "text" in value:  # SQuAD's answers
        value = value["text"]
    if isinstance(value, list):
        return next((text for item in value if (text := as_text(item, place, column)) is not None), None)
    if value is None:
        return None
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise DataError(f"{place}: {column} should be text or a number, found {preview(value)}; name another column")
    text = str(value).strip()
    if len(text) > MAX_LINE:
        raise DataError(f"{place}: {column} has {len(text):,} characters, {MAX_LINE:,} are allowed; shorten it")
    if _SURROGATE.search(text):
        raise DataError(f"{place}: {column} holds half a character (a lone surrogate): {preview(text)}; write whole ones")
    return text or None


def as_texts(value: Any, place: str, column: str) -> tuple[str, ...]:
    """Return the texts of a list, or of ``{"text": [...]}``; none for anything else."""
    items = value.get("text") if isinstance(value, dict) else value
    if not isinstance(items, list):
        return ()
    return tuple(text for item in items if (text := as_text(item, place, column)) is not None)


def answer_of(row: Row, columns: Columns) -> tuple[str | None, tuple[str, ...]]:
    """Return a row's answer and the choices it has; an answer that numbers or letters the choices is put into words.

    ``{"choices": [...], "answer": 2}`` counts from 0; ``{"choices": {"text": [...], "label": ["A", ...]}, "answerKey": "B"}``.
    """
    answer = as_text(row.values.get(columns.output), row.place, columns.output)
    listed = None if columns.choices is None else row.values.get(columns.choices)
    choices = () if columns.choices is None else as_texts(listed, row.place, columns.choices)
    if answer is None or not choices or answer in choices:
        return answer, choices
    letters = as_texts(listed.get("label"), row.place, "label") if isinstance(listed, dict) else ()
    names = letters or tuple(map(str, range(len(choices))))
    if len(names) == len(choices) and answer in names:
        return choices[names.index(answer)], choices
    return answer, choices


def sample_ids(rows: Rows, columns: Columns) -> tuple[tuple[str, ...], str | None]:
    """Return the id of every row, and a note where the file's ids could not be taken.

    Raises:
        DataError: the column that ``data.fields`` names as ids has an empty, repeated or unprintable one.
    """
    numbered = tuple(f"row-{row.number:05d}" for row in rows.rows)
    if columns.id is None:
        return numbered, None
    place_of: dict[str, str] = {}
    problem = None
    for row in rows.rows:
        name = as_text(row.values.get(columns.id), row.place, columns.id)
        if name is None:
            problem = f"{row.place}: {columns.id} is empty"
        elif len(name) > 200 or not _is_plain(name):
            problem = f"{row.place}: {columns.id} {preview(name)} is longer than 200 characters or holds control characters"
        elif name in place_of:
            problem = f"{row.place}: id {preview(name)} was already used at {place_of[name]}"
        else:
            place_of[name] = row.place
            continue
        break
    if problem is None:
        return tuple(place_of), None
    if columns.given_id:
        raise DataError(f"{problem}; give every row its own id, or leave data.fields.id out: rows are then numbered")
    return numbered, f"{problem}: samples are named by the number of their row"


def _is_plain(text: str) -> bool:
    try:
        check_text(text)
    except ValueError:
        return False
    return True
