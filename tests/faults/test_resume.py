"""Runs that are killed for real (in forked processes), resumed, and compared byte by byte with an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from filelock import FileLock

from cedkv.core.errors import ConfigError, DataError, RunInterrupted
from cedkv.models import fingerprint
from cedkv.runs.journal import Journal
from cedkv.runs.lifecycle import sync
from cedkv.runs.manifest import RunManifest, find_resumable, load_manifest
from cedkv.runs.outputs import LOCK
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.crashing import (
    OUTPUTS,
    config,
    finishes_the_same,
    forked,
    killed_at,
    left_by,
    metrics_lines,
    resume,
    run_of_nothing,
    the_run,
)
from tests.support.runs import run_comparison, run_phase2
from tests.support.waiting import HANGING, wait_until

KILL_POINTS = (4, 18, 27, 33)
ALL_KILL_POINTS = range(4, 40)
"""From the first moment in which a run can be resumed to the last in which it is not finished."""


@pytest.mark.parametrize(
    "count", [*KILL_POINTS, *(pytest.param(n, marks=pytest.mark.slow) for n in ALL_KILL_POINTS if n not in KILL_POINTS)]
)
def test_killed_at_any_step_and_resumed_it_is_the_same(
    store: str, llama_folder: Path, undisturbed: dict[str, str], count: int
) -> None:
    """kill -9 when the n-th thing has just reached the disk: before the model is loaded, between two units, between the
    journal and metrics.jsonl, in the middle of the report."""
    assert forked(lambda: run_phase2(config(llama_folder), "2"), killed_at("fsync", count, after=True)) == -signal.SIGKILL
    run_id = the_run()
    assert mlflow.get_run(run_id).info.status == "RUNNING"
    finishes_the_same(run_id, llama_folder, undisturbed)


def test_killed_twice_and_in_the_middle_of_a_line(store: str, llama_folder: Path, undisturbed: dict[str, str]) -> None:
    """The first kill leaves half a line; the second one hits the resumed run. No finished unit is done again."""

    def half_written() -> None:
        real, lines = points.JOURNAL_WRITE.real, [0]

        def write(self: Journal, line: bytes) -> None:
            lines[0] += 1
            if lines[0] == 4:
                self._file.write(line[: len(line) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, line)

        points.JOURNAL_WRITE.replace(write)

    assert forked(lambda: run_phase2(config(llama_folder), "2"), half_written) == -signal.SIGKILL
    run_id = the_run()
    path = OUTPUTS / run_id / "journal.jsonl"
    finished = path.read_bytes().rsplit(b"\n", 1)[0]
    assert finished.count(b"\n") == 2  # header and two units, each line whole
    assert forked(resume(run_id, config(llama_folder)), half_written) == -signal.SIGKILL
    assert path.read_bytes().startswith(finished)
    assert path.read_bytes().count(b"\n") == 6
    finishes_the_same(run_id, llama_folder, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ended_by_a_signal_it_is_killed_with_its_data(
    store: str, llama_folder: Path, undisturbed: dict[str, str], number: signal.Signals, code: int
) -> None:
    def signalled() -> None:
        signal.signal(number, signal.SIG_DFL)  # in the background of a shell SIGINT is ignored, and that is respected
        points.END_ON_SIGNALS.real()
        real = points.JOURNAL_APPEND.real

        def append(self: Journal, unit: str, *finished: Any) -> None:
            real(self, unit, *finished)
            if unit == "unit/00001":
                os.kill(os.getpid(), number)

        points.JOURNAL_APPEND.replace(append)

    assert forked(lambda: run_phase2(config(llama_folder), "2"), signalled) == code
    run_id = the_run()
    run = mlflow.get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["phase2"] == "pending"
    assert "metrics.jsonl" in {item.path for item in mlflow.MlflowClient().list_artifacts(run_id)}
    assert sum(line["kind"] == "on" for line in metrics_lines(run_id)) >= 2
    finishes_the_same(run_id, llama_folder, undisturbed)


def test_full_disk(store: str, llama_folder: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails ends the run as FAILED; what was finished is resumed when there is room again."""
    real, left = os.fsync, [20]

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunInterrupted, match=r"No space left on device.*--resume [0-9a-f]{32}"):
        run_phase2(config(llama_folder), "2")
    monkeypatch.setattr(os, "fsync", real)
    run_id = the_run()
    assert mlflow.get_run(run_id).info.status == "FAILED"
    finishes_the_same(run_id, llama_folder, undisturbed)


@pytest.fixture
def interrupted(store: str, llama_folder: Path, undisturbed: dict[str, str]) -> str:
    """A run that was killed after its second unit."""
    assert forked(lambda: run_phase2(config(llama_folder), "2"), killed_at("fsync", 19, after=True)) == -signal.SIGKILL
    return the_run()


