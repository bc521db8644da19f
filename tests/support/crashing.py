"""Runs in forked processes that are killed for real, and the comparison of what is left with an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow

from cedkv.config.schema import Phase2Config
from cedkv.runs.lifecycle import ActiveRun, open_run
from cedkv.runs.manifest import find_resumable
from cedkv.runs.resolved import resolve_run
from tests.support import tiny
from tests.support.runs import run_phase2

SIZES = ("eval.on_samples=11", "eval.off_samples=3", "eval.gate_a_samples=1", "eval.n_random_trials=1", "runtime.batch_size=2")
OUTPUTS = Path("outputs")
Plant = Callable[[], None]


def config(model: Path, *overrides: str) -> Phase2Config:
    """A run of six units."""
    return tiny.config(model, *SIZES, *overrides)


@contextmanager
def run_of_nothing(its: Phase2Config | None = None, name: str = "n") -> Iterator[ActiveRun]:
    """A run without a model."""
    its = its or tiny.config("x")
    resolved = resolve_run("phase2", its)
    resolved.manifest.name = name
    with open_run(resolved, {"gateA": "pending"}) as job:
        yield job


def impatient(job: ActiveRun) -> int:
    """Wait for an MLflow that is away no longer than these seconds from here on: each wait is one to the end."""
    job._tracker.timeout = 1
    return 1


def forked(work: Callable[[], Any], plant: Plant = lambda: None) -> int:
    """Do the work in a forked process, where ``plant`` may have prepared its end; its exit code, or minus a signal's number.

    0 done, 1 an exception (printed).
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            plant()
            work()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at(name: str, count: int, after: bool = False) -> Plant:
    """Kill the process (SIGKILL) at the ``count``-th call of a function of ``os``, before or after it does its work."""

    def plant() -> None:
        real, calls = getattr(os, name), [0]

        def counted(*given: Any) -> Any:
            calls[0] += 1
            if calls[0] == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = real(*given)
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(os, name, counted)

    return plant


def resume(run_id: str, its: Phase2Config) -> Callable[[], Any]:
    """Work that goes on with a run."""
    return lambda: run_phase2(its, "2", find_resumable(run_id))


def n_runs() -> int:
    """How many runs the store has."""
    return len(mlflow.search_runs(experiment_names=["cedkv"], output_format="list"))


def the_run() -> str:
    """The id of the only run there is."""
    (folder,) = OUTPUTS.iterdir()
    return folder.name


def left_by(run_id: str) -> dict[str, str]:
    """All files of a run that are results, without times and without its id."""
    folder = OUTPUTS / run_id
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"run.json", "run.lock"}
    return {name: _timeless((folder / name).read_text("latin-1"), run_id) for name in names}


def _timeless(text: str, run_id: str) -> str:
    text = text.replace(run_id, "RUN")
    text = re.sub(r'"seconds": \{[^}]*\}', '"seconds": {}', text)
    return re.sub(r'^\{"sha256":"[0-9a-f]{64}","header"', '{"header"', text)  # the header holds the run id


def metrics_lines(run_id: str) -> list[dict[str, Any]]:
    """``metrics.jsonl``, line by line."""
    return [json.loads(line) for line in (OUTPUTS / run_id / "metrics.jsonl").read_text().splitlines()]


def finishes_the_same(run_id: str, model: Path, undisturbed: dict[str, str]) -> None:
    """Go on with a run: it comes out like an undisturbed one, in its folder and in MLflow."""
    assert forked(resume(run_id, config(model))) == 0
    assert left_by(run_id) == undisturbed
    run = mlflow.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["phase2"] in ("pass", "fail")
    assert {item.path for item in mlflow.MlflowClient().list_artifacts(run_id)} >= {"report.html", "phase2_on_samples.json"}
