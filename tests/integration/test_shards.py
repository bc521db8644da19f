"""Shards and their merge: the run of all shards is the undivided run, file by file; anything less is rejected by name."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner, Result

import cedkv
from cedkv.cli.app import main
from cedkv.config.resolve import resolve
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.shards import Shard
from cedkv.runs import pipeline
from cedkv.runs.leaderboard import experiment_board
from cedkv.runs.manifest import OUTPUTS, find_resumable, load_manifest
from cedkv.runs.merge import merge
from cedkv.runs.planning import measured_rate, plan_run, plan_time
from cedkv.runs.resolved import resolve_inputs, resolve_run
from tests.integration.test_comparison import children_of
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.crashing import forked, left_by
from tests.support.tasks import other_lookup

LISTS = {"tasks": "symbol_lookup,other_lookup", "select_modes": "attention_diversity_span,fitted_heads"}
SIZES = ("runtime.batch_size=2", "eval.lds_masks=0", "eval.gate_a_samples=2", "eval.n_random_trials=1")
"""Three units of two ON samples each."""


@pytest.fixture
def config(llama_folder: Path) -> Phase2Config:
    return tiny.config(llama_folder, *SIZES)


@pytest.fixture
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points.without_mlflow(monkeypatch)
    monkeypatch.chdir(tmp_path)


def run_it(command: str, config: Phase2Config, lists: Mapping[str, str | None] | None = None) -> str:
    """Run; the id of the run."""
    resolved = resolve_run(command, config, lists=lists)
    results = pipeline.run(resolved)
    assert bool(results) == (config.shard is None)
    return resolved.manifest.run_id


def shard_of(config: Phase2Config, name: str) -> Phase2Config:
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"shard": name})})


def run_shards(config: Phase2Config, n: int, command: str = "phase2", lists: Any = None) -> list[str]:
    return [run_it(command, shard_of(config, f"{i + 1}/{n}"), lists) for i in range(n)]


def merged(run_ids: list[str]) -> str:
    """Merge with a model out of reach; the id of the run."""
    before = set(OUTPUTS.iterdir())
    real = points.LOAD_MODEL.real
    points.LOAD_MODEL.replace(lambda *_: pytest.fail("a model was loaded"))
    try:
        merge(run_ids)
    finally:
        points.LOAD_MODEL.replace(real)
    (made,) = (folder for folder in set(OUTPUTS.iterdir()) - before if load_manifest(folder).parent is None)
    return made.name


def everything_of(run_id: str) -> dict[str, str]:
    """All files of a run and of its nested runs that are results, without ids and times."""
    ids = {run_id: "RUN"} | {child: f"RUN{i}" for i, child in enumerate(load_manifest(OUTPUTS / run_id).children.values())}
    found = {f"{name}/{path}": text for run, name in ids.items() for path, text in left_by(run).items()}
    for path, text in found.items():
        for run, name in ids.items():
            text = text.replace(run, name)
        found[path] = re.sub(r'"(\w+_)?id": "file:[^"]*"', '"id": ""', text)
    return found


def logged(run_id: str) -> tuple[Any, ...]:
    """What MLflow has of a run, without ids and times."""
    run = mlflow.get_run(run_id)
    metrics = {name: value for name, value in run.data.metrics.items() if not name.startswith("seconds_")}
    assert metrics or run.data.params["phase2.runtime.shard"] != "null"
    own = ("mlflow.", "cedkv.origin", "merged_from", "best.run_id", "best.symbol_lookup.run_id", "best.other_lookup.run_id")
    tags = {name: value for name, value in run.data.tags.items() if not name.startswith(own)}
    datasets = {(item.dataset.name, item.dataset.digest) for item in run.inputs.dataset_inputs}
    files = {item.path for item in mlflow.MlflowClient().list_artifacts(run_id)}
    return run.info.status, run.info.run_name, metrics, run.data.params, tags, datasets, files


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


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


def test_a_merged_evaluation_is_the_undivided_one(config: Phase2Config, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With two shards more than units: they end well, and the merge misses neither."""
    whole = run_it("phase2", config)
    capsys.readouterr()
    shards = run_shards(config, 5)
    said = capsys.readouterr().out
    assert f"shard    1/5: 1 of 3 units, in outputs/{shards[0]}; a part of a run has no verdict" in said
    assert f"shard    5/5: 0 of 3 units, in outputs/{shards[4]}; there are more shards than units" in said
    assert "python -m cedkv merge RUN RUN" in said
    before = {path: path.read_bytes() for run_id in shards for path in (OUTPUTS / run_id).rglob("*") if path.is_file()}
    run_id = merged([shards[2], shards[0], shards[1]])
    assert before == {path: path.read_bytes() for path in before}
    assert everything_of(run_id) == everything_of(whole)
    assert logged(run_id) == logged(whole)
    assert mlflow.get_run(run_id).data.tags["merged_from"] == ", ".join(shards[:3])
    seconds = [load_manifest(OUTPUTS / each).seconds for each in (*shards[:3], run_id)]
    assert seconds[3]["teacher"] == pytest.approx(sum(each["teacher"] for each in seconds[:3]))
    assert seconds[3].keys() == load_manifest(OUTPUTS / whole).seconds.keys()

    run = mlflow.get_run(shards[1])
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"{mlflow.get_run(whole).info.run_name} · shard 2/5")
    assert run.data.tags["shard"] == "2/5"
    assert not {"gateA", "gateB", "phase2", "merged_from"} & run.data.tags.keys()
    assert all(name.startswith("seconds_") for name in run.data.metrics)
    assert run.data.params["phase2.runtime.shard"] == "2/5"
    assert logged(shards[1])[5] == logged(whole)[5]
    assert "Shard 2/5: 1 of 3 units, without a verdict" in run.data.tags["mlflow.note.content"]
    assert cedkv.read_run(run_id).metrics == cedkv.read_run(whole).metrics
    shutil.rmtree(OUTPUTS / run_id / "tables")
    assert cli("report", str(OUTPUTS / run_id)).exit_code == 0
    assert everything_of(run_id) == everything_of(whole)
    with pytest.raises(ConfigError, match=r"has no finished evaluation .*\. Run one: "):  # shards are left out without a word
        experiment_board("cedkv", "tags.shard LIKE '%'", 60)


