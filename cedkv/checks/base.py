"""What a check is: one object with its name, unit, limit, meaning, and what it is used for. All of them by name.

Gate A, Gate B, the preconditions, the certificate, the tags, docs/gates.md and the mutation table go through ``checks``: a new
check is a class and its line in ``BUILTIN``, or an entry point ``cedkv.checks`` of another package.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch

from cedkv.checks.builtin import BUILTIN
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.registry import Registry
from cedkv.core.values import Evidence, OffSample, OnSample, Placement, Record, Selection
from cedkv.inference.batch import Batch
from cedkv.kv.cache import KVPrefix
from cedkv.metrics_phase2 import largest
from cedkv.models.loading import LanguageModel

T = TypeVar("T")
Gate = Literal["A", "B", "precondition"]
Verdict = Literal["pass", "fail", "insufficient"]

CHECKS: Registry[Any] = Registry(
    "check",
    "cedkv.checks",
    BUILTIN,
    base="cedkv.checks.base:Check",
)
"""All checks, by the keys of ``BUILTIN``."""


@dataclass(frozen=True)
class CheckResult:
    """A check and what was observed: ``observed <relation> limit``, over ``n`` samples. ``gate`` is None in a certificate.

    Attributes:
        note: what follows from a result that is not a pass, and what to do; empty where there is nothing to add.
        resolves: what n can resolve, in a sentence; empty where one sample is enough to fail.
        decides: False where the observed value decides nothing, however it stands to the limit; ``note`` says why.
    """

    gate: Gate | None
    name: str
    observed: float | None
    relation: Literal["<=", ">="]
    limit: float | None
    n: int
    unit: str
    meaning: str
    note: str = ""
    decides: bool = True
    resolves: str = ""

    @property
    def tag(self) -> str:
        """The tag of a run that holds the verdict: ``gateB.on_gain``, and of a precondition its name."""
        return self.name if self.gate == "precondition" else f"gate{self.gate}.{self.name}"

    @property
    def verdict(self) -> Verdict:
        """``insufficient``, which is never a pass, where nothing finite was observed, there is no finite limit, or the
        observed value does not decide.
        """
        if not self.decides or self.n < 1 or self.observed is None or self.limit is None:
            return "insufficient"
        if not (math.isfinite(self.observed) and math.isfinite(self.limit)):
            return "insufficient"
        holds = self.observed <= self.limit if self.relation == "<=" else self.observed >= self.limit
        return "pass" if holds else "fail"


@dataclass(frozen=True)
class CheckInputs:
    """What the arms computed for B samples: what measured checks compare with. Log-probabilities are (B, vocabulary).

    Attributes:
        owners: the samples whose demos the prefixes are of (others than ``samples`` only where the selector uses partners);
            selections, evidence, placements and prefix are theirs.
        demo: the samples' demo caches, demo token t in slot t.
        untouched: copies of the demo caches and of the prefixes, made before any arm has run over them.
        cached: returns a value by key, computed once for all conditions of the batch.
        answers: teacher, select -> (B, most answer tokens) log-probabilities of the tokens of the samples' answers
            (``inference.answers.Answers.tokens``); empty where no answers were read.
        off: (row, OFF prompt that runs under the row's prefix, its (vocabulary,) log-probabilities); given to checks
            ``of_off_prompts`` only.
        off_further: the same prompts, where base's own answer has a token: (row, OFF prompt, the answer's tokens,
            KL(select || base) after each of them).
        alone: runs the teacher on one sample in a batch of its own.
    """

    samples: Sequence[OnSample]
    owners: Sequence[OnSample]
    base: torch.Tensor
    teacher: torch.Tensor
    select: torch.Tensor
    demo: KVPrefix
    placements: Sequence[Placement]
    prefix: KVPrefix
    untouched: Sequence[KVPrefix]
    cached: Callable[[Any, Callable[[], Any]], Any]
    alone: Callable[[OnSample], Batch]
    selections: Sequence[Selection] = ()
    evidence: Sequence[Evidence] = ()
    answers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    off: Sequence[tuple[int, OffSample, torch.Tensor]] = ()
    off_further: Sequence[tuple[int, OffSample, tuple[int, ...], list[float]]] = ()
    _own_cache: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Sample ids."""
        return [sample.sample_id for sample in self.samples]

    @property
    def queries(self) -> list[tuple[int, ...]]:
        """Token ids of the queries."""
        return [sample.query_token_ids for sample in self.samples]

    def cached_here(self, key: str, compute: Callable[[], T]) -> T:
        """Return a value by key, computed once for this condition: for checks that share a measurement."""
        if key not in self._own_cache:
            self._own_cache[key] = compute()
        value: T = self._own_cache[key]
        return value


