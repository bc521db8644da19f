"""The certificate: whether this suite computes the model's own numbers, for these weights, device and versions.

A certificate is measured on first use and by ``python -m cedkv certify``, and stored next to the model cache under the digest
of everything it depends on, the suite's own code included. It cannot detect a configuration that is wrong about something no
weight shows (``rope_theta``, a missing attention window, another split into heads): such a configuration defines another
model, and both sides of every check compute that model alike.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from cedkv.checks.base import CheckResult, MeasuredCheck, all_checks, measured_checks
from cedkv.checks.probe import DEMOS, ProbeCheck, Probed, faults_of, run_probe
from cedkv.config.extensions import KV_SOURCES, POSITIONING
from cedkv.config.schema import KL_LIMIT, Phase2Config
from cedkv.core.errors import ModelError
from cedkv.core.files import finite_or_none, write_shared_text
from cedkv.core.source import CERTIFIED_CODE, code_digest
from cedkv.core.text import number, one_line
from cedkv.kv.positioning import moves_cached_keys
from cedkv.models.capabilities import unsupported_reason
from cedkv.models.fingerprint import model_names
from cedkv.models.loading import LanguageModel
from cedkv.models.model_cache import cache_root

FOLDER = "CEDKV_CERTIFICATES"
"""Environment variable that names another folder for certificates and fitted head weights."""
ROTATION = "rotation_equivariance"
"""The check that matters only where cached keys are moved: ``gather`` at ``compact`` positions."""
LEAST_FAULT = 1e-10
"""Nats; what moves the output by less moves nothing, also where rounding moves nothing either."""
_NAMED = 8
"""How many doubtful weights a certificate's table names."""
_STORED = ("name", "observed", "limit", "unit", "meaning", "n")
"""Fields of a ``CheckResult`` that are stored."""


