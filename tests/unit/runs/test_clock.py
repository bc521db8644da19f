"""A clock that is set back, or forward, while a run works: no duration is negative, and none is that of the jump."""

from __future__ import annotations

from types import SimpleNamespace

import mlflow
import pytest

from cedkv.runs import manifest as module
from cedkv.runs.manifest import RunManifest, find_resumable
from tests.support.crashing import run_of_nothing

HOUR = 3_600_000


class Wall:
    """The clocks that manifests read: one that jumps, in a year in which no other test has a run, and a monotonic one."""

    def __init__(self) -> None:
        self.wall, self.passed = 1.0e9, 100.0

    def tick(self, seconds: float, jump: float = 0.0) -> None:
        self.wall += seconds + jump
        self.passed += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Wall:
    made = Wall()
    clocks = SimpleNamespace(time=lambda: made.wall, monotonic=lambda: made.passed)
    monkeypatch.setattr(module, "time", clocks)
    return made


@pytest.mark.parametrize(("jump", "duration"), [(0.0, 60_000), (-7200.0, 60_000), (7200.0, 60_000 + 2 * HOUR)])
def test_a_duration_is_the_time_that_has_passed(clock: Wall, jump: float, duration: int) -> None:
    run = RunManifest("phase2", "2")
    clock.tick(60, jump)
    run.set_results({"gain": 0.5}, {}, "")
    run.finish("FINISHED")
    assert run.end_time == run.metrics_at == run.start_time + duration


def test_a_resumed_run_ends_after_it_has_ended_before(store: str, clock: Wall) -> None:
    """The time since then cannot be known: the time of this process counts, and the run's end does not move back."""
    with run_of_nothing() as job:
        clock.tick(60)
        job.finish(job.manifest)
    first = job.manifest.end_time
    assert first is not None
    clock.tick(0, jump=-7200)
    resumed = find_resumable(job.manifest.run_id)
    clock.tick(30)
    resumed.finish("FINISHED")
    assert resumed.start_time == job.manifest.start_time
    assert resumed.end_time == first + 30_000
    assert mlflow.get_run(job.manifest.run_id).info.end_time == first


def test_a_run_of_mlflow_run_ends_after_mlflow_has_begun_it(store: str, clock: Wall, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mlflow run`` has made it by a clock that was set back before this process started."""
    begun = int(clock.wall * 1000) + 10 * HOUR
    clock.wall = begun / 1000 - 7200
    experiment = mlflow.get_experiment_by_name("cedkv").experiment_id
    run_id = mlflow.MlflowClient().create_run(experiment, start_time=begun).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with run_of_nothing() as job:
        clock.tick(60)
        job.finish(job.manifest)
    info = mlflow.get_run(run_id).info
    assert info.start_time == job.manifest.start_time == begun
    assert begun <= info.end_time == job.manifest.end_time
