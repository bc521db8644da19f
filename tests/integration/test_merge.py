"""A merge of shards: the run is the undivided one, file by file; less than all shards of one run is rejected by name."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import mlflow
import pytest

import cedkv
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.runs.leaderboard import experiment_board
from cedkv.runs.manifest import find_resumable, load_manifest
from cedkv.runs.merge import merge
from cedkv.runs.outputs import OUTPUTS
from tests.integration.test_comparison import children_of
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.crashing import forked
from tests.support.shards import LISTS, SIZES, cli, everything_of, logged, merged, run_it, run_shards, shard_of
from tests.support.tasks import other_lookup


@pytest.fixture
def config(llama_folder: Path) -> Phase2Config:
    return tiny.config(llama_folder, *SIZES)


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


@pytest.mark.usefixtures("small_fits")
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


@pytest.mark.usefixtures("without_mlflow")
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


@pytest.mark.usefixtures("without_mlflow")
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


@pytest.mark.usefixtures("without_mlflow")
def test_cards_that_differ_in_their_index_are_told(config: Phase2Config, capsys: pytest.CaptureFixture[str]) -> None:
    shards = run_shards(config, 2)
    path = OUTPUTS / shards[1] / "artifacts" / "hf_runtime_meta.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "device": "cuda:1"}))
    run_id = merged(shards)
    assert "note: shards differ in device: cpu, cuda:1\n" in capsys.readouterr().err
    made = json.loads((OUTPUTS / run_id / "artifacts" / "hf_runtime_meta.json").read_text())
    assert made == {**content, "device": ["cpu", "cuda:1"]}


@pytest.mark.usefixtures("without_mlflow")
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
