"""Workers of a Ray cluster: the records of this process, whoever computes them, and whatever happens to those who do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import psutil
import pytest

import cedkv
from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import Phase2Config
from cedkv.core.environment import environment_variables
from cedkv.core.errors import ConfigError, NumericsError, RunInterrupted
from cedkv.runs.journal import Journal
from cedkv.runs.manifest import find_resumable, load_manifest
from cedkv.runs.outputs import OUTPUTS
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan
from tests.support import crashing, tiny
from tests.support import patch_points as points
from tests.support.crashing import left_by, the_run
from tests.support.planted_workers import another_module, arm, planted
from tests.support.runs import run_phase2
from tests.support.waiting import PATIENCE, wait_until

__all__ = ["planted"]
ROOT = Path(__file__).parents[2]
_CLUSTER = """
import os, sys
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
import ray
made = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                object_store_memory=100 * 2**20, _temp_dir=sys.argv[1])
print(made.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of four CPUs that this process is no part of."""
    command = [sys.executable, "-c", _CLUSTER, str(tmp_path_factory.mktemp("r"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address
        yield address
        process.communicate("")


@pytest.fixture
def short() -> Iterator[Path]:
    """A temporary folder whose path leaves room for those of Ray's sockets."""
    with TemporaryDirectory(prefix="c", dir="/tmp") as folder:
        yield Path(folder)


def config(model: Path, cluster: str | None, workers: int, *overrides: str) -> Phase2Config:
    """Six units of two samples, on workers or, with none, in this process with as many threads."""
    remote = (f"runtime.workers={workers}", f"runtime.ray_address={cluster}") if workers else ()
    return crashing.config(model, "select.mode=dying", "runtime.threads=1", *remote, *overrides)


@pytest.fixture(scope="module")
def undisturbed(llama_folder: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run in this process leaves."""
    arm(planted)
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("undisturbed"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            points.without_mlflow(patch)
            run_phase2(config(llama_folder, None, 0))
        return same_settings(left_by(the_run()))
    finally:
        os.chdir(before)


def same_settings(files: dict[str, str]) -> dict[str, str]:
    """The files without the settings that say where a run was computed, and the journal's lines in the order of units."""
    kept = {name: [line for line in text.splitlines() if not _says_where(line)] for name, text in files.items()}
    head, *units = kept["journal.jsonl"]
    units = [line.partition(",")[2] for line in units]  # without the digest, which covers the order of nothing but keys
    return {name: "\n".join(lines) for name, lines in kept.items()} | {"journal.jsonl": "\n".join([head, *sorted(units)])}


def _says_where(line: str) -> bool:
    return any(line.strip(' "').startswith(name) for name in ("workers", "ray_address", "threads"))


def actors(cluster: str) -> list[psutil.Process]:
    """The workers on this cluster: others may run beside it."""
    found = [process for process in psutil.process_iter() if "ray::RemoteWorker" in " ".join(_command(process))]
    return [process for process in found if cluster in " ".join(_command(process.parent() or process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_workers_leave_what_this_process_leaves_though_one_dies(
    workers: int, cluster: str, store: str, llama_folder: Path, planted: Path, undisturbed: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Records, tables, page, MLflow run: the same bytes; and no worker stays behind on a cluster that goes on."""
    arm(planted, "once")
    run_phase2(config(llama_folder, cluster, workers))
    assert same_settings(left_by(the_run())) == undisturbed
    assert mlflow.get_run(the_run()).info.status == "FINISHED"
    shown = capsys.readouterr().err
    assert "is computed again (failure 1 of 3)" in shown
    assert f"{workers} worker{'s' * (workers > 1)} with 1 thread each, on the cluster (1 machine)" in shown
    assert "(6 of 6 units)" in shown
    wait_until(lambda: not actors(cluster), "the workers have ended")


def test_a_unit_that_always_fails_ends_the_run_which_goes_on_in_this_process(
    cluster: str, store: str, llama_folder: Path, planted: Path, undisturbed: dict[str, str]
) -> None:
    """Three workers die of it, units before it are kept, and another number of workers, none, finishes the run."""
    arm(planted, "always")
    with pytest.raises(RunInterrupted, match=r"unit/0000\d has ended 3 workers that computed it"):
        run_phase2(config(llama_folder, cluster, 1))
    run_id = the_run()
    assert mlflow.get_run(run_id).info.status == "FAILED"
    kept = (OUTPUTS / run_id / "journal.jsonl").read_bytes()
    assert 2 <= kept.count(b"\n") < 7
    wait_until(lambda: not actors(cluster), "the workers have ended")
    arm(planted)
    run_phase2(config(llama_folder, cluster, 0), resumed=find_resumable(run_id))
    assert (OUTPUTS / run_id / "journal.jsonl").read_bytes().startswith(kept)
    assert same_settings(left_by(run_id)) == undisturbed


@pytest.mark.slow
def test_an_error_of_the_unit_is_not_repeated_and_any_other_is(
    cluster: str, store: str, llama_folder: Path, planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cedkv itself rejects would be rejected again; what a library raises may be the machine's fault."""
    arm(planted, "reject")
    with pytest.raises(NumericsError, match=r"^sample on-7: planted$"):
        run_phase2(config(llama_folder, cluster, 1))
    assert "computed again" not in capsys.readouterr().err
    wait_until(lambda: not actors(cluster), "the workers have ended")
    arm(planted, "raise")
    with pytest.raises(ConfigError, match=r"selector 'dying' of dying raised RuntimeError: planted"):
        run_phase2(config(llama_folder, cluster, 1))


def test_a_driver_that_is_killed_loses_its_unit_and_no_more(
    cluster: str, store: str, llama_folder: Path, planted: Path, undisturbed: dict[str, str]
) -> None:
    """kill -9: the cluster ends the workers, and one worker less finishes the run from its journal."""
    arm(planted)
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, json.dumps(config(llama_folder, cluster, 2).model_dump())],
        env={**environment_variables(), "PYTHONPATH": os.pathsep.join([str(planted), str(ROOT)])},
    )
    journals = lambda: list(OUTPUTS.glob("*/journal.jsonl"))  # noqa: E731
    written = lambda: any(path.read_bytes().count(b"\n") >= 3 for path in journals())  # noqa: E731
    wait_until(lambda: written() or process.poll() is not None, "two units are written")
    assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = journals()[0].read_bytes()
    assert kept.count(b"\n") < 7
    wait_until(lambda: not actors(cluster), "the workers have ended")
    run_phase2(config(llama_folder, cluster, 1), resumed=find_resumable(the_run()))
    assert journals()[0].read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert same_settings(left_by(the_run())) == undisturbed


_DRIVER = """
import json, sys, time
import dying
from cedkv.config.schema import Phase2Config
from cedkv.runs.journal import Journal
from tests.support.runs import run_phase2
real = Journal.append
def append(*finished):
    real(*finished)
    time.sleep(1)
Journal.append = append
run_phase2(Phase2Config.model_validate(json.loads(sys.argv[1])))
"""


SMALL = ("runtime.device=cpu", "runtime.batch_size=2", "eval.on_samples=80", "eval.off_samples=8", "eval.n_random_trials=2",
         "prefix_len=24", "select.span_len=4", "select.span_budget=3", "data.pairs=4")  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "to_all"),
    [
        (signal.SIGINT, 130, True),
        pytest.param(signal.SIGTERM, 143, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_and_its_own_cluster(
    number: signal.Signals, code: int, to_all: bool, store: str, llama_folder: Path, tmp_path: Path, short: Path
) -> None:
    """To all processes, as Ctrl-C and a batch system send it, or one: exit code and status as ever, nothing of Ray's left."""
    settings = ",".join([f"model.id={llama_folder}", "runtime.workers=2", *SMALL])
    command = [sys.executable, "-m", "cedkv", "--phase", "2", "--set", settings]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**environment_variables(), "PYTHONPATH": str(ROOT), "TMPDIR": str(short), "HOME": str(tmp_path)},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # in the background of a shell SIGINT is ignored
    )  # fmt: skip
    assert process.stderr is not None
    shown = []
    for line in process.stderr:
        shown.append(line)
        if "unit/0000" in line:
            break
    assert process.poll() is None, "".join(shown)
    ray = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in " ".join(_command(p)) for p in ray)
    (os.killpg if to_all else os.kill)(process.pid, number)
    shown += process.stderr.readlines()
    assert process.wait(PATIENCE) == code, "".join(shown)
    alive = lambda: any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ray)  # noqa: E731
    wait_until(lambda: not alive(), "the cluster has ended")
    assert list(short.glob("cedkv-*")) == []
    assert not (tmp_path / ".ray").exists()
    run_id = the_run()
    assert load_manifest(OUTPUTS / run_id).status == mlflow.get_run(run_id).info.status == "KILLED"
    expected = ("run ", "2 workers", f"{number.name}: ending", "unit/", "teacher", "first use")
    unexpected = [line for line in shown if not line.startswith(expected) and "at once" not in line]
    assert unexpected == [] or (to_all and number == signal.SIGTERM)  # Ray's own processes tell that they end


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["symbol_lookup", "symbol_lookup,label_mapping"])
def test_a_comparison_of_the_library_with_fitted_weights(tasks: str, cluster: str, store: str, llama_folder: Path) -> None:
    """Two selectors, two tasks; weights of heads that one worker fits are those of all."""
    tables = []
    for where in ({"workers": 2, "ray_address": cluster}, {}):
        run = cedkv.compare(
            model_id=llama_folder, threads=1, device="cpu", batch_size=2, max_on=4, max_off=4, n_random_trials=1, pairs=4,
            prefix_len=24, span_len=4, span_budget=3, min_span_distance=4, tasks=tasks, answer="whole",
            select_modes=["fitted_heads", "random_span"], **where,
        )  # fmt: skip
        runs = {key: cedkv.read_run(run_id) for key, run_id in load_manifest(OUTPUTS / run.run_id).children.items()}
        tables.append({key: (c.on.to_csv(), c.off.to_csv(), c.selections.to_csv()) for key, c in runs.items()})
    assert len(tables[0]) == 2 * len(tasks.split(","))
    assert tables[0] == tables[1]