@dataclass(frozen=True)
class Certificate:
    """The results of all checks on one model.

    identity: everything the results depend on. model: facts about the model, for reports.
    floor, fault, effect: in nats, see ``probe.Probed``; None when the measurement ended with an error.
    broke: the error that ended the measurement; None when there was none.
    can: (kv_source, positioning) -> None where the model supports the pair, else the reason why not.
    """

    identity: dict[str, Any]
    model: dict[str, Any]
    findings: tuple[CheckResult, ...]
    floor: float | None
    fault: float | None
    effect: float | None
    broke: str | None
    can: dict[str, str | None]
    seconds: float

    def failed(self, configs: Sequence[Phase2Config]) -> list[str]:
        """Return the names of the failed checks that matter for these configurations, or the error of the measurement.

        Args:
            configs: configurations to run; none for all checks. ``ROTATION`` matters only where cached keys are moved.
        """
        if self.broke is not None:
            return [self.broke]
        if self.undecided is not None:
            return [self.undecided]
        skipped = (
            None
            if not configs
            or any(moves_cached_keys(config.prefix.kv_source, config.injection.positioning_mode) for config in configs)
            else ROTATION
        )
        return [check.name for check in self.findings if check.verdict != "pass" and check.name != skipped]

    @property
    def undecided(self) -> str | None:
        """Why no check could have failed: a planted fault moves the output by no more than rounding does; None if it does."""
        exact = self.model["torch_dtype"] == "float32"  # limits are then ten times the floor or more, see _judge
        if self.fault is not None and self.fault > max((10 if exact else 1) * (self.floor or 0.0), LEAST_FAULT):
            return None
        return (
            f"cannot be decided: a planted fault moves the output by {number(self.fault, 3)} nats, and rounding by "
            f"{number(self.floor, 3)}"
        )

    @property
    def certified(self) -> bool:
        """True if every check passes; ``ROTATION`` is not measured on a model whose keys cannot be moved (see ``can``)."""
        return not self.failed(())

    def check(self, configs: Sequence[Phase2Config]) -> None:
        """Reject a model that fails, unless ``model.allow_uncertified`` is set.

        Raises:
            ModelError: a check that matters for these configurations failed; the message has all observed values.
        """
        failed = self.failed(configs)
        if failed and not configs[0].model.allow_uncertified:
            raise ModelError(
                f"{self.model['model_id']} ({self.model['model_type']}) is not certified: {', '.join(failed)}\n{self.table()}\n"
                "Its numbers here would not be those of the model. Use another model or dtype (float32 is the most exact), or, "
                "to look into it, set model.allow_uncertified=true: the run is then tagged uncertified"
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Certificate:
        """Return the certificate that ``as_dict`` wrote. Raises KeyError, TypeError: the content is none."""
        fields = {name: value for name, value in content.items() if name not in ("certified", "findings")}
        stored = [{name: finding[name] for name in _STORED} for finding in content["findings"]]
        return cls(findings=tuple(CheckResult(gate=None, relation="<=", **finding) for finding in stored), **fields)

    def as_dict(self) -> dict[str, Any]:
        """Return the certificate as JSON values, with the verdicts written out."""
        findings = [
            {**{name: finite_or_none(getattr(check, name)) for name in _STORED}, "passes": check.verdict == "pass"}
            for check in self.findings
        ]
        return {**asdict(self), "certified": self.certified, "findings": findings}

    def heading(self) -> str:
        """Return one line that describes the model."""
        facts = self.model
        rope_types = f" ({', '.join(facts['rope_types'])})" if facts["rope_types"] else ""
        limits = "; ".join([f"{facts['max_positions']} positions", *facts["limits"]])
        return (
            f"{facts['model_id']}: {facts['model_type']}, {facts['torch_dtype']} on {facts['device']}, "
            f"{facts['positions']} positions{rope_types}, {facts['heads']}, {limits}"
        )

    def table(self) -> str:
        """Return the results as a table in plain text, or the error that ended the measurement."""
        faults = self.model["weight_faults"]
        stated = [*self.model["notes"], *faults[:_NAMED], *([f"and {len(faults) - _NAMED} more"] if faults[_NAMED:] else [])]
        if self.broke is not None:
            return "\n".join([f"the measurement ended with an error: {self.broke}", *stated])
        rows = [("check", "observed", "limit", "verdict", "")]
        for check in self.findings:
            limit = f"<= {number(check.limit, 3)} {check.unit}".rstrip()
            verdict = "pass" if check.verdict == "pass" else "FAIL"
            rows.append((check.name, number(check.observed, 3), limit, verdict, check.meaning))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(
            f"numerical floor {number(self.floor, 3)} nats, the smallest planted fault {number(self.fault, 3)} nats, "
            f"the demo's effect {number(self.effect, 3)} nats"
        )
        kl_limit = next((check.limit for check in self.findings if check.name == "left_alone"), None) or 0.0
        if self.fault is not None and self.fault < kl_limit:
            lines.append(
                f"a position that is off by one, or a missing token, may hide below {number(kl_limit, 3)} nats: rounding in "
                f"{self.model['torch_dtype']} is no finer; certify the model in float32 as well"
            )
        lines += [*stated, *([self.undecided] if self.undecided is not None else [])]
        lines += [f"  {pair:<18} {reason or 'works'}" for pair, reason in self.can.items()]
        return "\n".join(lines)


def certify(lm: LanguageModel, fingerprint: Mapping[str, Any], cache_dir: str | None) -> Certificate:
    """Measure a model and store the certificate, also of a model that fails, but not of a measurement that ended with an error.

    Faults of the machine (out of memory, OSError) are raised: they say nothing about the model.

    Args:
        fingerprint: as ``models.fingerprint.fingerprint`` returns it.
        cache_dir: ``model.cache_dir``.
    """
    started = time.perf_counter()
    probed: Probed | None = None
    broke = None
    try:
        probed = run_probe(lm)
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except Exception as error:
        broke = one_line(f"{type(error).__name__}: {error}")
    certificate = Certificate(
        identity=identity(lm, fingerprint),
        model=_facts(lm),
        findings=tuple(_judge(lm, probed)) if probed is not None else (),
        floor=None if probed is None else finite_or_none(probed.floor),
        fault=None if probed is None else finite_or_none(probed.fault),
        effect=None if probed is None else finite_or_none(probed.effect),
        broke=broke,
        can=_supported_pairs(lm),
        seconds=round(time.perf_counter() - started, 2),
    )
    if broke is None:
        _store(certificate, cache_dir)
    return certificate


def ensure_certificate(lm: LanguageModel, fingerprint: Mapping[str, Any], cache_dir: str | None) -> Certificate:
    """Return the stored certificate of a model, or measure one; arguments and errors as in ``certify``."""
    certificate = _load(lm, fingerprint, cache_dir)
    if certificate is None:
        click.echo("first use of this model here: checking it against itself ...", err=True)
        certificate = certify(lm, fingerprint, cache_dir)
    return certificate


def identity(lm: LanguageModel, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything a certificate depends on, flat."""
    config = lm.model.config.to_json_string(use_diff=False)
    return {
        **fingerprint,
        **model_names(lm),
        "model.config": hashlib.sha256(config.encode()).hexdigest(),
        "runtime.matmul": lm.meta["matmul"],
        "runtime.device_map": lm.meta["device_map"],
        "suite.code": code_digest(CERTIFIED_CODE),
    }


def _facts(lm: LanguageModel) -> dict[str, Any]:
    capabilities = lm.capabilities
    return {
        **{name: lm.meta[name] for name in ("model_id", "architecture", "parameters", "torch_dtype", "device")},
        "model_type": capabilities.model_type,
        "positions": capabilities.positions,
        "rope_types": list(capabilities.rope_types),
        "heads": capabilities.layout,
        "max_positions": capabilities.max_positions,
        "limits": [limit.reason for limit in capabilities.context_limits],
        "notes": list(lm.meta["config_notes"]),
        "weight_faults": faults_of(lm),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _judge(lm: LanguageModel, probed: Probed) -> list[CheckResult]:
    """Return the results of all checks on the probe's figures; limits are those of the dtype.

    In float32 a limit is also at most a tenth of the smallest planted fault: on a model that hardly reacts to its context a
    fault may change the output by less than the usual limit, and no check could then fail.
    """
    dtype = lm.meta["torch_dtype"]
    kl_limit = KL_LIMIT[dtype]
    if dtype == "float32":
        kl_limit = min(kl_limit, max(probed.fault / 10, 10 * probed.floor, 1e-10))
    defaults = Phase2Config.model_validate({"runtime": {"torch_dtype": dtype}})
    results = []
    for check in certificate_checks():
        if isinstance(check, ProbeCheck):
            name, limit = check.name, check.limit(dtype, kl_limit)
        else:
            name, limit = check.observation, kl_limit if check.unit == "nats" else check.limit(defaults)
        if name == ROTATION and lm.rope_layouts is None:  # such a configuration is rejected by name, see `can`
            continue
        if probed.figures.get(name, math.nan) is None:
            continue
        result = check.result(probed.figures.get(name), limit, len(DEMOS))
        results.append(replace(result, gate=None, name=name))
    return results


def certificate_checks() -> list[ProbeCheck | MeasuredCheck]:
    """Return the checks that a certificate consists of: probe checks, then those of Gate A that it measures too."""
    probe_checks = [check for check in all_checks() if isinstance(check, ProbeCheck)]
    return [*probe_checks, *(check for check in measured_checks() if check.certified)]


def _supported_pairs(lm: LanguageModel) -> dict[str, str | None]:
    """Return ``Certificate.can``."""
    reasons = {}
    for source in KV_SOURCES.builtin:
        for mode in POSITIONING.builtin:
            reason = unsupported_reason(lm.capabilities, source, mode)
            if reason is None and moves_cached_keys(source, mode) and lm.rope_layouts is None:
                reason = "the keys of this model did not follow any rotation known here"
            reasons[f"{source}, {mode}"] = reason
    return reasons


def _path(identity: Mapping[str, Any], cache_dir: str | None) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return measurements_folder(cache_dir, "certificates") / f"{digest[:32]}.json"


def measurements_folder(cache_dir: str | None, kind: str) -> Path:
    """Return where what was measured on models is kept; ``kind`` is ``certificates`` or ``head_weights``."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else cache_root(cache_dir) / kind


def _store(certificate: Certificate, cache_dir: str | None) -> None:
    path = _path(certificate.identity, cache_dir)
    try:
        write_shared_text(path, json.dumps(certificate.as_dict(), indent=1, allow_nan=False, default=str) + "\n")
    except OSError as error:
        click.echo(f"the certificate could not be stored in {path}: {error}; it will be measured again next time", err=True)


def _load(lm: LanguageModel, fingerprint: Mapping[str, Any], cache_dir: str | None) -> Certificate | None:
    """Return the stored certificate with the identity of this model; None where there is none, or it is not readable."""
    expected = identity(lm, fingerprint)
    try:
        content = json.loads(_path(expected, cache_dir).read_text(encoding="utf-8"))
        if content["identity"] != json.loads(json.dumps(expected, default=str)):
            return None
        return Certificate.from_dict({**content, "identity": expected})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
