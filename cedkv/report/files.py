"""Writing results: JSON without NaN, whole files by one rename, lines flushed as they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cedkv.metrics_phase2 import finite_or_none
from cedkv.types import Record

SCHEMA_VERSION = "1.0"


def clean(value: Any) -> Any:
    """The same structure with every number that is not finite as null."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return finite_or_none(value)


def write_text(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object with its ``schema_version`` first."""
    text = json.dumps(clean({"schema_version": SCHEMA_VERSION, **content}), ensure_ascii=False, indent=1, allow_nan=False)
    write_text(path, text + "\n")


def append_lines(path: Path, records: Sequence[Record]) -> None:
    """Append records as JSON lines, each with its ``schema_version``, and flush them to disk."""
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(
                json.dumps(clean({"schema_version": SCHEMA_VERSION, **record}), ensure_ascii=False, allow_nan=False) + "\n"
            )
        file.flush()
        os.fsync(file.fileno())