def test_kinds_of_device_are_refused_or_measured(
    cluster: str, store: str, llama_folder: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cedkv.execution.ray_workers.modules_to_import", lambda configs: ["dying", "kinds"])
    arm(planted, "another")
    with pytest.raises(ConfigError, match=r"(?s)compute the same:\n  runtime\.device_name: .*OTHER.*mixed_devices=true"):
        run_phase2(config(llama_folder, cluster, 2))
    arm(planted, "another")
    own = ("runtime.mixed_devices=true", "eval.on_samples=40", "runtime.batch_size=1")
    run_phase2(config(llama_folder, cluster, 2, *own))
    manifest = max((load_manifest(path) for path in OUTPUTS.iterdir()), key=lambda found: found.start_time)
    content = json.loads((manifest.folder / "artifacts" / "devices.json").read_text())
    assert len(content["units"]) == 2
    assert sum(content["units"].values()) == 40
    assert content["not_compared"] == []
    (pair,) = content["differences"]
    assert pair["kl"] == pytest.approx(0.25)
    assert pair["logprob"] == 0
    assert pair["tokens"] == pair["selections"] == 0
    assert "x86_64 OTHER" in manifest.tags["devices"]
    assert manifest.tags["device_floor"] == "kl 0.25, logprob 0"
    header = json.loads((manifest.folder / "journal.jsonl").read_text().splitlines()[0])["header"]
    assert "runtime.device_name" not in header


def test_extensions_that_workers_cannot_import(cluster: str, store: str, llama_folder: Path) -> None:
    module = another_module("only_here")
    mine = type("Mine", (AttentionDiversitySpan,), {"__module__": "only_here"})
    module.Mine = mine  # type: ignore[attr-defined]
    its = tiny.config(llama_folder, "select.mode=only_here:Mine", "runtime.workers=1", f"runtime.ray_address={cluster}")
    with pytest.raises(ConfigError, match=r"worker on .*'only_here:Mine' cannot be imported.*imported in every worker"):
        run_phase2(its)


def test_extensions_of_the_script_itself(store: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = type("Scripted", (AttentionDiversitySpan,), {"__module__": "__main__"})
    monkeypatch.setitem(SELECTORS._registered, "scripted", scripted)
    with pytest.raises(ConfigError, match=r"selector 'scripted' is defined in the script or notebook that runs"):
        run_phase2(tiny.config(llama_folder, "select.mode=scripted", "runtime.workers=2"))


def test_no_cluster_there(store: str, llama_folder: Path) -> None:
    its = tiny.config(llama_folder, "runtime.workers=2", "runtime.ray_address=127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at 127\.0\.0\.1:9: ConnectionRefusedError"):
        run_phase2(its)
    assert load_manifest(OUTPUTS / the_run()).status == "FAILED"


@pytest.mark.slow
def test_two_hundred_units_with_a_worker_dying_every_ten_seconds(
    cluster: str, store: str, llama_folder: Path, planted: Path, tmp_path: Path
) -> None:
    """Nothing is lost, and nothing is there twice."""
    arm(planted)
    its = [config(llama_folder, cluster, n, "eval.on_samples=400", "eval.off_samples=384") for n in (2, 0)]
    finished: list[str] = []
    killed, last = [], time.monotonic()
    real = Journal.append

    def append(self: Journal, unit: str, *rest: Any) -> None:
        nonlocal last
        real(self, unit, *rest)
        finished.append(unit)
        if time.monotonic() - last > 10:
            workers = actors(cluster)
            victim = workers[len(killed) % len(workers)]
            killed.append(victim.pid)
            victim.kill()
            last = time.monotonic()
        time.sleep(0.3)  # so that there is time to die in

    with pytest.MonkeyPatch.context() as patch:
        points.JOURNAL_APPEND.replace(append, patch)
        run_phase2(its[0])
    disturbed = same_settings(left_by(the_run()))
    assert len(killed) >= 3
    assert sorted(finished) == [f"unit/{n:05d}" for n in range(200)]
    os.rename(OUTPUTS, tmp_path / "disturbed")
    run_phase2(its[1])
    assert same_settings(left_by(the_run())) == disturbed