@dataclass(frozen=True)
class RunRecords:
    """What the gates decide from: the records of a finished run and its metrics.

    Attributes:
        on: ``OnRecord`` per ON sample.
        off: ``OffRecord`` per OFF prompt.
        plumbing: the measured checks' observations, one record per checked sample.
        repro: whether a sample was answered in a repetition, one record per sample and repetition.
        metrics: of ``run_metrics``; names of the MLflow metrics.
    """

    config: Phase2Config
    on: Sequence[Record] = ()
    off: Sequence[Record] = ()
    plumbing: Sequence[Record] = ()
    repro: Sequence[Record] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)

    @cached_property
    def floor(self) -> float | None:
        """The numerical floor in nats: the largest KL between two mathematically identical computations."""
        values = [largest(self.plumbing, name) for name in floor_observations()]
        seen = [value for value in values if value is not None]
        return max(seen) if seen and all(math.isfinite(value) for value in seen) else None


class Check(ABC):
    """One named comparison with a limit; the first line of a subclass's docstring is its meaning.

    Attributes:
        gate: the gate it belongs to, or ``precondition``, which is part of no gate: where it does not hold, the gates say less
            than they seem to. None for a check of the certificate alone.
        name: unique in its gate.
        unit: of observed value and limit.
        threshold: key of ``thresholds`` that sets the limit; empty where the limit is fixed.
        relation: how the observed value must stand to the limit.
    """

    gate: ClassVar[Gate | None]
    name: ClassVar[str]
    unit: ClassVar[str]
    threshold: ClassVar[str] = ""
    relation: ClassVar[Literal["<=", ">="]] = "<="

    @property
    def meaning(self) -> str:
        """What is compared, in one line."""
        return (inspect.getdoc(type(self)) or self.name).splitlines()[0].rstrip(".")

    @property
    def key(self) -> str:
        """Its name among all checks: ``gateA.null_effect``."""
        if self.gate is None:
            return f"certificate.{self.name}"
        return f"{self.gate if self.gate == 'precondition' else f'gate{self.gate}'}.{self.name}"

    @abstractmethod
    def judge(self, run: RunRecords) -> CheckResult | None:
        """Return the result of a finished run; None where the check does not apply to it."""

    def result(self, observed: float | None, limit: float | None, n: int) -> CheckResult:
        """Return what was observed over n samples, with the rest of the check."""
        return CheckResult(self.gate, self.name, observed, self.relation, limit, n, self.unit, self.meaning)


