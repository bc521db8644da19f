"""How workers are handled, whatever order things happen in: started, loaded, given units, lost."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from cedkv.core.errors import CedkvError, ConfigError, LackOfMemoryError, NumericsError, RunInterrupted
from cedkv.execution import ray_workers
from cedkv.execution.ray_workers import START_FAILURES, RayWorkers
from cedkv.execution.remote_worker import Rejected, RemoteWorker
from cedkv.execution.worker import FinishedUnit
from cedkv.execution.workload import PlannedUnit, Workload
from cedkv.units import Unit
from tests.support import tiny
from tests.support.fake_ray import Call, FakeCluster, FakeRay, answer, die

IDENTITY = {"runtime.device": "cpu", "runtime.device_name": "x86_64 AVX512", "model.weights": "aa"}


@dataclass(frozen=True)
class _Certificate:
    identity: dict[str, Any]

    def check(self, configs: Any) -> None:
        """Nothing fails."""


def loaded(**changes: Any) -> tuple[Any, Any]:
    return SimpleNamespace(), _Certificate(IDENTITY | changes)


def units(*sizes: int) -> list[PlannedUnit]:
    return [PlannedUnit(0, Unit(f"unit/{n}", (n,), ()), size) for n, size in enumerate(sizes)]


def made(
    patch: pytest.MonkeyPatch, ray: FakeRay, *overrides: str, workers: int = 2, hub: bool = False, **cluster: Any
) -> RayWorkers:
    patch.setattr(ray_workers, "Cluster", lambda runtime: FakeCluster(ray, **cluster))
    patch.setattr(ray_workers.loading, "fetch_weights", lambda config, spec: hub)
    config = tiny.config("x", f"runtime.workers={workers}", *overrides)
    return RayWorkers(Workload(config, [], "2"), None)  # type: ignore[arg-type]


class Script:
    """Workers that answer everything at once, but for what a test says otherwise.

    rules: method -> what it does with a call in place of an answer.
    """

    def __init__(self, **rules: Any) -> None:
        self.rules, self.seen = rules, list[Call]()

    def __call__(self, ray: FakeRay) -> None:
        usual = {"prepare": {}, "load": loaded(), "head_weights": [[]], "use": None}
        for actor in ray.alive:
            for call in [call for call in actor.calls if not call.done and call.method != "steps"]:
                self.seen.append(call)
                if call.method in self.rules:
                    self.rules[call.method](call)
                elif call.method == "place":
                    answer(call, ("host", 1 + ray.actors.index(call.actor)))
                elif call.method == "compute":
                    answer(call, FinishedUnit(call.arguments[0], {}, {}))
                else:
                    answer(call, usual[call.method])
                if call.done:
                    return


def run(executor: RayWorkers, planned: list[PlannedUnit]) -> list[str]:
    executor.load()
    executor.head_weights()
    return [finished.planned.key for finished in executor.execute(planned, lambda *_: None)]


def test_every_unit_once_the_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(Script())
    finished = run(made(monkeypatch, ray, workers=1), units(1, 5, 3, 5))
    assert finished == ["unit/1", "unit/3", "unit/2", "unit/0"]


def test_one_unit_is_computed_and_at_most_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that waits saves the way there and back; the last units do not wait behind another where a worker is free."""
    depths: list[list[int]] = []

    def compute(call: Call) -> None:
        depths.append([len(actor.pending("compute")) for actor in ray.alive])
        answer(call, FinishedUnit(call.arguments[0], {}, {}))

    ray = FakeRay(Script(compute=compute))
    executor = made(monkeypatch, ray)
    executor.load()
    executor.wait_for_all()
    executor.head_weights()
    assert len(list(executor.execute(units(*[1] * 7), lambda *_: None))) == 7
    assert depths[0] == [2, 2]
    assert max(map(sum, depths[-2:])) <= 2
    assert all(max(pending) <= 2 for pending in depths)


def test_one_worker_of_a_machine_loads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loading: list[int] = []

    def load(call: Call) -> None:
        loading.append(sum(len(actor.pending("load")) for actor in ray.alive))
        if len(loading) % 3 == 0:  # each takes a while
            answer(call, loaded())

    ray = FakeRay(Script(load=load))
    executor = made(monkeypatch, ray, workers=4)
    executor.load()
    executor.wait_for_all()
    assert len(loading) == 12
    assert set(loading) == {1}


