"""examples/: notebooks and script on the real small model, and the outputs that the notebooks are stored with."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.support import notebooks

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
_NUMBER = re.compile(r"\d+\.\d+")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_notebooks(path: Path) -> None:
    """The keys of nbformat 4.5; no output has a path, a run id or a time of the machine that made it."""
    notebook = notebooks.read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["cells"][0]["source"][0].startswith("# ")
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == wanted | ({"execution_count", "outputs"} if cell["cell_type"] == "code" else set())
    cells = notebooks.code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "stored out of order, or not run"
    for cell in cells:
        assert all(set(output) == {"name", "output_type", "text"} for output in cell["outputs"])
        assert not re.search(r"/\w+/|\b[0-9a-f]{32}\b|\d\d:\d\d|\d s\b", notebooks.stored(cell))
    assert path.read_text(encoding="utf-8") == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.weights
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_print_what_they_are_stored_with(path: Path, store: str) -> None:
    """Decimals may differ in the last digit, as processors do; everything else is the same."""
    notebook = notebooks.read(path)
    for cell, printed in zip(notebooks.code_cells(notebook), notebooks.run(notebook, path.name), strict=True):
        kept = notebooks.stored(cell)
        assert _NUMBER.sub("#", printed) == _NUMBER.sub("#", kept), f"run: python -m tests.support.notebooks {path}"
        numbers = [[float(number) for number in _NUMBER.findall(text)] for text in (printed, kept)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.011)


@pytest.mark.weights
def test_the_script_compares_and_plots(store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--selectors", "whole_shots,sink_recent", "--max-on", "2", "--out", "figure.png"]
    monkeypatch.setattr(sys, "argv", ["ablate_and_plot.py", *arguments])
    runpy.run_path(str(EXAMPLES / "ablate_and_plot.py"), run_name="__main__")
    assert capsys.readouterr().out.endswith("figure   figure.png\n")
    assert Path("figure.png").read_bytes().startswith(b"\x89PNG")