class MeasuredCheck(Check):
    """A check of Gate A that is measured on the model, one value per sample; the largest one decides.

    Attributes:
        observation: name of the value in the records; the check's own by default.
        counts_to_floor: its two sides are mathematically identical, so its largest KL is part of the numerical floor.
        certified: the certificate measures it too, on its probe.
        of_off_prompts: it compares OFF prompts, and is measured on some of every unit; other checks are measured on the first
            ``eval.gate_a_samples`` ON samples.
        of_every_unit: it is also measured on one ON sample of each unit that has none of these.
    """

    gate = "A"
    unit: ClassVar[str] = "nats"
    observation: ClassVar[str] = ""
    counts_to_floor: ClassVar[bool] = False
    certified: ClassVar[bool] = False
    of_off_prompts: ClassVar[bool] = False
    of_every_unit: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.observation = str(vars(cls).get("observation") or getattr(cls, "name", ""))

    @abstractmethod
    def observe(self, lm: LanguageModel, config: Phase2Config, inputs: CheckInputs) -> Sequence[float | None] | None:
        """Return one value per sample, None where a sample has nothing to observe; None where the whole batch has not."""

    def limit(self, config: Phase2Config) -> float:
        """Return the limit that the threshold sets (null: by dtype), in ``unit``; overridden where it is fixed."""
        return config.kl_limit(self.threshold)

    def expected(self, config: Phase2Config) -> bool:
        """Return whether a run must have observations; where it need not and has none, the check does not apply."""
        return True

    def judge(self, run: RunRecords) -> CheckResult | None:
        n = sum(self.observation in record for record in run.plumbing)
        if n == 0 and not self.expected(run.config):
            return None
        return self.result(largest(run.plumbing, self.observation), self.limit(run.config), n)


def relative(difference: float, scale: float) -> float:
    """Return a difference over a scale: 0 where both sides agree to the last bit, be they zeros; infinite over zeros else."""
    return difference / scale if scale else 0.0 if difference == 0 else math.inf * difference


def all_checks() -> list[Check]:
    """Return every check, built-in ones first.

    Raises:
        ConfigError: two checks of the same gate have the same name, one is registered under another name than its own, has no
            limit, or cannot be imported.
    """
    checks: dict[str, Check] = {}
    for name in CHECKS.names():
        check: Check = CHECKS.get(name)()
        if check.key in checks:
            raise ConfigError(f"check {name!r} of {CHECKS.provider(name)} calls itself {check.key}, which exists; rename it")
        if check.key != name:
            raise ConfigError(
                f"check {name!r} of {CHECKS.provider(name)} calls itself {check.key}: its tag would be another; name both alike"
            )
        if isinstance(check, MeasuredCheck) and not check.threshold and type(check).limit is MeasuredCheck.limit:
            raise ConfigError(f"check {name!r} of {CHECKS.provider(name)} has neither a threshold nor a limit of its own")
        checks[check.key] = check
    return list(checks.values())


def check_providers() -> dict[str, str]:
    """Return who provides the checks that are not built in: ``extension.<name>`` -> ``distribution version``."""
    all_checks()  # a check that cannot be imported is rejected before anything is computed
    return {f"extension.{name}": str(CHECKS.provider(name)) for name in CHECKS.external()}


def check_sources() -> dict[str, str]:
    """Return the digests of modules that provide checks that are not built in: ``code.<name>`` -> sha256."""
    return {f"code.{name}": digest for name in CHECKS.external() if (digest := CHECKS.source(name)) is not None}


def measured_checks() -> list[MeasuredCheck]:
    """Return the checks that are measured on the model during a run."""
    return [check for check in all_checks() if isinstance(check, MeasuredCheck)]


def floor_observations() -> list[str]:
    """Return the names of the observations whose largest KL is the numerical floor."""
    return [check.observation for check in measured_checks() if check.counts_to_floor]


def run_checks(
    lm: LanguageModel, config: Phase2Config, inputs: CheckInputs, checks: Sequence[MeasuredCheck] | None = None
) -> dict[str, Sequence[float | None]]:
    """Measure a batch: observation -> one value per sample, for every check that has something to observe.

    Args:
        checks: those to run; None for all.

    Raises:
        ConfigError: a check of another package gives another number of values than there are samples.
    """
    observed: dict[str, Sequence[float | None]] = {}
    for check in measured_checks() if checks is None else checks:
        with CHECKS.errors_named(check.key):
            values = check.observe(lm, config, inputs)
            if values is None:
                continue
            values = [None if value is None else float(value) for value in values]
        if len(values) != len(inputs.samples):
            raise ConfigError(f"check {check.key} gives {len(values)} values for {len(inputs.samples)} samples; one per sample")
        observed[check.observation] = values
    return observed
