"""System metrics: MLflow's figures of the machine, while the run lasts and where they are asked for."""

from __future__ import annotations

import threading
from typing import Any

import mlflow
import pytest

from cedkv.core.errors import ConfigError
from cedkv.runs import resolved
from cedkv.runs.lifecycle import ActiveRun, open_run
from cedkv.runs.manifest import find_resumable
from cedkv.runs.resolved import resolve_run
from tests.support import tiny
from tests.support.crashing import run_of_nothing as run
from tests.support.waiting import HANGING, no_hang, wait_until

CPU = "system/cpu_utilization_percentage"


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")


def asked(wanted: str = "true") -> Any:
    return tiny.config("x", f"runtime.system_metrics={wanted}")


def steps(run_id: str) -> list[int]:
    return [metric.step for metric in mlflow.MlflowClient().get_metric_history(run_id, CPU)]


def measured(job: ActiveRun, first: int = 0) -> None:
    """Wait until a step from ``first`` on is logged."""
    wait_until(lambda: max(steps(job.manifest.run_id), default=-1) >= first, "a step is logged")


def monitors() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]


def test_nothing_is_measured_unless_asked_for(store: str) -> None:
    with run(asked("false")) as job:
        assert monitors() == []
        job.finish(job.manifest)
    assert steps(job.manifest.run_id) == []


def test_the_run_is_measured_until_it_ends(store: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a comparison the parent is measured; MLflow's own lines are kept quiet."""
    with run(asked()) as job:
        assert monitors() == ["SystemMetricsMonitor"]
        child = job.child("a", "a", asked(), {})
        measured(job)
        job.finish(child)
        assert monitors() == ["SystemMetricsMonitor"]
        job.finish(job.manifest)
        assert monitors() == []
    found = mlflow.get_run(job.manifest.run_id)
    assert found.info.status == "FINISHED"
    assert {name for name in found.data.metrics if not name.startswith("system/")} == set()
    assert steps(child.run_id) == []
    assert "system metrics" not in capfd.readouterr().err.lower()


def test_the_run_that_mlflow_run_has_made_is_measured(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = mlflow.get_experiment_by_name("cedkv").experiment_id
    run_id = mlflow.MlflowClient().create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with run(asked()) as job:
        measured(job)
        job.finish(job.manifest)
    assert job.manifest.run_id == run_id
    assert steps(run_id)[0] == 0


def test_after_a_fault_nothing_is_waited_for(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor is told to end and ends by itself, however long its last call takes."""
    with run(asked()) as job:
        measured(job)
        monitor, slow = job._tracker._monitor, threading.Event()
        monkeypatch.setattr(monitor.mlflow_logger, "flush", lambda: slow.wait(HANGING))
        job._tracker.fault = "no answer"
        with no_hang():
            job._tracker.stop_monitor()
        slow.set()
        wait_until(lambda: not monitors(), "the monitor has ended")
        job.finish(job.manifest)


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("broken"), "FAILED"), (SystemExit(143), "KILLED")])
def test_a_run_that_ends_early_is_measured_no_more(store: str, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), run(asked()) as job:  # noqa: PT012
        measured(job)
        raise error
    assert monitors() == []
    assert mlflow.get_run(job.manifest.run_id).info.status == status


def test_a_resumed_run_is_measured_on_from_where_it_was(store: str) -> None:
    """It may also be resumed without: what is measured changes no result."""
    with pytest.raises(RuntimeError), run(asked()) as job:  # noqa: PT012
        measured(job, 1)
        raise RuntimeError("broken")
    run_id, last = job.manifest.run_id, max(steps(job.manifest.run_id))
    again = resolve_run("phase2", asked(), resumed=find_resumable(run_id))
    with open_run(again, {}) as job:
        assert monitors() == []
        job.open_journal({"units": []}, ["run"])
        measured(job, last + 1)
        job.finish(job.manifest)
    assert monitors() == []
    assert steps(run_id) == sorted(set(steps(run_id)))
    without = resolve_run("phase2", asked("false"), resumed=find_resumable(run_id))
    with open_run(without, {}) as job:
        job.open_journal({"units": []}, ["run"])
        assert monitors() == []
        job.finish(job.manifest)


def test_without_psutil_one_line_says_what_is_missing(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a run is made."""
    monkeypatch.setattr(resolved, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs psutil, which is not installed: pip install 'cedkv\[system-metrics\]'"):
        resolve_run("phase2", asked())
    assert resolve_run("phase2", asked("false")).manifest.run_id
