"""How many threads multiply, and how they wait for each other: chosen in the environment, before torch is imported.

OpenMP, which runs torch's threads, reads the environment once, when its library is loaded. It knows the CPUs that a process may
use, but not the share of their time that a control group leaves it. And its threads wait for each other by spinning, GNU's for
milliseconds, Intel's for 200: beside another busy process, the thread they wait for may need the CPU on which they spin.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath
from typing import Any

SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""What bounds the time that a thread spins before it sleeps: rounds of GNU's OpenMP, milliseconds of Intel's and LLVM's."""
WAITING = frozenset({*SPIN, "OMP_WAIT_POLICY", "KMP_LIBRARY"})
"""What decides how threads wait; where the user has set any of them, nothing of it is chosen here."""
NUMBER = frozenset({"OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_DYNAMIC", "MKL_NUM_THREADS", "KMP_ALL_THREADS"})
"""What decides how many threads there are; where the user has set any of them, nothing of it is chosen here."""


def choose(environment: MutableMapping[str, str] | None = None, system: Path = Path("/")) -> None:
    """Choose how threads wait and, under a CPU quota, how many there are, where the user has not.

    Called by commands and workers, which own their process, before they import torch; a library leaves the process alone.

    Args:
        environment: changed in place; None for this process's.
        system: as for ``cpu_quota``.
    """
    environment = os.environ if environment is None else environment
    if not WAITING & environment.keys():
        environment.update(SPIN)
    if not NUMBER & environment.keys() and usable_cpus(system) < allowed_cpus():
        environment["OMP_NUM_THREADS"] = str(usable_cpus(system))


def in_force() -> dict[str, Any]:
    """Return facts for a run: the CPUs that this process can use, and the settings of threads, chosen here or by the user."""
    settings = (f"{name}={os.environ[name]}" for name in sorted((WAITING | NUMBER) & os.environ.keys()))
    return {"threads_usable_cpus": usable_cpus(), "threads_environment": " ".join(settings)}


def usable_cpus(system: Path = Path("/")) -> int:
    """Return how many CPUs this process can keep busy: those it is allowed, or fewer, where a quota leaves it less time.

    A part of a CPU counts as one: two threads on the time of one and a half are faster than one.
    """
    quota = cpu_quota(system)
    return allowed_cpus() if quota is None else max(1, min(allowed_cpus(), math.ceil(quota)))


def allowed_cpus() -> int:
    """Return on how many CPUs the system lets this process run."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13; the user may set it (PYTHON_CPU_COUNT)
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(system: Path = Path("/")) -> float | None:
    """Return the CPUs whose whole time the control groups (cgroups, v1 and v2) of this process leave it; None without a limit.

    Args:
        system: the folder that holds ``proc`` and the mounted control groups.
    """
    try:
        memberships = (system / "proc/self/cgroup").read_text().splitlines()
        mounts = (system / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    path_of = {}
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            path_of["cgroup" if controllers else "cgroup2"] = path
    quotas = []
    for line in mounts:
        mount, _, source = line.partition(" - ")
        root, point = mount.split()[3:5]
        kind, options = source.split()[0], source.split()[-1].split(",")
        if kind in path_of and (kind == "cgroup2" or "cpu" in options):
            quotas += [_quota(group) for group in _ancestry(system / point.lstrip("/"), root, path_of[kind])]
    return min((quota for quota in quotas if quota is not None), default=None)


def _ancestry(point: Path, root: str, path: str) -> Iterator[Path]:
    """Yield the folders of a group and of all groups that contain it: the limit of each holds.

    Args:
        root: the group that is mounted at ``point``. path: the group of this process, which a container may not see; what is
            mounted is then its own.
    """
    inside = PurePosixPath(path)
    relative = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
    yield from (point / part for part in (relative, *relative.parents))


def _quota(group: Path) -> float | None:
    """Return the CPUs whose whole time a group leaves its processes; None without a limit."""
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError):  # the outermost group has no limit
        return None
