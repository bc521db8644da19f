"""Many short runs in one process: memory, file handles and threads stay flat, and every run ends in the store.

    python -m benchmarks.soak             500 runs on a local sqlite store, then 200 against a real ``mlflow server``
    python -m benchmarks.soak 20 10       fewer of each; below 200 memory is shown and not judged

A run is a whole one (model loaded, report, figures, logging) with a tiny model. Exit code 1 when something grows or strays.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LOCAL, SERVED = 500, 200
SETTLED = 0.1
"""Share of the runs after which what is loaded once has been loaded, and growth counts."""
MEMORY, HANDLES, THREADS = 0.05, 2, 1
"""Growth that is allowed between then and the end: share of memory, open files, threads. What does grow is MLflow's: it keeps
the artifact repository of each run, about 0.03 MB, and never more than 1,024 of them; the rest is free space in the heap."""
JUDGED = 200
"""Runs from which on memory is judged: the heap takes the first dozens of them to settle."""


def main(arguments: list[str]) -> int:
    local, served = map(int, arguments or (LOCAL, SERVED))
    good = _apart("local", local)
    return 0 if _apart("served", served) and good else 1


def _apart(where: str, runs: int) -> bool:
    """A soak in a process of its own, whose start is not the other's end."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-m", "benchmarks.soak", "--in", folder, where, str(runs)], check=False)
    return done.returncode == 0


def soak(folder: Path, where: str, runs: int) -> bool:
    """The runs, in ``folder``; prints figures on the way; True when nothing grows and nothing strays."""
    from tests.support import tiny
    from tests.support.serving import mlflow_server

    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    model = tiny.save(folder / "model")
    os.chdir(folder)
    store = f"sqlite:///{folder}/mlflow.db"
    server = mlflow_server(folder, store) if where == "served" else None
    os.environ["MLFLOW_TRACKING_URI"] = server.uri if server else store
    try:
        if server:
            server.start()
        return _flat(*_soak(model, runs), memory=runs >= JUDGED) & _no_strays(runs)
    finally:
        if server:
            server.kill()


def _soak(model: Path, runs: int) -> tuple[dict[str, int], dict[str, int]]:
    """State of the process when it has settled, and at the end."""
    from tests.support import tiny
    from tests.support.runs import run_phase2

    sizes = ("eval.on_samples=2", "eval.off_samples=1", "eval.gate_a_samples=1", "eval.n_random_trials=1", "data.pairs=3")
    shown = sorted({max(1, int(runs * share)) for share in (SETTLED, 0.25, 0.5, 0.75, 1)})
    states, started = {}, time.perf_counter()
    for at in range(1, runs + 1):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run_phase2(tiny.config(model, *sizes, f"seed={at}"), "2")
        if at in shown:
            states[at] = _state()
            line = ", ".join(f"{name} {value}" for name, value in states[at].items())
            print(f"{at:>4} runs  {line}  ({(time.perf_counter() - started) / at:.2f} s a run)", flush=True)
    return states[shown[0]], states[runs]


def _state() -> dict[str, int]:
    """Resident memory in MB, open files, threads."""
    gc.collect()
    resident = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024
    return {"MB": resident, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


def _flat(settled: dict[str, int], end: dict[str, int], memory: bool) -> bool:
    allowed = {"files": HANDLES, "threads": THREADS, **({"MB": MEMORY * settled["MB"]} if memory else {})}
    grown = {name: end[name] - settled[name] for name in allowed if end[name] - settled[name] > allowed[name]}
    print(f"grown: {grown}" if grown else "flat", flush=True)
    return not grown


def _no_strays(runs: int) -> bool:
    """Every run is in the store, finished, with a folder of its own, and nothing else is."""
    import mlflow

    client: Any = mlflow.MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: list[Any] = []
    token = None
    while token != "":
        page = client.search_runs(experiments, max_results=1000, page_token=token)
        found, token = [*found, *page], page.token or ""
    folders = {path.name for path in Path("outputs").iterdir()}
    odd = [run.info.run_id for run in found if run.info.status != "FINISHED" or run.info.run_id not in folders]
    good = not odd and len(found) == len(folders) == runs
    print(f"{len(found)} runs in the store, {len(folders)} folders, {len(odd)} of them not finished or without one", flush=True)
    return good


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[:1] == ["--in"]:
        sys.exit(0 if soak(Path(given[1]).resolve(), given[2], int(given[3])) else 1)
    sys.exit(main(given))
