"""Ray as ``RayWorkers`` sees it, in this process: actors that answer when a test lets them, so that any order can be tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from cedkv.execution.ray_cluster import Node


class RayError(Exception):
    """What ``ray.get`` raises of an actor that has died."""


@dataclass(eq=False)
class Call:
    """A call of an actor's method, which is pending until the test answers it."""

    actor: Actor
    method: str
    arguments: tuple[Any, ...]
    answer: Any = None
    done: bool = False


@dataclass(eq=False)
class Actor:
    """An actor: the options that it was made with, its calls in their order, and whether it was killed."""

    options: dict[str, Any]
    calls: list[Call] = field(default_factory=list)
    killed: bool = False

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Call:
            call = Call(self, method, arguments)
            self.calls.append(call)
            return call

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))

    def pending(self, method: str) -> list[Call]:
        return [call for call in self.calls if call.method == method and not call.done]


class FakeRay:
    """``decide`` is called whenever the driver waits, and answers one call or several (``answer``, ``die``)."""

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self, decide: Callable[[FakeRay], None]) -> None:
        self.actors: list[Actor] = []
        self._decide = decide

    def remote(self, **_: Any) -> Any:
        def make(**options: Any) -> Any:
            def start() -> Actor:
                self.actors.append(Actor(options))
                return self.actors[-1]

            return SimpleNamespace(remote=start)

        return lambda cls: SimpleNamespace(options=make)

    def put(self, value: Any) -> Any:
        return value

    def wait(self, calls: Sequence[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        if not any(call.done for call in calls):
            self._decide(self)
        return [call for call in calls if call.done][:num_returns], []

    def get(self, call: Call) -> Any:
        if isinstance(call.answer, Exception):
            raise call.answer
        return call.answer

    def kill(self, actor: Actor, no_restart: bool) -> None:
        actor.killed = True

    @property
    def alive(self) -> list[Actor]:
        return [actor for actor in self.actors if not actor.killed]


def answer(call: Call, value: Any = None) -> None:
    call.answer, call.done = value, True


def die(actor: Actor) -> None:
    """Let all that an actor has not answered fail."""
    for call in actor.calls:
        if not call.done:
            answer(call, RayError("the worker died"))


@dataclass
class FakeCluster:
    """A cluster of one machine."""

    ray: FakeRay
    cpus: int = 8
    cards: int = 0
    local: bool = False
    remote: bool = False

    @property
    def nodes(self) -> list[Node]:
        return [Node(self.cpus, self.cards)]

    def close(self) -> None:
        """Nothing to close."""