@pytest.mark.parametrize(
    ("cluster", "options"),
    [({}, {"num_cpus": 4, "num_gpus": 0}), ({"cards": 2}, {"num_cpus": 0, "num_gpus": 1})],
)
def test_workers_ask_for_their_resources_and_upload_nothing(
    cluster: dict[str, int], options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No default of Ray's: an actor without ``num_gpus`` may see every card, and a working folder would be uploaded."""
    ray = FakeRay(Script())
    executor = made(monkeypatch, ray, "runtime.device=auto", hub=True, **cluster)
    executor.load()
    assert [actor.options for actor in ray.actors] == [
        {**options, "max_restarts": 0, "scheduling_strategy": "SPREAD", "runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "1"}}}
    ] * 2
    (sent,) = {id(call.arguments[1]): call.arguments[1] for actor in ray.actors for call in actor.calls
               if call.method == "prepare"}.values()  # fmt: skip
    assert sent.config.runtime.device == ("cuda" if cluster else "cpu")
    assert sent.config.runtime.threads == 4


def test_a_lost_worker_costs_its_unit_which_another_one_computes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deaths = [2, 5]

    def compute(call: Call) -> None:
        script.computed += 1
        if script.computed in deaths:
            die(call.actor)
        else:
            answer(call, FinishedUnit(call.arguments[0], {}, {}))

    script = Script(compute=compute)
    script.computed = 0  # type: ignore[attr-defined]
    ray = FakeRay(script)
    finished = run(made(monkeypatch, ray), units(*range(8)))
    assert sorted(finished) == [f"unit/{n}" for n in range(8)]
    assert len(ray.actors) == 4
    assert [actor.killed for actor in ray.actors].count(True) == 2
    assert capsys.readouterr().err.count("is computed again (failure 1 of 3)") == 2


def test_a_unit_that_ends_three_workers_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit that waits behind it is not blamed."""

    def compute(call: Call) -> None:
        if call.arguments[0].key == "unit/1":
            die(call.actor)
        else:
            answer(call, FinishedUnit(call.arguments[0], {}, {}))

    ray = FakeRay(Script(compute=compute))
    executor = made(monkeypatch, ray, workers=1)
    with pytest.raises(RunInterrupted, match=r"unit/1 has ended 3 workers .*host \(process 3\): the worker died\n.*--resume"):
        run(executor, units(1, 9, 5))
    assert len(ray.actors) == 3


def test_an_error_of_the_unit_itself_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(Script(compute=lambda call: answer(call, Rejected(NumericsError, "sample on-3: NaN"))))
    with pytest.raises(NumericsError, match=r"^sample on-3: NaN$"):
        run(made(monkeypatch, ray), units(1, 1))


def test_memory_that_ran_out_is_another_worker_s_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its card may be shared with another process for a moment; what the unit itself is rejected for is an answer."""
    raised: list[CedkvError] = [LackOfMemoryError("memory ran out on cuda:0"), NumericsError("sample on-3: NaN")]

    def compute(*_: Any) -> None:
        raise raised.pop(0)

    worker = RemoteWorker.__new__(RemoteWorker)  # __init__ changes the environment
    monkeypatch.setattr(worker, "_worker", SimpleNamespace(compute=compute), raising=False)
    with pytest.raises(LackOfMemoryError, match="cuda:0"):
        worker.compute(None)
    assert worker.compute(None) == Rejected(NumericsError, "sample on-3: NaN")


def test_workers_that_never_load_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(Script(load=lambda call: die(call.actor)))
    with pytest.raises(RunInterrupted, match=rf"no worker is left: {START_FAILURES} of them ended"):
        run(made(monkeypatch, ray), units(1))
    assert len(ray.actors) == START_FAILURES + 1


def test_one_that_cannot_load_leaves_the_others_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with too little memory for one more worker: the bound ends its replacements, not the run."""

    def load(call: Call) -> None:
        if call.actor is ray.actors[0]:
            answer(call, loaded())
        else:
            die(call.actor)

    ray = FakeRay(Script(load=load))
    assert len(run(made(monkeypatch, ray), units(*[1] * 20))) == 20
    assert len(ray.actors) <= 1 + START_FAILURES


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"model.weights": "bb"}, (), r"model\.weights: 'aa' on .*, 'bb' on .*\nGive all machines the same"),
        ({"model.weights": "bb"}, ("runtime.mixed_devices=true",), r"model\.weights"),
        ({"runtime.device_name": "NVIDIA H100"}, (), r"'NVIDIA H100' on .*\nRoundings differ .*mixed_devices=true"),
        ({"runtime.device_name": "NVIDIA H100"}, ("runtime.mixed_devices=true",), None),
    ],
)
def test_workers_that_compute_something_else_are_rejected(
    changes: dict[str, Any], overrides: tuple[str, ...], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(Script(load=lambda call: answer(call, loaded(**(changes if call.actor is ray.actors[1] else {})))))
    executor = made(monkeypatch, ray, *overrides)
    executor.load()
    if message is None:
        executor.wait_for_all()
    else:
        with pytest.raises(ConfigError, match=message):
            executor.wait_for_all()


def test_steps_of_units_under_way_are_reported_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, str, int]] = []

    def compute(call: Call) -> None:
        key = call.arguments[0].key
        (steps,) = call.actor.pending("steps")
        if ("begun", key) in heard_at:
            answer(call, FinishedUnit(call.arguments[0], {}, {}))
        else:
            heard_at.add(("begun", key))
            answer(steps, [(key, "teacher", 4), ("unit/of-before", "base", 4)])
            call.done = False

    heard_at: set[tuple[str, str]] = set()
    ray = FakeRay(Script(compute=compute))
    executor = made(monkeypatch, ray, workers=1)
    executor.load()
    executor.head_weights()
    assert len(list(executor.execute(units(2, 1), lambda *step: heard.append(step)))) == 2
    assert heard == [("unit/0", "teacher", 4), ("unit/1", "teacher", 4)]