def test_a_merged_grid_of_tasks_is_the_undivided_one(config: Phase2Config, store: str) -> None:
    with other_lookup():
        whole = run_it("ablate_selector", config, LISTS)
        shards = run_shards(config, 2, "ablate_selector", LISTS)
        assert [list(load_manifest(OUTPUTS / run_id).children) for run_id in shards] == [[], []]
        run_id = merged(shards)
        assert everything_of(run_id) == everything_of(whole)
        assert logged(run_id) == logged(whole)
        nested, of_whole = children_of(run_id), children_of(whole)
        assert [logged(run.info.run_id) for run in nested] == [logged(run.info.run_id) for run in of_whole]
        assert len(nested) == 4
        assert mlflow.get_run(shards[0]).info.run_name == "ablate_selector · 2 tasks · 4 conditions · seed 42 · shard 1/2"
        assert all(children_of(each) == [] for each in shards)


@pytest.mark.usefixtures("_alone")
class TestRejected:
    """Shards that are not one whole run; a shard where a run is asked for."""

    @pytest.fixture
    def shards(self, config: Phase2Config) -> list[str]:
        return run_shards(config, 2)

    def test_merge(self, config: Phase2Config, shards: list[str]) -> None:
        one, two = shards
        other = run_it("phase2", shard_of(config, "2/2"))
        seed = config.model_copy(update={"seed": 43})
        third = run_it("phase2", shard_of(config, "1/3"))
        changed = run_it("phase2", shard_of(seed, "2/2"))
        before = set(OUTPUTS.iterdir())

        def told(*sources: str) -> str:
            done = cli("merge", *sources)
            assert done.exit_code == 2, done.output
            return done.output

        assert f"shard 2/2 was run twice, as {two} and as {other}; leave one of them out" in told(one, two, other)
        assert f"shard 1/2 (run {one}) is given twice" in told(one, two, str(OUTPUTS / one))
        assert f"shard 1/2 (run {one}) and shard 1/3 (run {third}) are of runs that were divided differently" in told(
            one, third
        )
        said = told(one, changed)
        assert "phase2.seed: 42 in 1/2, 43 in 2/2" in said
        assert "samples.on.digest: " in said
        said = told(two)
        assert "the run is not complete:\n  missing: 1/2." in said
        command = shlex.split(said.rpartition("by: ")[2])
        assert command[:3] == ["python", "-m", "cedkv"]
        with pytest.MonkeyPatch.context() as patch:
            asked: list[Any] = []
            points.RUN.replace(lambda resolved: asked.append(resolved.config) or [], patch)
            assert cli(*command[3:]).exit_code == 0
        assert asked == [shard_of(config, "1/2")]
        assert "'outputs/absent' is neither" not in told("absent", one)
        assert "is neither the folder of a run nor a run id" in told("no/such", one)
        assert "there is nothing to continue" in told("absent", one)
        assert set(OUTPUTS.iterdir()) == before, "nothing is begun"

        manifest = load_manifest(OUTPUTS / two)
        manifest.status = "KILLED"
        manifest.save()
        assert f"shard 2/2 (run {two}) is not finished (KILLED): python -m cedkv --resume {two}" in told(one, two)
        manifest.status = "FINISHED"
        manifest.save()
        run_id = merged(shards)
        assert f"run {run_id} was merged already, from {one}, {two}; leave it out" in told(one, two, run_id)
        assert "instead of resuming it, merge its shards again" in cli("--resume", run_id).output
        whole = run_it("phase2", config)
        assert f"run {whole} is a whole run, made without runtime.shard; leave it out" in told(one, two, whole)

    def test_damaged_shards(self, shards: list[str]) -> None:
        one, two = (OUTPUTS / run_id for run_id in shards)

        def told(path: Path, content: bytes) -> str:
            kept = path.read_bytes()
            path.write_bytes(content)
            done = cli("merge", *shards)
            path.write_bytes(kept)
            assert done.exit_code == 2, done.output
            return done.output

        journal = two / "journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        assert "journal.jsonl:2: the line does not match its sha256" in told(journal, lines[0] + lines[1][:-9])
        assert f"shard 2/2 (run {two.name}) was finished and lacks 1 unit in its journal" in told(journal, lines[0])
        assert f"journal.jsonl is the journal of run '{one.name}'" in told(journal, (one / "journal.jsonl").read_bytes())
        certificate = two / "artifacts" / "certificate.json"
        content = json.loads(certificate.read_text())
        content["identity"]["runtime.matmul"] = "other"
        assert " in 1/2, 'other' in 2/2" in told(certificate, json.dumps(content).encode())
        assert "certificate.json cannot be read: KeyError" in told(certificate, b"{}")
        assert "hf_runtime_meta.json cannot be read" in told(two / "artifacts" / "hf_runtime_meta.json", b"[")
        assert "were fitted apart" in told_of_new(two / "artifacts" / "head_weights.json", shards)
        assert len(list(OUTPUTS.iterdir())) == 2
        merged(shards)

    def test_other_uses_of_a_shard(
        self, config: Phase2Config, shards: list[str], monkeypatch: pytest.MonkeyPatch, llama_folder: Path
    ) -> None:
        one = shards[0]
        for done in (cli("report", str(OUTPUTS / one)), cli("export", one)):
            assert done.exit_code == 2
            assert f"run {one} is shard 1/2, a part of a run without" in done.output
            assert "python -m cedkv merge makes the run of all its shards" in done.output
        for call in (cedkv.evaluate, lambda its: cedkv.compare(config=its, select_modes="random_span,delimiter_span")):
            with pytest.raises(ConfigError, match=r"runtime\.shard = 1/2 makes a part of a run, which has no results"):
                call(shard_of(config, "1/2"))
        told = cli("--resume", one, "--shard", "2/2")
        assert "phase2.runtime.shard: '1/2' then, '2/2' now" in told.output
        journal = (OUTPUTS / one / "journal.jsonl").read_bytes()
        points.END_ON_SIGNALS.replace(lambda: None, monkeypatch)
        assert cli("--resume", one).exit_code == 0
        assert (OUTPUTS / one / "journal.jsonl").read_bytes() == journal

    def test_another_version_merges_nothing(self, shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cedkv.runs.merge.__version__", "99.0")
        with pytest.raises(ConfigError, match=r"versions\.cedkv: '[^']+' in the shards, '99\.0' here"):
            merge(shards)
        assert len(list(OUTPUTS.iterdir())) == 2


def told_of_new(path: Path, shards: list[str]) -> str:
    """What a merge says while a shard has an additional file."""
    path.write_text('{"fitted": []}')
    done = cli("merge", *shards)
    path.unlink()
    return done.output


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("allowed", [False, True])
def test_shards_of_two_kinds_of_device(config: Phase2Config, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejected, or, where the run asks for it, merged and tagged; no unit was computed on both, so nothing is compared."""
    if allowed:
        config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"mixed_devices": True})})
    shards = []
    for i, kind in enumerate(("one kind", "another kind"), 1):
        points.PROCESSOR.replace(lambda kind=kind: kind, monkeypatch)
        shards.append(run_it("phase2", shard_of(config, f"{i}/2")))
    if not allowed:
        done = cli("merge", *shards)
        assert done.exit_code == 2
        assert "runtime.device_name: 'one kind' in 1/2, 'another kind' in 2/2" in done.output
        return
    run_id = merged(shards)
    assert load_manifest(OUTPUTS / run_id).tags["devices"] == "cpu another kind (1 unit); cpu one kind (2 units)"
    content = json.loads((OUTPUTS / run_id / "artifacts" / "devices.json").read_text())
    assert content["not_compared"] == ["cpu another kind", "cpu one kind"]
    assert content["differences"] == []
    runtime = json.loads((OUTPUTS / run_id / "artifacts" / "hf_runtime_meta.json").read_text())
    assert runtime["device_name"] == ["one kind", "another kind"]


@pytest.mark.usefixtures("_alone")
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


@pytest.mark.usefixtures("_alone")
def test_cards_that_differ_in_their_index_are_told(config: Phase2Config, capsys: pytest.CaptureFixture[str]) -> None:
    shards = run_shards(config, 2)
    path = OUTPUTS / shards[1] / "artifacts" / "hf_runtime_meta.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "device": "cuda:1"}))
    run_id = merged(shards)
    assert "note: shards differ in device: cpu, cuda:1\n" in capsys.readouterr().err
    made = json.loads((OUTPUTS / run_id / "artifacts" / "hf_runtime_meta.json").read_text())
    assert made == {**content, "device": ["cpu", "cuda:1"]}


@pytest.mark.usefixtures("_alone")
def test_shards_of_other_folders_are_merged_here(config: Phase2Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine has outputs of its own; a merge killed in the midst leaves nothing that stands in the way of the next."""
    folders = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        monkeypatch.chdir(tmp_path / str(i))
        folders.append(str(tmp_path / str(i) / "outputs" / run_it("phase2", shard_of(config, f"{i + 1}/2"))))
    monkeypatch.chdir(tmp_path)

    def killed_at_the_second_unit() -> None:
        real, count = points.JOURNAL_WRITE.real, [0]

        def write(*arguments: Any) -> None:
            count[0] += 1
            if count[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)

        points.JOURNAL_WRITE.replace(write)

    assert forked(lambda: merge(folders), killed_at_the_second_unit) == -signal.SIGKILL
    (interrupted,) = OUTPUTS.iterdir()
    with pytest.raises(ConfigError, match="merge its shards again"):
        find_resumable(interrupted.name)
    run_id = merged(folders)
    assert (OUTPUTS / run_id / "report.html").exists()
    assert load_manifest(OUTPUTS / run_id).status == "FINISHED"
    assert not (interrupted / "report.html").exists()


@pytest.mark.usefixtures("_alone")
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


@pytest.mark.usefixtures("_alone")
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
