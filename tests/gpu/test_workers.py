"""A worker of a Ray cluster takes a card, and computes what this process computes on it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cedkv.runs.outputs import OUTPUTS
from tests.gpu.conftest import SETTING, overrides
from tests.integration.test_ray import cluster
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.runs import run_phase2

__all__ = ["cluster"]
pytestmark = pytest.mark.gpu


def test_records_of_a_worker_are_those_of_this_process(
    device: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("ray", reason="workers need the extra ray")
    if os.environ.get(SETTING) == "stand-in":
        pytest.skip("a worker is another process, which has no stand-in")
    address = request.getfixturevalue("cluster")
    points.without_mlflow(monkeypatch)
    found = []
    for name, own in (("here", ()), ("worker", ("runtime.workers=1", f"runtime.ray_address={address}"))):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run_phase2(tiny.config(llama_folder, *overrides(device, "runtime.threads=1", *own)))
        (folder,) = OUTPUTS.resolve().iterdir()
        assert json.loads((folder / "artifacts" / "hf_runtime_meta.json").read_text())["device"].split(":")[0] == device
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found.append([line for line in lines if json.loads(line).get("kind") in ("on", "off")])
    assert found[0] == found[1]
    assert len(found[0]) == 8
