"""Where runs are stored, and what is said of a folder that cannot be written, or has no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pytest

from cedkv.core.errors import ConfigError, RunInterrupted
from cedkv.core.files import write_text
from cedkv.runs import outputs
from cedkv.runs.manifest import RunManifest, find_resumable, load_manifest, report_full_disk
from cedkv.runs.outputs import is_temporary, locked, outputs_folder, require_outputs, unwritable, write_remedy
from tests.support import tiny
from tests.support.crashing import run_of_nothing


@pytest.mark.parametrize("relative", [False, True])
def test_runs_are_where_the_variable_says(
    store: str, tmp_path: Path, relative: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made there, with parents that are missing, found there by id, and nothing in ``outputs``."""
    place = "kept/here" if relative else str(tmp_path / "kept/here")
    monkeypatch.setenv("CEDKV_OUTPUTS", place)
    with run_of_nothing() as job:
        job.finish(job.manifest)
    run_id = job.manifest.run_id
    assert [path.name for path in (tmp_path / "kept/here").iterdir()] == [run_id]
    assert find_resumable(run_id).folder == Path(place) / run_id
    assert not Path("outputs").exists()
    with pytest.raises(ConfigError, match=r"absent' does not exist.*looked for in .*kept/here"):
        find_resumable("absent")
    monkeypatch.delenv("CEDKV_OUTPUTS")
    with pytest.raises(ConfigError, match="does not exist"):
        find_resumable(run_id)
    assert load_manifest(tmp_path / "kept/here" / run_id).run_id == run_id


@pytest.mark.parametrize(("given", "found"), [(None, "outputs"), ("", "outputs"), ("~/runs", "/home/me/runs"), ("a", "a")])
def test_which_folder_is_meant(given: str | None, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("CEDKV_OUTPUTS", raising=False)
    if given is not None:
        monkeypatch.setenv("CEDKV_OUTPUTS", given)
    assert outputs_folder() == Path(found)


def test_a_copy_that_mlflow_run_has_fetched_is_told_from_any_other_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fetched, checkout = Path(tempfile.mkdtemp()), tmp_path / "checkout"
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    assert not is_temporary(fetched / "outputs")
    monkeypatch.setenv("MLFLOW_RUN_ID", "a")
    assert is_temporary(fetched / "outputs")
    assert is_temporary(fetched / "subdirectory/outputs")
    assert not is_temporary(checkout / "outputs")
    assert not is_temporary(tmp_path)
    assert not is_temporary(Path("/elsewhere/tmpabcdefgh/outputs"))
    (tmp_path / "link").symlink_to(fetched)
    assert is_temporary(tmp_path / "link/outputs")


def refusing(number: int, folders_only: bool = False) -> Any:
    """``os.fsync`` or ``fcntl.flock`` as a file system answers that does not have it."""
    real = os.fsync

    def refuse(descriptor: int, *_: Any) -> None:
        if folders_only and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return real(descriptor)
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_folders_that_cannot_be_flushed_are_left_alone(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(number, folders_only=True))
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_folder_on_a_disk_that_fails_is_an_error(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(number, folders_only=True))
    with pytest.raises(OSError, match=os.strerror(number)):
        write_text(tmp_path / "a.txt", "text")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_run_goes_on_without_locks_and_says_so_once(
    store: str, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    outputs._warn_without_locks.cache_clear()
    for _ in range(2):
        with run_of_nothing() as job:
            job.finish(job.manifest)
        assert job.fault is None
    told = capsys.readouterr().err
    assert told.count("warning: ") == told.count("has no locks") == 1
    assert "free space" not in told


def test_a_lock_that_is_held_is_not_taken_for_a_file_system_without_locks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "a"), pytest.raises(ConfigError, match="in use by another process"), locked(tmp_path / "a"):
        pytest.fail("two processes hold one run")
    with locked(tmp_path / "a"):
        assert capsys.readouterr().err == ""


CAUSES = {
    errno.ENOSPC: "free space", errno.EDQUOT: "quota", errno.EROFS: "read-only", errno.EACCES: "right to write",
    errno.EIO: "bring back the disk", errno.EINVAL: "flush files to disk", errno.EEXIST: "put a folder in its place",
}  # fmt: skip


@pytest.mark.parametrize("number", CAUSES)
def test_a_folder_that_cannot_be_written_is_told_by_its_cause(store: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "outputs")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(RunInterrupted) as caught:
        require_outputs()
    assert os.strerror(number) in str(caught.value)
    assert CAUSES[number] in str(caught.value)
    assert "or set CEDKV_OUTPUTS to another folder" in str(caught.value)
    assert (number == errno.ENOSPC) == ("; free space," in str(caught.value))


def test_an_error_of_something_else_is_not_one_of_the_run_folder(tmp_path: Path) -> None:
    """A network that is away, a file that is missing elsewhere: nothing is said of a disk."""
    run = RunManifest("phase2", "2", "n", run_id="a", home=tmp_path)
    run.write(tiny.config("x"))
    others = (ConnectionResetError(errno.ECONNRESET, "reset"), OSError("no connection"), BrokenPipeError(errno.EPIPE, "pipe"),
              FileNotFoundError(errno.ENOENT, "no such file", "/data/reviews.csv"))  # fmt: skip
    for error in others:
        with pytest.raises(OSError, match=error.strerror or "no connection") as caught, report_full_disk(run):
            raise error
        assert caught.value is error


def test_an_error_of_a_disk_names_what_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "outputs/run"
    full, gone = (errno.ENOSPC, "No space left on device"), (errno.ENOENT, "No such file")
    assert unwritable(OSError(*full), folder) == str(folder)
    assert unwritable(OSError(*gone, str(folder / "x.json")), folder) == str(folder)
    assert unwritable(OSError(*full, str(tmp_path / "outputs/nested/x.json")), folder) == str(folder)
    assert unwritable(OSError(*full, "/home/me/.cache/x"), folder) == "/home/me/.cache/x"
    assert unwritable(OSError(*gone, "/home/me/.cache/x"), folder) is None
    assert write_remedy(OSError("a text alone")) == "make it writable"


def test_results_in_a_temporary_copy_are_said_by_their_whole_path(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``mlflow run git://...`` starts the project: in a folder of ``mkdtemp``, with the id of a run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    copy = Path(tempfile.mkdtemp())
    monkeypatch.chdir(copy)
    run_id = mlflow.MlflowClient().create_run(mlflow.get_experiment_by_name("cedkv").experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with run_of_nothing() as job:
        job.finish(job.manifest)
    assert job.folder == copy / "outputs" / run_id
    told = capsys.readouterr().err
    assert f"warning: results go to {copy}/outputs, a temporary folder" in told
    assert "Set CEDKV_OUTPUTS to" in told
