"""The executor of a run, by its configuration."""

from __future__ import annotations

from cedkv.execution.worker import Executor, Worker
from cedkv.execution.workload import Workload
from cedkv.models.opening import ModelSpec


def choose_executor(work: Workload, spec: ModelSpec) -> Executor:
    """Return what computes the units of a run: this process, or workers of a Ray cluster (``runtime.workers``)."""
    if work.config.runtime.workers is None:
        return Worker(work, spec)
    from cedkv.execution.ray_workers import RayWorkers  # takes a second to import, and most runs do without

    return RayWorkers(work, spec)
