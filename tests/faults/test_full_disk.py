"""Disks that are really full: small file systems in memory, which the system lets root mount (elsewhere: skipped)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from cedkv.cli.app import RunRequest, execute
from cedkv.config.resolve import to_yaml
from cedkv.runs.lifecycle import sync
from cedkv.runs.manifest import load_manifest
from tests.support.crashing import OUTPUTS, config, finishes_the_same, forked, n_runs, the_run


class Disk:
    """A file system of so many KB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, size: int) -> None:
        self.folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", self.folder], check=True)

    def grow(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", self.folder], check=True)

    def fill(self) -> None:
        """Use up what is left."""
        with (self.folder / "filling").open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                pass


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    probe = Disk(tmp_path / "probe")
    try:
        probe.mount(64)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system; runs as root outside of a container that forbids it")
    subprocess.run(["umount", probe.folder], check=True)
    yield made
    subprocess.run(["umount", "-l", made.folder], check=False)


def run_program(model: Path) -> int:
    """A run as the command line starts it; its exit code."""
    Path("c.yaml").write_text(to_yaml(config(model)))
    return forked(lambda: execute(RunRequest("phase2", "c.yaml")))


@pytest.mark.parametrize("size", [16, 24, 60, 120, 220])
def test_outputs_on_a_disk_that_gets_full(
    store: str, disk: Disk, llama_folder: Path, undisturbed: dict[str, str], size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wherever it happens (the first file, a unit, the tables, the page): exit code 3, one error, and with more room the
    run comes out the same."""
    disk.mount(size)
    OUTPUTS.symlink_to(disk.folder)
    assert run_program(llama_folder) == 3
    told = capfd.readouterr().err
    assert told.count("No space left on device") == 1
    run_id = the_run()
    assert f"--resume {run_id}" in told
    assert mlflow.get_run(run_id).info.status == "FAILED"
    disk.grow()
    finishes_the_same(run_id, llama_folder, undisturbed)


def test_outputs_on_a_disk_without_room_for_the_first_files(
    store: str, disk: Disk, llama_folder: Path, undisturbed: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing that a resume needs is there yet: the run is FAILED, and what is told is to start again."""
    disk.mount(8)
    OUTPUTS.symlink_to(disk.folder)
    assert run_program(llama_folder) == 3
    told = capfd.readouterr().err
    assert told.count("No space left on device") == 1
    assert "Nothing was computed yet; free space, then start again" in told
    assert mlflow.search_runs(experiment_names=["cedkv"], max_results=1).status.item() == "FAILED"
    disk.grow()
    assert run_program(llama_folder) == 0


def test_outputs_on_a_disk_that_is_full(store: str, disk: Disk, llama_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing can be stored, so nothing is started."""
    disk.mount(64)
    disk.fill()
    OUTPUTS.symlink_to(disk.folder)
    before = n_runs()
    assert run_program(llama_folder) == 3
    assert "outputs cannot be written: [Errno 28] No space left on device; free space" in capfd.readouterr().err
    assert n_runs() == before


def test_outputs_with_room_for_one_file(store: str, disk: Disk, llama_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The configuration has room, what a resume needs has not: nobody is told to resume it."""
    disk.mount(4)
    OUTPUTS.symlink_to(disk.folder)
    assert run_program(llama_folder) == 3
    told = capfd.readouterr().err
    assert "Nothing was computed yet; free space, then start again" in told
    assert "--resume" not in told
    assert mlflow.get_run(the_run()).info.status == "FAILED"


def test_store_on_a_full_disk(
    store: str, disk: Disk, llama_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is done, with exit code 4; with more room ``sync`` logs it."""
    disk.mount(4096)
    uri = f"sqlite:///{disk.folder}/mlflow.db"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("cedkv", artifact_location=(disk.folder / "artifacts").as_uri())
    disk.fill()
    assert run_program(llama_folder) == 4
    told = capfd.readouterr().err
    assert told.count("warning:") == 1
    disk.grow()
    run_id = the_run()
    sync(OUTPUTS / run_id, 60, lambda _: None)
    run = mlflow.get_run(str(load_manifest(OUTPUTS / run_id).mlflow_run_id))
    assert run.info.status == "FINISHED"
