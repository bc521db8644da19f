"""``cedkv report``: a finished run rendered again from its folder alone, to the byte."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cedkv.cli.app import main
from cedkv.runs.manifest import NOTE, load_manifest
from cedkv.runs.outputs import OUTPUTS
from cedkv.tasks.load import Unusable
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.runs import run_comparison, run_phase2

RENDERED = ("*.html", "*.png", "summary.md", "comparison.json", "report_phase2.json", "phase2_*.json", "conditions.json")


@pytest.fixture(autouse=True)
def _no_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points.without_mlflow(monkeypatch)
    monkeypatch.chdir(tmp_path)


def render(folder: Path) -> Result:
    return CliRunner().invoke(main, ["report", str(folder)])


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(OUTPUTS.rglob("*")) if path.is_file()}


def lose_what_is_rendered() -> int:
    """Delete all that can be rendered again but for what tokens look like; how many files that were."""
    lost = [path for pattern in RENDERED for path in OUTPUTS.rglob(pattern) if path.name != "phase2_token_texts.json"]
    for path in lost:
        path.unlink()
    return len(lost)


def parent() -> Path:
    return next(path for path in OUTPUTS.iterdir() if load_manifest(path).parent is None)


def test_a_run_is_rendered_again_without_a_model(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama_folder, model)
    run_phase2(tiny.config(model))
    assert {path.name for path in parent().glob("*.png")} == {"accuracy.png", "kl_by_sample.png", "off_delta.png"}
    before = contents()
    shutil.rmtree(model)
    points.LOAD_MODEL.replace(lambda *_: pytest.fail("a model was loaded"), monkeypatch)
    assert lose_what_is_rendered() >= 7
    done = render(parent())
    assert done.exit_code == 0, done.output
    assert contents() == before


def test_what_is_known_of_samples_is_said_everywhere_and_again(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = Unusable("ON", "answer is several tokens", 41, ("<row-3>",))

    def noted(real: Any, *arguments: Any) -> Any:
        return replace(real(*arguments), notes=("the file is short",), unusable=(left_out,))

    points.LOAD_SAMPLES.wrap(monkeypatch, noted)
    run_phase2(tiny.config(llama_folder))
    streams, line = capsys.readouterr(), "41 of 47 ON samples left out: answer is several tokens (first: <row-3>, ...)"
    assert f"samples: the file is short\nsamples: {line}\n" in streams.err
    assert line in streams.out
    folder = parent()
    assert escape(line) in (folder / "report.html").read_text()
    known = json.loads((folder / "report_phase2.json").read_text())["samples"]
    assert known == {"notes": ["the file is short"], "unusable": [asdict(left_out) | {"examples": ["<row-3>"]}]}
    manifest = load_manifest(folder)
    assert manifest.tags["samples.unusable"] == "41"
    assert "41 of 47 ON samples left out" in manifest.tags[NOTE]
    before = contents()
    assert lose_what_is_rendered() >= 7
    assert render(folder).exit_code == 0
    assert contents() == before


def test_a_comparison_and_its_conditions_are_rendered_again(llama_folder: Path) -> None:
    run_comparison("ablate_selector", tiny.config(llama_folder), {"select_modes": "random_span,full_demo"})
    assert {path.name for path in parent().glob("*.png")} == {"accuracy_by_condition.png", "kl_to_teacher_by_condition.png"}
    before = contents()
    assert lose_what_is_rendered() >= 20
    done = render(parent())
    assert done.exit_code == 0, done.output
    assert contents() == before
    child = next(path for path in OUTPUTS.iterdir() if path != parent())
    rejected = render(child)
    assert rejected.exit_code == 2
    assert f"is a condition of comparison {parent().name}: render the comparison" in rejected.output


def test_what_cannot_be_rendered_says_why(llama_folder: Path) -> None:
    run_phase2(tiny.config(llama_folder), "1.5")
    folder = parent()
    texts = folder / "artifacts" / "phase2_token_texts.json"
    whole = texts.read_text()
    texts.write_text(json.dumps({"tokens": {}}))
    assert "has no text in phase2_token_texts.json: the file was damaged or edited" in render(folder).output
    texts.unlink()
    assert "was made by a version of cedkv that did not store" in render(folder).output
    texts.write_text(whole)
    journal = folder / "journal.jsonl"
    lines = journal.read_bytes()
    journal.write_bytes(lines.replace(b'"correct_base":false', b'"correct_base":true ', 1))
    assert "does not match its sha256" in render(folder).output
    journal.write_bytes(lines)
    assert render(folder).exit_code == 0
    manifest = load_manifest(folder)
    manifest.metrics_at = None
    manifest.save()
    assert f"is not finished (FINISHED): --resume {folder.name} first" in render(folder).output
    assert "there is nothing to continue" in render(Path("outputs/absent")).output
