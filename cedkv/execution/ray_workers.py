"""Workers of a Ray cluster as an executor: one actor per card, or per share of the CPUs.

Only this process knows the run: it hands out units, the largest first, to whichever worker is free, and takes their records
back. A worker loads the model from a path, and one worker of a machine at a time: several that load at once may need more
memory than the machine has. What dies costs the unit that it computed, which another worker computes again.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import click

from cedkv.checks.certificate import Certificate
from cedkv.core.errors import CedkvError, RunInterrupted
from cedkv.core.text import one_line, plural
from cedkv.execution.extensions import modules_to_import
from cedkv.execution.ray_cluster import Cluster, share_out
from cedkv.execution.ray_worker import RayWorker, check_same
from cedkv.execution.remote_worker import Rejected, RemoteWorker, Surroundings
from cedkv.execution.worker import FinishedUnit, ModelFacts, Step
from cedkv.execution.workload import PlannedUnit, Workload
from cedkv.inference.head_weights import HeadWeights
from cedkv.models import loading
from cedkv.models.opening import ModelSpec

UNIT_FAILURES = 3
"""Workers that one unit may end before it ends the run."""
START_FAILURES = 5
"""Workers that may end one after the other before any of them has loaded the model; after that no more are started."""
WAIT_NOTICE = 30.0
"""Seconds after which a line says that workers wait for room on the cluster."""


class RayWorkers:
    """See ``Executor``; ``work``: the workload."""

    def __init__(self, work: Workload, spec: ModelSpec) -> None:
        self.work, self._spec = work, spec
        self._workers: list[RayWorker] = []
        self._cluster: Cluster | None = None
        self._left: deque[PlannedUnit] = deque()
        self._step: Step = lambda *_: None
        self._failures: Counter[str] = Counter()
        self._failed_starts, self._notice_at = 0, float("inf")
        self._first: tuple[RayWorker, ModelFacts, Certificate] | None = None
        self._fitted: Any = None

    @property
    def at_once(self) -> int:
        """See ``Executor``."""
        return self._share.workers

    def load(self) -> ModelFacts:
        """See ``Executor``; the model is loaded when one worker has it, and the others load it while that one computes.

        Raises:
            ConfigError: the cluster, or an extension that a worker cannot import.
            RunInterrupted: no worker could be started.
        """
        surroundings = Surroundings(os.getcwd(), sys.path, modules_to_import(self.work.configs))
        runtime = self.work.config.runtime
        self._cluster = cluster = Cluster(runtime)
        self._share = share_out(runtime, cluster.nodes)
        where = "a cluster of this run's own" if cluster.local else "the cluster"
        click.echo(f"{self._share}, on {where} ({plural(len(cluster.nodes), 'machine')})", err=True)
        self._offline = not cluster.remote and loading.fetch_weights(self.work.config, self._spec)
        device = "cuda" if self._share.card else "cpu"
        runtime = runtime.model_copy(update={"device": device, "threads": self._share.threads})
        sent = replace(self.work, config=self.work.config.model_copy(update={"runtime": runtime}))
        self._sent = surroundings, cluster.ray.put(sent)
        for _ in range(self._share.workers):
            self._start()
        while self._first is None:
            self._pump()
        return self._first[1]

    def certify(self) -> Certificate:
        """See ``Executor``; the certificate of the worker that was loaded first."""
        return self._joined[2]

    def head_weights(self) -> list[list[HeadWeights]]:
        """See ``Executor``; all workers compute with what one of them has fitted."""
        for _ in range(UNIT_FAILURES):
            worker = self._ready_worker()
            worker.call = worker.actor.head_weights.remote()
            while worker in self._workers and worker.call is not None:
                self._pump()
            if self._fitted is not None:
                for other in self._workers:
                    if other.stage == "ready":
                        other.actor.use.remote(self._fitted)
                return self._fitted
        raise RunInterrupted(f"{UNIT_FAILURES} workers ended while they fitted weights of attention heads")

    def execute(self, units: Sequence[PlannedUnit], step: Step) -> Iterator[FinishedUnit]:
        """See ``Executor``.

        Raises:
            RunInterrupted: a unit has ended ``UNIT_FAILURES`` workers, or no worker is left.
            CedkvError: what a unit raises that a repetition would raise again.
        """
        self._left, self._step = deque(sorted(units, key=lambda planned: -planned.size)), step
        missing = len(units)
        while missing:
            self._hand_out()
            finished = self._pump()
            if finished is not None:
                missing -= 1
                self._hand_out()
                yield finished

    def on_every_kind(self, planned: PlannedUnit) -> list[FinishedUnit]:
        """See ``Executor``; a kind whose worker ends meanwhile is left out."""
        kinds = {worker.kind: worker for worker in self._workers if worker.stage == "ready"}
        finished = []
        for worker in kinds.values():
            try:
                answer = self._ray.get(worker.actor.compute.remote(planned))
            except self._ray.exceptions.RayError:
                continue
            if isinstance(answer, Rejected):
                raise answer.error()
            finished.append(answer)
        return finished

    def wait_for_all(self) -> None:
        """Wait until every worker has loaded the model; units can be computed as soon as one has."""
        while any(worker.stage != "ready" for worker in self._workers):
            self._pump()

    def close(self) -> None:
        """See ``Executor``; workers on a cluster of others end too."""
        if self._cluster is not None:
            if not self._cluster.local:
                for worker in self._workers:
                    self._kill(worker)
            self._cluster.close()
            self._cluster = None

    @property
    def _ray(self) -> Any:
        assert self._cluster is not None, "load was not called"
        return self._cluster.ray

    @property
    def _joined(self) -> tuple[RayWorker, ModelFacts, Certificate]:
        assert self._first is not None, "load was not called"
        return self._first

    def _start(self) -> None:
        self._notice_at = time.monotonic() + WAIT_NOTICE
        options: dict[str, Any] = {**self._share.resources, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        if self._offline:
            options["runtime_env"] = {"env_vars": {"HF_HUB_OFFLINE": "1"}}
        actor = self._ray.remote(concurrency_groups={"watch": 1})(RemoteWorker).options(**options).remote()
        self._workers.append(RayWorker(actor, actor.place.options(concurrency_group="watch").remote()))

    def _ready_worker(self) -> RayWorker:
        while True:
            for worker in self._workers:
                if worker.stage == "ready":
                    return worker
            self._pump()

    def _hand_out(self) -> None:
        """Give units to workers: one to compute, and a second one that waits there while there are more units than workers."""
        ready = [worker for worker in self._workers if worker.stage == "ready"]
        for depth in (1, 2):
            for worker in ready:
                if len(self._left) > (0 if depth == 1 else len(self._workers)) and len(worker.units) < depth:
                    planned = self._left.popleft()
                    worker.units[worker.actor.compute.remote(planned)] = planned

    def _pump(self) -> FinishedUnit | None:
        """Wait a moment for any worker to answer, and act on the answer; return the unit that it has finished, if it has."""
        if not self._workers:
            raise RunInterrupted(
                f"no worker is left: {START_FAILURES} of them ended one after the other before they had loaded the model. The "
                "reasons are above; memory is the usual one: lower runtime.workers"
            )
        self._load_next()
        owners = {
            ref: worker for worker in self._workers for ref in (*worker.units, worker.call, worker.steps) if ref is not None
        }
        done, _ = self._ray.wait(list(owners), num_returns=1, timeout=1.0)
        if time.monotonic() > self._notice_at:
            self._notice_waiting()
        if not done:
            return None
        ref, worker = done[0], owners[done[0]]
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._lost(worker, error)
            return None
        if isinstance(answer, Rejected):
            raise self._rejection(worker, ref, answer)
        if ref in worker.units:
            del worker.units[ref]
            finished: FinishedUnit = answer
            return finished
        if ref is worker.steps:
            worker.steps = worker.actor.steps.options(concurrency_group="watch").remote()
            under_way = {planned.key for planned in worker.units.values()}
            for step in answer:
                if step[0] in under_way:
                    self._step(*step)
        else:
            self._answered(worker, answer)
        return None

    def _answered(self, worker: RayWorker, answer: Any) -> None:
        """Take the answer to what a worker does besides units: where it is, the model that it has loaded, weights of heads."""
        worker.call = None
        if worker.stage == "starting":
            worker.place, worker.stage, worker.call = answer, "importing", worker.actor.prepare.remote(*self._sent)
        elif worker.stage == "importing":
            worker.extensions, worker.stage = answer, "waiting"
        elif worker.stage == "loading":
            self._failed_starts = 0
            self._join(worker, *answer)
        else:
            self._fitted = answer

    def _load_next(self) -> None:
        """Let workers load the model, one of a machine at a time."""
        busy = {worker.place[0] for worker in self._workers if worker.stage == "loading"}
        for worker in self._workers:
            if worker.stage == "waiting" and worker.place[0] not in busy:
                busy.add(worker.place[0])
                worker.stage, worker.call = "loading", worker.actor.load.remote()

    def _join(self, worker: RayWorker, facts: ModelFacts, certificate: Certificate) -> None:
        """Let a worker take part that has loaded the model, if it computes what the first one does."""
        worker.stage, worker.certificate = "ready", certificate
        if self._first is None:
            self._first = worker, facts, certificate
        else:
            first, _, expected = self._first
            check_same(
                (first.name, {**expected.identity, **first.extensions}),
                (worker.name, {**certificate.identity, **worker.extensions}),
                self.work.config.runtime.mixed_devices,
            )
            certificate.check(self.work.configs)
        if self._fitted is not None:
            worker.actor.use.remote(self._fitted)
        worker.steps = worker.actor.steps.options(concurrency_group="watch").remote()

    def _rejection(self, worker: RayWorker, ref: Any, answer: Rejected) -> CedkvError:
        """Return the error that a worker has raised: a unit's own as it is, any other with the machine's name."""
        if ref in worker.units:
            return answer.error()
        return answer.error(f"worker on {worker.name}: ")

    def _lost(self, worker: RayWorker, error: Exception) -> None:
        """Go on without a worker that has ended, or raised what no repetition can be trusted after; start another one.

        Raises:
            RunInterrupted: its unit has ended too many workers.
        """
        self._workers.remove(worker)
        self._kill(worker)
        reason = one_line(getattr(error, "cause", None) or error)
        units = list(worker.units.values())
        self._left.extendleft(reversed(units))
        failed = units[0] if units and worker.stage == "ready" else None
        lost = f"a worker on {worker.name} ended: {reason}"
        if failed is not None:
            self._failures[failed.key] += 1
            if self._failures[failed.key] == UNIT_FAILURES:
                raise RunInterrupted(
                    f"{failed.key} has ended {UNIT_FAILURES} workers that computed it, the last one on {worker.name}: {reason}"
                    "\nFinished units are safe in the run's journal; --resume goes on with it"
                ) from error
            lost += f"; {failed.key} is computed again (failure {self._failures[failed.key]} of {UNIT_FAILURES})"
        elif worker.stage != "ready":
            self._failed_starts += 1
        click.echo(lost, err=True)
        if self._failed_starts < START_FAILURES:
            self._start()

    def _notice_waiting(self) -> None:
        """Say once that workers wait for room, which others on the cluster take up, or which a lost machine had."""
        self._notice_at = float("inf")
        waiting = sum(worker.stage == "starting" for worker in self._workers)
        if waiting:
            click.echo(f"{waiting} of {plural(self._share.workers, 'worker')} wait for room on the cluster", err=True)

    def _kill(self, worker: RayWorker) -> None:
        try:
            self._ray.kill(worker.actor, no_restart=True)
        except Exception:  # the actor, or the whole cluster, is gone already
            return
