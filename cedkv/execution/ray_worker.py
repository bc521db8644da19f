"""A worker of a Ray cluster as the driver sees it, and whether two of them compute the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cedkv.checks.certificate import Certificate
from cedkv.core.errors import ConfigError
from cedkv.core.text import preview
from cedkv.execution.workload import PlannedUnit
from cedkv.models.fingerprint import DEVICE_KIND

KIND = (*DEVICE_KIND, "runtime.matmul")
"""What may differ between workers where ``runtime.mixed_devices`` is set: a kind of device, and how it multiplies."""


@dataclass(eq=False)
class RayWorker:
    """A worker.

    place: machine and process id, once it has answered. call: what it does besides units. units: those that it computes or
    will compute, in this order. steps: the call that returns when an arm begins.
    """

    actor: Any
    call: Any
    stage: Literal["starting", "importing", "waiting", "loading", "ready"] = "starting"
    place: tuple[str, int] = ("", 0)
    units: dict[Any, PlannedUnit] = field(default_factory=dict)
    steps: Any = None
    extensions: dict[str, str] = field(default_factory=dict)
    certificate: Certificate | None = None

    @property
    def name(self) -> str:
        return f"{self.place[0]} (process {self.place[1]})" if self.place[0] else "a machine that has not answered"

    @property
    def kind(self) -> tuple[Any, ...]:
        """Its kind of device, once it has loaded the model."""
        identity = {} if self.certificate is None else self.certificate.identity
        return tuple(identity.get(name) for name in DEVICE_KIND)


def check_same(one: tuple[str, dict[str, Any]], another: tuple[str, dict[str, Any]], mixed_devices: bool) -> None:
    """Raise ConfigError if two workers do not compute the same: other weights, code, versions, another kind of device.

    Args:
        one, another: a worker's name, and everything that what it computes depends on.
    """
    (first, expected), (other, found) = one, another
    differing = [name for name in dict.fromkeys([*expected, *found]) if expected.get(name) != found.get(name)]
    if mixed_devices:
        differing = [name for name in differing if name not in KIND]
    if differing:
        remedy = "Give all machines the same model and software"
        if set(differing) <= set(KIND):
            remedy = (
                "Roundings differ between kinds of device. Leave one kind out, or set runtime.mixed_devices=true: the run is "
                "then tagged with both, and the difference between them is measured"
            )
        lines = [f"{name}: {preview(expected.get(name), 100)} on {first}, {preview(found.get(name), 100)} on {other}"
                 for name in differing]  # fmt: skip
        raise ConfigError("workers do not compute the same:\n  " + "\n  ".join(lines) + f"\n{remedy}")
