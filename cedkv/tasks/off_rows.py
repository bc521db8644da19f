"""OFF prompts of a user's file: prompts in a column, or plain documents, of which the beginning is taken."""

from __future__ import annotations

from cedkv.config.data import DataBlock
from cedkv.core.errors import DataError
from cedkv.core.text import preview
from cedkv.tasks.columns import Columns, as_text, sample_ids
from cedkv.tasks.episode_rows import PROMPT_COLUMN, read_prompts
from cedkv.tasks.from_rows import empty_rows
from cedkv.tasks.rows import is_document_file, read_documents, read_rows

PROMPTS = ("prompt", "question", "instruction", "input", "query")
DOCUMENTS = ("text", "content", "document", "article", "body", "sentence")
KEY = "data.off_path"


def read_off(path: str, data: DataBlock, limit: int) -> tuple[list[tuple[str, str, bool, str]], bool, list[str]]:
    """Return the first OFF prompts of a file, whether the file goes on behind them, and notes on it.

    A prompt is ``(sample_id, text, whether it is a document, place)``.

    Raises:
        DataError: the file is unreadable, has a bad row, or no column of prompts or documents; the message names the place.
    """
    if is_document_file(path):
        documents = read_documents(path, KEY, limit + 1)
        document = data.off_format != "prompt"
        named = [(f"off-{i:05d}", text, document, place) for i, (place, text) in enumerate(documents, 1)]
        return named[:limit], len(named) > limit, []
    rows = read_rows(path, KEY, lambda _: limit)
    if PROMPT_COLUMN in rows.rows[0].values:
        placed = zip(read_prompts(rows.rows), rows.rows, strict=True)
        return [(*prompt, data.off_format == "document", row.place) for prompt, row in placed], rows.cut, []
    known = {name.lower(): name for name in reversed(rows.columns)}
    column = next((known[name] for name in (*PROMPTS, *DOCUMENTS) if name in known), None)
    if column is None:
        raise DataError(
            f"{path}: no column of OFF prompts; found {preview(rows.columns, 400)}. Name one {', '.join(PROMPTS)}, or, for "
            f"documents, {', '.join(DOCUMENTS)}"
        )
    document = column.lower() in DOCUMENTS if data.off_format is None else data.off_format == "document"
    texts = [as_text(row.values.get(column), row.place, column) for row in rows.rows]
    empty = [row for row, text in zip(rows.rows, texts, strict=True) if text is None]
    notes = empty_rows(rows, empty, column, data.unusable == "skip")
    ids, note = sample_ids(rows, Columns("shots", column, column, id=known.get("id")))
    names = [f"off-{row.number:05d}" for row in rows.rows] if known.get("id") is None or note else ids
    read = zip(names, texts, rows.rows, strict=True)
    prompts = [(name, text, document, row.place) for name, text, row in read if text is not None]
    return prompts, rows.cut, [*([note] if note else []), *notes]
