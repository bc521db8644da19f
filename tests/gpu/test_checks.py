"""Checks on a card: a sound model is certified there, under a name of its own, and what is broken is seen there too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cedkv.checks.certificate import FOLDER, certify, ensure_certificate
from cedkv.models import loading
from cedkv.models.fingerprint import fingerprint
from tests.gpu.conftest import overrides
from tests.mutation.measuring import LEARNED, certificate_verdicts, reference, run_verdicts
from tests.mutation.table import TABLE
from tests.support import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture
def everywhere(device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Loads of the mutation tests put the model on the device."""
    real: Any = tiny.config
    monkeypatch.setattr(tiny, "config", lambda folder, *own: real(folder, f"runtime.device={device}", *own))
    monkeypatch.setenv(FOLDER, str(tmp_path / "certificates"))
    return device


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_model_is_certified(device: str, llama_folder: Path, tmp_path: Path, dtype: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    _, lm = tiny.load(llama_folder, *overrides(device, f"runtime.torch_dtype={dtype}"))
    found = certify(lm, fingerprint(lm), None)
    assert found.broke is None
    assert [each.name for each in found.findings if each.verdict != "pass"] == []
    assert ensure_certificate(lm, fingerprint(lm), None) == found, "kept for this device"
    assert found.identity["runtime.device"] == device


def rows(gate: str) -> list[Any]:
    """A fault for every check of the kind, each under its own settings; the first of the table."""
    first = {key: (plant, key, own) for plant, key, own in reversed(TABLE) if key.startswith(gate)}
    return [pytest.param(*row, id=row[1]) for row in first.values()]


@pytest.mark.parametrize(("plant", "key", "own"), rows("gateA."))
def test_planted_faults_are_seen_by_gate_a(
    everywhere: str, llama_folder: Path, plant: Any, key: str, own: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = reference(llama_folder)
    assert run_verdicts(llama_folder, own, sound)[key] == "pass"
    plant(monkeypatch)
    assert run_verdicts(llama_folder, own, sound)[key] == "fail"


@pytest.mark.parametrize(("plant", "key", "own"), rows("certificate."))
def test_planted_faults_are_seen_by_the_certificate(
    everywhere: str,
    llama_folder: Path,
    tmp_path: Path,
    plant: Any,
    key: str,
    own: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert certificate_verdicts(llama_folder, tmp_path / "sound", monkeypatch)[key] == "pass"
    plant(monkeypatch)
    assert certificate_verdicts(llama_folder, tmp_path / "faulty", monkeypatch)[key] == "fail"


def test_the_gates_of_a_model_that_knows_the_answers(everywhere: str, llama_folder: Path) -> None:
    verdicts = run_verdicts(llama_folder, LEARNED, reference(llama_folder))
    assert {key for key, verdict in verdicts.items() if verdict == "fail"} == set()
    assert loading.load(tiny.config(llama_folder)).device.type == everywhere
