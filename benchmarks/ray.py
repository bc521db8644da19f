"""Weak scaling: twice the samples on two workers against one, each with one thread; computing alone, models loaded before."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial

from benchmarks.common import Row, median_ratio, paired, quickstart, row
from cedkv.execution.ray_cluster import Cluster
from cedkv.execution.ray_workers import RayWorkers
from cedkv.models.opening import open_spec
from cedkv.runs.prepare import prepare
from cedkv.runs.resolved import resolve_inputs

SAMPLES, UNIT = 4, 2
"""ON samples of one worker, and of a unit: two units each."""
PAIRS = 2


def rows(samples: int = SAMPLES, unit: int = UNIT, pairs: int = PAIRS) -> list[Row]:
    """Time of one worker over the time of two that have twice the samples: 1 where the second one costs nothing."""
    with ExitStack() as stack:
        stack.enter_context(closing(Cluster(quickstart("runtime.workers=3", "runtime.threads=1").runtime)))
        one, two = (stack.enter_context(closing(_loaded(n, n * samples, unit))) for n in (1, 2))
        found = paired([partial(_compute, one)] * pairs, [partial(_compute, two)] * pairs)
    name = f"weak scaling of Ray workers: {samples} samples on one over {2 * samples} on two, one thread each"
    return [row(name, median_ratio(found), ">= 0.9")]


def _loaded(workers: int, samples: int, unit: int) -> RayWorkers:
    """Workers of the cluster that this process is connected to, all of them with the model."""
    sizes = (
        f"eval.on_samples={samples}",
        f"eval.off_samples={2 * samples}",
        "eval.gate_a_samples=1",
        f"runtime.batch_size={unit}",
    )
    config = quickstart(f"runtime.workers={workers}", "runtime.threads=1", *sizes)
    spec = open_spec(config)
    executor = RayWorkers(prepare(resolve_inputs("phase2", config), spec), spec)
    executor.load()
    executor.certify()
    executor.head_weights()
    executor.wait_for_all()
    return executor


def _compute(executor: RayWorkers) -> None:
    for _ in executor.execute(executor.work.plan, lambda *_: None):
        pass
