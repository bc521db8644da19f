"""Notebooks without Jupyter: their code cells run in one namespace, and what they print is what the file keeps as outputs.

``python -m tests.support.notebooks FILE...``, in an empty folder, runs notebooks and stores in them what they print.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stored(cell: Cell) -> str:
    """What a cell has printed, as the file has it."""
    return "".join("".join(output["text"]) for output in cell["outputs"])


def run(notebook: dict[str, Any], name: str) -> list[str]:
    """Run the code cells in their order; what each of them prints."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(code_cells(notebook), 1):
        with redirect_stdout(io.StringIO()) as output:
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec", dont_inherit=True), namespace)
        printed.append(output.getvalue())
    return printed


def store(path: Path) -> None:
    """Run a notebook and keep what its cells print as their outputs."""
    notebook = read(path)
    printed = run(notebook, path.name)
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed, strict=True), 1):
        lines = text.splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for file in sys.argv[1:]:
        store(Path(file))
