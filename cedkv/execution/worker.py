"""A loaded model that computes units of a run, in the process that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from cedkv.checks import certificate
from cedkv.checks.certificate import Certificate, measurements_folder
from cedkv.core.values import Record
from cedkv.eval_phase2 import run_units
from cedkv.execution.workload import PlannedUnit, Workload
from cedkv.inference.head_weights import HeadWeights, ensure_head_weights, use_head_weights
from cedkv.inference.passes import check_loaded_readings
from cedkv.models import loading
from cedkv.models.devices import free_memory
from cedkv.models.fingerprint import fingerprint
from cedkv.models.opening import ModelSpec


@dataclass(frozen=True)
class ModelFacts:
    """What a run says of its loaded model.

    identity: of ``fingerprint``. meta: for the report. free_memory: bytes beside the weights on its card; None on no card.
    """

    identity: dict[str, Any]
    meta: dict[str, Any]
    free_memory: int | None = None

    @property
    def ran_on(self) -> dict[str, Any]:
        """Device, dtype, threads and versions that compute; stored with each unit."""
        return {name: value for name, value in self.identity.items() if name.startswith(("runtime.", "versions."))}


@dataclass(frozen=True)
class FinishedUnit:
    """A computed unit: the device that computed it, and the records of its conditions by their key."""

    planned: PlannedUnit
    ran_on: dict[str, Any]
    records: dict[str, list[Record]]


Step = Callable[[str, str, int], None]
"""Called when an arm of a unit begins: the unit's key, the arm's name, its number of evaluations (sample x arm)."""


class Executor(Protocol):
    """Where the units of a run are computed. The methods are called in the order in which they stand here."""

    @property
    def at_once(self) -> int:
        """How many units are computed at the same time, at most; known once the model is loaded."""

    def load(self) -> ModelFacts:
        """Load the model; raise ModelError if it cannot run the workload."""

    def certify(self) -> Certificate:
        """Return the model's certificate, which is measured on first use."""

    def head_weights(self) -> list[list[HeadWeights]]:
        """Return the weights of attention heads that each group needs, which are fitted on first use."""

    def execute(self, units: Sequence[PlannedUnit], step: Step) -> Iterator[FinishedUnit]:
        """Compute units; yield each when it is finished, in any order."""

    def on_every_kind(self, planned: PlannedUnit) -> list[FinishedUnit]:
        """Compute one unit on each kind of device that there is."""

    def close(self) -> None:
        """Free what computes."""


class Worker:
    """An executor that computes in this process, one unit after the other."""

    at_once = 1

    def __init__(self, work: Workload, spec: ModelSpec | None = None) -> None:
        """Make a worker; ``spec``: as of ``loading.load``."""
        self._work, self._spec = work, spec
        self._fitted: list[list[HeadWeights]] = []
        self._group: int | None = None  # whose head weights the model has
        self._threads_before = torch.get_num_threads()

    def load(self) -> ModelFacts:
        """See ``Executor``."""
        self.lm = loading.load(self._work.config, self._spec)
        for config in self._work.configs:
            loading.check_loaded(self.lm, config)
        check_loaded_readings(self.lm, self._work.configs)
        self.facts = ModelFacts(fingerprint(self.lm), self.lm.meta, free_memory(self.lm.device))
        return self.facts

    def certify(self) -> Certificate:
        """See ``Executor``."""
        self._certificate = certificate.ensure_certificate(self.lm, self.facts.identity, self._work.config.model.cache_dir)
        return self._certificate

    def head_weights(self) -> list[list[HeadWeights]]:
        """See ``Executor``."""
        folder = measurements_folder(self._work.config.model.cache_dir, "head_weights")
        identity = self._certificate.identity
        self.use([ensure_head_weights(self.lm, group.configs, identity, folder) for group in self._work.groups])
        return self._fitted

    def use(self, fitted: list[list[HeadWeights]]) -> None:
        """Compute with these weights of attention heads: what ``head_weights`` of one worker gives, for all of them."""
        self._fitted, self._group = fitted, None

    def execute(self, units: Sequence[PlannedUnit], step: Step) -> Iterator[FinishedUnit]:
        """See ``Executor``."""
        for planned in units:
            yield self.compute(planned, step)

    def compute(self, planned: PlannedUnit, step: Step) -> FinishedUnit:
        """Return a unit's records."""
        group = self._work.groups[planned.group]
        if planned.group != self._group:
            use_head_weights(self.lm, group.configs, self._fitted[planned.group])
            self._group = planned.group
        announce = partial(step, planned.key)
        ((_, records),) = run_units(self.lm, group.conditions, group.samples, [planned.unit], self._work.phase, announce)
        return FinishedUnit(planned, self.facts.ran_on | self.lm.batching.halved, records)

    def on_every_kind(self, planned: PlannedUnit) -> list[FinishedUnit]:
        """See ``Executor``."""
        return [self.compute(planned, lambda *_: None)]

    def close(self) -> None:
        """See ``Executor``; torch gets the number of threads back that it had."""
        torch.set_num_threads(self._threads_before)
