"""Shards: every unit is in one of them, and each is a run without a verdict that is resumed as itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from cedkv.config.resolve import resolve
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.shards import Shard
from cedkv.runs import pipeline
from cedkv.runs.manifest import find_resumable, load_manifest
from cedkv.runs.merge import merge
from cedkv.runs.outputs import OUTPUTS
from cedkv.runs.planning import measured_rate, plan_run, plan_time
from cedkv.runs.resolved import resolve_inputs, resolve_run
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.crashing import forked
from tests.support.shards import SIZES, cli, merged, run_it, run_shards, shard_of


@pytest.fixture
def config(llama_folder: Path) -> Phase2Config:
    return tiny.config(llama_folder, *SIZES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0/4", "there is no shard 0 of 4: shards are counted from 1, 1/4 to 4/4"),
        ("5/4", "there is no shard 5 of 4"),
        ("1/0", "a run is divided into 0 shards, from 1 to 9,999 are possible"),
        ("1/10000", "a run is divided into 10000 shards"),
        *(
            (text, "a shard is i/n, as 1/4")
            for text in ("a", "1", "1/", "-1/4", "01/4", "1/4/4", "1 /4", "٣/٤", f"1/{'9' * 5000}")
        ),
    ],
)
def test_what_names_no_shard_is_rejected(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape("phase2.runtime.shard")) as caught:
        resolve(None, (), {"shard": text})
    assert reason in str(caught.value) or "valid string" in str(caught.value)


def test_shards_have_every_unit_once() -> None:
    for n in range(8):
        units = list(range(n))
        for count in (1, 2, 3, 9):
            parts = [Shard(i + 1, count).of(units) for i in range(count)]
            assert sorted(unit for part in parts for unit in part) == units
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Shard.parse("2/3").of("abcdefg") == "be"


@pytest.mark.usefixtures("without_mlflow")
def test_a_plan_is_of_the_shard(config: Phase2Config) -> None:
    """Its units, and the pace of one that was run; a merged run, whose times are sums, gives none."""
    shards = run_shards(config, 4)
    shard = shard_of(config, "1/2")
    inputs = resolve_inputs("phase2", shard)
    assert plan_run(inputs, lambda _: None).total("units") == 2
    whole, empty = plan_run(resolve_inputs("phase2", config), lambda _: None), resolve_inputs("phase2", shard_of(config, "4/4"))
    assert plan_run(empty, lambda _: None).total("tokens") == 0
    rate = measured_rate(OUTPUTS / shards[0], lambda _: None)
    assert plan_time(whole, rate, 1).units > plan_time(plan_run(inputs, lambda _: None), rate, 1).units > 0
    assert plan_time(plan_run(empty, lambda _: None), rate, 1).units == 0
    for run_id, told in (
        (shards[3], "is shard 4/4, which has no units"),
        (merged(shards[:3]), "was merged, and its times are"),
    ):
        with pytest.raises(ConfigError, match=told):
            measured_rate(OUTPUTS / run_id, lambda _: None)


@pytest.mark.usefixtures("without_mlflow")
def test_an_interrupted_shard_is_resumed_as_a_shard(config: Phase2Config) -> None:
    shard = shard_of(config, "1/2")

    def killed_after_a_unit() -> None:
        real = points.JOURNAL_APPEND.real

        def append(*arguments: Any) -> None:
            real(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        points.JOURNAL_APPEND.replace(append)

    assert forked(lambda: run_it("phase2", shard), killed_after_a_unit) == -signal.SIGKILL
    (folder,) = OUTPUTS.iterdir()
    manifest = find_resumable(folder.name)
    assert pipeline.run(resolve_run("phase2", resolve(folder / "config.yaml"), resumed=manifest)) == []
    assert load_manifest(folder).status == "FINISHED"
    lines = (folder / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line).get("unit") for line in lines] == [None, "unit/00000", "unit/00002"]


def test_two_shards_at_once_on_a_cold_store(
    config: Phase2Config, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder of outputs, a database that neither has made yet, and a model that neither has certified yet."""
    uri = f"sqlite:///{tmp_path}/cold.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("CEDKV_CERTIFICATES", str(tmp_path / "certificates"))
    mlflow.set_tracking_uri(uri)
    children = []
    for name in ("1/2", "2/2"):
        child = os.fork()
        if child == 0:
            os._exit(forked(lambda name=name: run_it("phase2", shard_of(config, name))))  # type: ignore[misc]
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    found = mlflow.search_runs(experiment_names=["cedkv"], output_format="list")
    assert {run.info.run_id for run in found} == {folder.name for folder in OUTPUTS.iterdir()}
    assert sorted(run.data.tags["shard"] for run in found) == ["1/2", "2/2"]
    assert {run.info.status for run in found} == {"FINISHED"}
    assert all(load_manifest(folder).logged for folder in OUTPUTS.iterdir())
    assert len(list((tmp_path / "certificates").iterdir())) == 1
    merge([folder.name for folder in OUTPUTS.iterdir()])


@pytest.mark.usefixtures("without_mlflow")
def test_commands_of_the_page_are_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The array's script as Slurm runs task 3 of 8, the script that merges, and the commands in the text."""
    page = (Path(__file__).parents[2] / "docs" / "shards.md").read_text(encoding="utf-8").replace("\\\n", " ")
    variables = {"STUDY": str(tmp_path), "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    lines = re.findall(r"^(?: {4}|exec )python -m cedkv (.*)$", page, re.MULTILINE)
    (tmp_path / "grid.yaml").write_text("phase2: {seed: 7}\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("phase2: {seed: 8}\n")
    asked: list[Any] = []

    def note(resolved: Any) -> list[Any]:
        asked.append((resolved.comparison, resolved.config.seed, str(resolved.shard)))
        return []

    def noted(*_: Any) -> Any:
        asked.append("merge")
        return [SimpleNamespace(config=tiny.config("x"))]

    points.RUN.replace(note, monkeypatch)
    points.MERGE.replace(noted, monkeypatch)
    points.END_ON_SIGNALS.replace(lambda: None, monkeypatch)
    for line in lines:
        words = [re.sub(r"\$\{?(\w+)\}?", lambda name: variables[name[1]], word) for word in shlex.split(line)]
        done = cli(*words)
        assert done.exit_code == 0, (line, done.output)
    phase2 = [(None, 8, f"{i}/2") for i in (1, 2)]
    assert asked == [*phase2, "merge", ("ablate_selector", 7, "3/8"), "merge"]
    scripts = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [script.startswith("#!/bin/bash\n#SBATCH") for script in scripts] == [True, True, False]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