def unchanged(run_id: str, work: Callable[[], Any], error: type[Exception], message: str) -> None:
    """The work is rejected, and neither folder nor MLflow run are touched by it."""
    before, status = left_by(run_id), mlflow.get_run(run_id).info.status
    with pytest.raises(error, match=message):
        work()
    assert left_by(run_id) == before
    assert mlflow.get_run(run_id).info.status == status


def test_what_is_not_the_same_run_is_rejected_by_name(
    interrupted: str, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Configuration, weights, samples: results of two kinds must not be mixed. One run, because making it takes time."""
    its = config(llama_folder, "seed=43,select.span_len=3")
    unchanged(
        interrupted,
        resume(interrupted, its),
        ConfigError,
        r"phase2\.seed: 42 then, 43 now\n.*phase2\.select\.span_len: 4 then, 3 now",
    )
    weights = llama_folder / "model.safetensors"
    kept = weights.read_bytes()
    try:
        tiny.model("llama", seed=1).save_pretrained(llama_folder)
        unchanged(interrupted, resume(interrupted, config(llama_folder)), ConfigError, r"model\.weights: '[0-9a-f]{64}' then")
    finally:
        weights.write_bytes(kept)
    line = OUTPUTS / interrupted / "journal.jsonl"
    whole = line.read_bytes()
    line.write_bytes(whole.replace(b'"correct_base":false', b'"correct_base":true ', 1))
    unchanged(interrupted, resume(interrupted, config(llama_folder)), DataError, r"journal\.jsonl:2: .* damaged or edited")
    line.write_bytes(whole)
    with FileLock(OUTPUTS / interrupted / LOCK):
        unchanged(interrupted, resume(interrupted, config(llama_folder)), ConfigError, "in use by another process")
    mlflow.MlflowClient().delete_run(interrupted)
    unchanged(interrupted, resume(interrupted, config(llama_folder)), ConfigError, "was deleted in MLflow; bring it back")
    mlflow.MlflowClient().restore_run(interrupted)
    # settings that change no result may change
    assert forked(resume(interrupted, config(llama_folder, "runtime.fail_on_gate=true,runtime.mlflow_timeout=30"))) == 0


def test_a_run_that_mlflow_has_lost_is_resumed_after_its_folder_was_logged_as_a_new_run(
    interrupted: str, llama_folder: Path, undisturbed: dict[str, str]
) -> None:
    mlflow.MlflowClient().delete_run(interrupted)
    remedy = rf"bring it back: .*; or log the folder as a new run: python -m cedkv sync outputs/{interrupted} --experiment NAME"
    unchanged(interrupted, resume(interrupted, config(llama_folder)), ConfigError, remedy)
    sync(OUTPUTS / interrupted, 10, lambda _: None, "cedkv")
    run_id = str(load_manifest(OUTPUTS / interrupted).mlflow_run_id)
    assert mlflow.get_run(run_id).info.status == "KILLED"
    assert forked(resume(interrupted, config(llama_folder))) == 0
    assert left_by(interrupted) == undisturbed
    assert mlflow.get_run(run_id).info.status == "FINISHED"
    assert mlflow.get_run(interrupted).info.lifecycle_stage == "deleted"


def test_a_resumed_run_takes_the_threads_it_was_started_with(interrupted: str, llama_folder: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        named = config(llama_folder, f"runtime.threads={before + 1}")
        message = rf"runtime\.torch_threads: {before} then, {before + 1} now"
        unchanged(interrupted, resume(interrupted, named), ConfigError, message)
        resume(interrupted, config(llama_folder))()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    lines = (OUTPUTS / interrupted / "journal.jsonl").read_text().splitlines()[1:]
    assert {json.loads(line)["ran_on"]["runtime.torch_threads"] for line in lines} == {before}


def test_changed_samples_are_rejected_by_name(store: str, certified: Path, tmp_path: Path) -> None:
    """The path is the same, the file is not."""

    def lines(asked: str) -> str:
        episodes = (
            {
                "demo_text": f"Word: {word}\nSymbol: red\n\n",
                "query_text": f"Word: {asked}{word}\nSymbol:",
                "answer_text": " red",
            }
            for word in "abcdefghijk"
        )
        return "".join(f"{json.dumps(episode)}\n" for episode in episodes)

    own = tmp_path / "own.jsonl"
    own.write_text(lines(""))
    its = config(certified, f"data.on_path={own}", "select.span_budget=1")
    assert forked(lambda: run_phase2(its, "2"), killed_at("fsync", 19, after=True)) == -signal.SIGKILL
    own.write_text(lines("lug"))
    unchanged(the_run(), resume(the_run(), its), ConfigError, r"samples\.on\.digest: '[0-9a-f]{64}' then")


def test_other_code_is_rejected_and_tagged_where_it_is_asked_for(
    interrupted: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the samples by each code would pass every gate; each unit says which code computed it."""
    its = config(llama_folder)
    monkeypatch.setattr(fingerprint, "code_digest", lambda _: "other")
    unchanged(
        interrupted, resume(interrupted, its), ConfigError, r"other code.*\n.*versions\.code: '[0-9a-f]{64}' then, 'other' now"
    )
    resume(interrupted, config(llama_folder, "runtime.allow_other_code=true"))()
    run = mlflow.get_run(interrupted)
    assert (run.info.status, run.data.tags["code"]) == ("FINISHED", "changed")
    lines = [json.loads(line) for line in (Path("outputs") / interrupted / "journal.jsonl").read_text().splitlines()[1:]]
    codes = [line["ran_on"]["versions.code"] for line in lines]
    assert codes[-1] == "other"
    assert codes[0] != "other"


def test_two_processes_at_once(interrupted: str, llama_folder: Path, undisturbed: dict[str, str]) -> None:
    """The second one is rejected, and the lock of a killed one is gone with it."""
    first = os.fork()
    if first == 0:
        points.JOURNAL_APPEND.replace(lambda *_: time.sleep(HANGING))
        resume(interrupted, config(llama_folder))()
        os._exit(0)
    wait_until(lambda: _held(interrupted), "the run is held by the first process")
    with pytest.raises(ConfigError, match="another process"):
        resume(interrupted, config(llama_folder))()
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    finishes_the_same(interrupted, llama_folder, undisturbed)


def _held(run_id: str) -> bool:
    try:
        with FileLock(OUTPUTS / run_id / LOCK, timeout=0):
            return False
    except TimeoutError:
        return True


def test_grid_goes_on_in_its_unit_with_the_same_children(store: str, certified: Path) -> None:
    """Killed while units run, and while children are finished: no stray run, no other figure."""
    lists = {"select_modes": "attention_diversity_span,random_span"}
    base = config(certified)

    def comparisons() -> list[RunManifest]:
        found = [load_manifest(path) for path in OUTPUTS.iterdir() if (path / "run.json").exists()]
        return [entry for entry in found if entry.parent is None]

    def left(entry: RunManifest) -> dict[str, str]:
        texts = {}
        for key, run_id in {"": entry.run_id, **entry.children}.items():
            for name, text in left_by(run_id).items():
                for other, its_id in entry.children.items():
                    text = text.replace(its_id, f"run of {other}")
                texts[f"{key}/{name}"] = text.replace(entry.run_id, "RUN")
        return texts

    assert forked(lambda: run_comparison("ablate_selector", base, lists)) == 0
    (whole,) = comparisons()
    expected = left(whole)
    for count in (33, 62):
        shutil.rmtree(OUTPUTS)
        work = lambda: run_comparison("ablate_selector", base, lists)  # noqa: E731
        assert forked(work, killed_at("fsync", count, after=True)) == -signal.SIGKILL
        (entry,) = comparisons()
        again = lambda: run_comparison("ablate_selector", base, entry.lists, find_resumable(entry.run_id))  # noqa: E731, B023
        assert forked(again) == 0
        (entry,) = comparisons()
        assert left(entry) == expected
        children = mlflow.search_runs(
            experiment_names=["cedkv"], filter_string=f"tags.`mlflow.parentRunId` = '{entry.run_id}'", output_format="list"
        )
        assert {child.info.run_id for child in children} == set(entry.children.values())
        assert {child.info.status for child in children} == {"FINISHED"} == {mlflow.get_run(entry.run_id).info.status}
    with pytest.raises(ConfigError, match=f"is a condition of comparison {entry.run_id}"):
        find_resumable(next(iter(entry.children.values())))


def test_ended_while_mlflow_is_making_the_run(store: str) -> None:
    """The signal comes when MLflow has the run and this process does not know it yet: what a resume needs is on disk, and the
    run is not left RUNNING, nor made twice."""

    def signalled() -> None:
        points.END_ON_SIGNALS.real()
        real = mlflow.MlflowClient.create_run

        def create_run(*given: Any) -> Any:
            made = real(*given)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            return made

        mlflow.MlflowClient.create_run = create_run  # type: ignore[method-assign]

    def work() -> None:
        with run_of_nothing(name="being made"):
            pass

    assert forked(work, signalled) == 143
    entry = load_manifest(OUTPUTS / the_run())
    assert entry.status == "KILLED"
    found = mlflow.search_runs(
        experiment_names=["cedkv"], filter_string=f"tags.`cedkv.origin` = '{entry.origin}'", output_format="list"
    )
    assert [(run.info.run_id, run.info.status) for run in found] == [(entry.mlflow_run_id, "KILLED")]
