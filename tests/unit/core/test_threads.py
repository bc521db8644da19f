from __future__ import annotations

from pathlib import Path

import click
import pytest

from cedkv.cli.click_ext import program
from cedkv.core import threads
from cedkv.core.environment import environment_variables

V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def system(folder: Path, cgroup: str, mounts: list[str], limits: dict[str, str]) -> Path:
    """A system's files: what ``/proc`` says of this process, and control groups' files by their path under /sys/fs/cgroup."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(cgroup)
    (folder / "proc/self/mountinfo").write_text("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n" + "\n".join(mounts))
    for path, content in limits.items():
        file = folder / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return folder


def v1(group: str, quota: str, period: str = "100000") -> dict[str, str]:
    place = f"cpu,cpuacct{group}/cpu.cfs_"
    return {f"{place}quota_us": quota, f"{place}period_us": period}


@pytest.mark.parametrize(
    ("cgroup", "mounts", "limits", "quota"),
    [
        pytest.param("0::/\n", [V2], {"cpu.max": "150000 100000"}, 1.5, id="v2, a container's own namespace"),
        pytest.param("0::/\n", [V2], {"cpu.max": "max 100000"}, None, id="v2, no limit"),
        pytest.param("0::/\n", [V2], {}, None, id="v2, the outermost group has no file"),
        pytest.param("0::/a/b\n", [V2], {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 50000"}, 1.0, id="v2, of a parent"),
        pytest.param("0::/a\n", [V2], {"a/cpu.max": "9 3", "cpu.max": "8 2"}, 3.0, id="v2, the lower of two"),
        pytest.param("0::/a\n", [V2], {"b/cpu.max": "1 1"}, None, id="v2, another group's"),
        pytest.param("4:cpu,cpuacct:/\n", [V1.format(root="/")], v1("", "-1"), None, id="v1, no limit"),
        pytest.param("4:cpuacct,cpu:/job\n", [MEMORY, V1.format(root="/")], v1("/job", "400000"), 4.0, id="v1, a job's"),
        pytest.param("4:cpu:/docker/1f\n", [V1.format(root="/docker/1f")], v1("", "50000"), 0.5, id="v1, mounted as the root"),
        pytest.param("4:cpu:/docker/1f/x\n", [V1.format(root="/docker/1f")], v1("/x", "7", "2"), 3.5, id="v1, below the root"),
        pytest.param("4:cpu:/outer\n", [V1.format(root="/other")], v1("", "300000"), 3.0, id="v1, a path out of sight"),
        pytest.param("4:cpu:/\n0::/\n", [V1.format(root="/"), V2], v1("", "200000"), 2.0, id="both, limits in v1"),
        pytest.param("5:memory:/m\n", [MEMORY], {"memory/m/cpu.max": "1 1"}, None, id="v1, no controller of CPUs"),
        pytest.param("0::/\n", [V2], {"cpu.max": "no 100000"}, None, id="a file that is none"),
    ],
)
def test_the_quota_of_control_groups_is_the_lowest_on_the_way_up(
    tmp_path: Path, cgroup: str, mounts: list[str], limits: dict[str, str], quota: float | None
) -> None:
    assert threads.cpu_quota(system(tmp_path, cgroup, mounts, limits)) == quota


def test_without_proc_there_is_no_quota(tmp_path: Path) -> None:
    assert threads.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "usable"), [("max", 8), ("100000", 1), ("20000", 1), ("250000", 3), ("6400000", 8)])
def test_threads_follow_the_quota_and_a_part_of_a_cpu_counts_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, usable: int
) -> None:
    monkeypatch.setattr(threads, "allowed_cpus", lambda: 8)
    limited = system(tmp_path, "0::/\n", [V2], {"cpu.max": f"{quota} 100000"})
    assert threads.usable_cpus(limited) == usable
    environment: dict[str, str] = {}
    threads.choose(environment, limited)
    assert environment.get("OMP_NUM_THREADS") == (None if usable == 8 else str(usable))


@pytest.mark.parametrize("setting", sorted(threads.WAITING | threads.NUMBER))
def test_what_the_user_has_set_is_left_alone_and_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setattr(threads, "allowed_cpus", lambda: 8)
    environment = {setting: "users"}
    threads.choose(environment, system(tmp_path, "0::/\n", [V2], {"cpu.max": "200000 100000"}))
    chosen = {"OMP_NUM_THREADS": "2"} if setting in threads.WAITING else threads.SPIN
    assert environment == {setting: "users", **chosen}


def test_a_command_chooses_before_it_does_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    environment = {
        name: value for name, value in environment_variables().items() if name not in threads.WAITING | threads.NUMBER
    }
    monkeypatch.setattr("os.environ", environment)
    monkeypatch.setattr("sys.argv", ["any"])
    command = click.command(lambda: seen.append(environment_variables()))
    with pytest.raises(SystemExit):
        program(command, "any")
    assert {name: seen[0].get(name) for name in threads.SPIN} == threads.SPIN


def test_a_run_s_facts_have_what_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "3", "OMP_PLACES": "cores"})
    monkeypatch.setattr(threads, "usable_cpus", lambda: 5)
    assert threads.in_force() == {
        "threads_usable_cpus": 5,
        "threads_environment": "GOMP_SPINCOUNT=7 OMP_NUM_THREADS=3",
    }
