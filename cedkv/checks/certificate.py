"""The certificate: this model, these weights, on this device, in these versions, gives right numbers here; or it does not.

Measured on first use and by ``python -m cedkv certify``; kept next to the model cache under everything it depends on, the
suite's own code included. What it cannot see: a configuration that lies about what no weight shows (a rope_theta, a window
taken away, heads cut otherwise) makes another model, which both sides of every check then compute alike.
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

import cedkv
from cedkv.checks.base import CheckResult, MeasuredCheck, all_checks, measured_checks
from cedkv.checks.probe import DEMOS, ProbeCheck, Probed, run_probe
from cedkv.config.extensions import KV_SOURCES
from cedkv.config.schema import KL_LIMIT, Phase2Config
from cedkv.core.errors import ModelError
from cedkv.core.files import write_text
from cedkv.kv.positioning import moves_keys
from cedkv.models.capabilities import unsupported_reason
from cedkv.models.loading import LanguageModel
from cedkv.models.smollm2 import cache_root

FOLDER = "CEDKV_CERTIFICATES"
"""Environment variable: another folder for certificates."""
CERTIFIED_CODE = ("core", "config", "metrics_phase2.py", "kv", "tasks", "selectors", "models", "inference", "checks")
"""What the probe computes with, packages and modules; a test holds that it imports nothing else of the suite."""
ROTATION = "rotation_equivariance"
"""The check that only gather at compact positions needs."""


@dataclass(frozen=True)
class Certificate:
    """What was found on one model.

    identity: all that it depends on. model: facts for a reader.
    floor, fault, effect: in nats, see ``probe.Probed``; None when the measurement broke off.
    broke: why the measurement broke off; None when it did not.
    can: (kv_source, positioning) -> None, or why not.
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
        """What stands against these configurations; all of it for none. The rotation counts only where keys have to move."""
        moves = not configs or any(_moves_cached_keys(config) for config in configs)
        found = [each.name for each in self.findings if each.verdict != "pass" and (moves or each.name != ROTATION)]
        return [self.broke] if self.broke is not None else found

    @property
    def certified(self) -> bool:
        """Everything holds. A rotation is not asked of a model whose keys cannot be moved: it is refused by name for that."""
        return not self.failed(())

    def require(self, configs: Sequence[Phase2Config]) -> None:
        """Refuse a model that fails, unless ``model.allow_uncertified`` is set.

        Raises:
            ModelError: what stands against these configurations, with all figures.
        """
        failed = self.failed(configs)
        if failed and not configs[0].model.allow_uncertified:
            raise ModelError(
                f"{self.model['model_id']} ({self.model['model_type']}) is not certified: {', '.join(failed)}\n{self.table()}\n"
                "Its numbers here would not be those of the model. Use another model or dtype (float32 is the most exact), or, "
                "to look into it, set model.allow_uncertified=true: the run is then tagged uncertified"
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON, with the verdicts written out."""
        findings = [
            {"name": f.name, "observed": _number(f.observed), "limit": f.limit, "unit": f.unit, "meaning": f.meaning, "n": f.n,
             "passes": f.verdict == "pass"}
            for f in self.findings
        ]  # fmt: skip
        return {**asdict(self), "certified": self.certified, "findings": findings}

    def heading(self) -> str:
        """The model in a few words."""
        m = self.model
        ropes = f" ({', '.join(m['rope_types'])})" if m["rope_types"] else ""
        limits = "; ".join([f"{m['max_positions']} positions", *m["limits"]])
        return (
            f"{m['model_id']}: {m['model_type']}, {m['torch_dtype']} on {m['device']}, {m['positions']} positions{ropes}, "
            f"{m['heads']}, {limits}"
        )

    def table(self) -> str:
        """The findings for a reader."""
        head = ("check", "observed", "limit", "verdict", "")
        rows = [
            (
                f.name,
                _short(f.observed),
                f"<= {_short(f.limit)} {f.unit}".rstrip(),
                "pass" if f.verdict == "pass" else "FAIL",
                f.meaning,
            )
            for f in self.findings
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
        if self.broke is not None:
            return f"the measurement broke off: {self.broke}"
        lines.append(
            f"numerical floor {_short(self.floor)} nats, the smallest planted fault {_short(self.fault)} nats, "
            f"the demo's effect {_short(self.effect)} nats"
        )
        limit = next((f.limit for f in self.findings if f.name == "left_alone"), None) or 0.0
        if self.fault is not None and self.fault < limit:
            lines.append(
                f"a position that is off by one, or a token missing, may hide below {_short(limit)} nats: rounding in "
                f"{self.model['torch_dtype']} is no finer; certify the model in float32 as well"
            )
        lines += [f"  {pair:<18} {reason or 'works'}" for pair, reason in self.can.items()]
        return "\n".join(lines)


def certify(lm: LanguageModel, prints: Mapping[str, Any], cache_dir: str | None) -> Certificate:
    """Measure a model, and keep what was found, a failure too; a measurement that broke off is not kept.

    Args:
        prints: of ``fingerprint``.
        cache_dir: ``model.cache_dir``.
    """
    began = time.perf_counter()
    probed: Probed | None = None
    broke = None
    try:
        probed = run_probe(lm)
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except Exception as error:
        broke = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    made = Certificate(
        identity=identity(lm, prints),
        model=_facts(lm),
        findings=tuple(_judge(lm, probed)) if probed is not None else (),
        floor=None if probed is None else _number(probed.floor),
        fault=None if probed is None else _number(probed.fault),
        effect=None if probed is None else _number(probed.effect),
        broke=broke,
        can=_can(lm),
        seconds=round(time.perf_counter() - began, 2),
    )
    if broke is None:
        _keep(made, cache_dir)
    return made


def ensure(lm: LanguageModel, prints: Mapping[str, Any], cache_dir: str | None) -> Certificate:
    """The certificate of a model: the one that is kept, or one measured now."""
    found = _kept(lm, prints, cache_dir)
    if found is None:
        click.echo("first use of this model here: checking it against itself ...", err=True)
        found = certify(lm, prints, cache_dir)
    return found


def identity(lm: LanguageModel, prints: Mapping[str, Any]) -> dict[str, Any]:
    """All that a certificate depends on, flat."""
    config = lm.model.config.to_json_string(use_diff=False)
    return {
        **prints,
        "model.id": lm.meta["model_id"],
        "model.revision": lm.meta["model_revision"],
        "model.config": hashlib.sha256(config.encode()).hexdigest(),
        "runtime.matmul": lm.meta["matmul"],
        "runtime.device_map": lm.meta["device_map"],
        "suite.code": _code(),
    }


def _facts(lm: LanguageModel) -> dict[str, Any]:
    able = lm.capabilities
    return {
        **{name: lm.meta[name] for name in ("model_id", "architecture", "parameters", "torch_dtype", "device")},
        "model_type": able.model_type,
        "positions": able.positions,
        "rope_types": list(able.rope_types),
        "heads": able.layout,
        "max_positions": able.max_positions,
        "limits": [limit.reason for limit in able.context_limits],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _judge(lm: LanguageModel, probed: Probed) -> list[CheckResult]:
    """Judge all figures. Limits are those of the dtype. In float32 they are also a tenth of a planted fault, where this model
    is so indifferent to its context that a fault makes less than ten times the limit: else a check could not fail."""
    dtype = lm.meta["torch_dtype"]
    nats = KL_LIMIT[dtype]
    if dtype == "float32":
        nats = min(nats, max(probed.fault / 10, 10 * probed.floor, 1e-10))
    defaults = Phase2Config.model_validate({"runtime": {"torch_dtype": dtype}})
    results = []
    for check in certificate_checks():
        if isinstance(check, ProbeCheck):
            name, limit = check.name, check.limit(dtype, nats)
        else:
            name, limit = check.observation, nats if check.unit == "nats" else check.limit(defaults)
        if name == ROTATION and lm.rope_layouts is None:  # rejected by name, see `can`
            continue
        result = check.result(probed.figures.get(name), limit, len(DEMOS))
        results.append(replace(result, gate=None, name=name))
    return results


def certificate_checks() -> list[ProbeCheck | MeasuredCheck]:
    """Return the checks that a certificate is made of: its own, then those of Gate A that it measures too."""
    own = [check for check in all_checks() if isinstance(check, ProbeCheck)]
    return [*own, *(check for check in measured_checks() if check.certified)]


def _can(lm: LanguageModel) -> dict[str, str | None]:
    found = {}
    for source in ("prefill", "gather"):
        for mode in ("compact", "absolute"):
            reason = unsupported_reason(lm.capabilities, source, mode)
            if reason is None and (source, mode) == ("gather", "compact") and lm.rope_layouts is None:
                reason = "the keys of this model did not follow any rotation known here"
            found[f"{source}, {mode}"] = reason
    return found


def _moves_cached_keys(config: Phase2Config) -> bool:
    """Return whether keys out of a demo's cache get other positions, for which the rotation must be known."""
    return KV_SOURCES.get(config.prefix.kv_source).reads_demo_cache and moves_keys(config.injection.positioning_mode)


def _code() -> str:
    """sha256 over the suite's own modules but for those that only present results: what they compute is what is certified."""
    digest = hashlib.sha256()
    root = Path(cedkv.__file__).parent
    paths = [root / name for name in CERTIFIED_CODE]
    for path in sorted(file for p in paths for file in ([p] if p.suffix else p.rglob("*.py"))):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _path(its: Mapping[str, Any], cache_dir: str | None) -> Path:
    digest = hashlib.sha256(json.dumps(its, sort_keys=True, default=str).encode()).hexdigest()
    folder = os.environ.get(FOLDER)
    return (Path(folder) if folder else cache_root(cache_dir) / "certificates") / f"{digest[:32]}.json"


def _keep(made: Certificate, cache_dir: str | None) -> None:
    path = _path(made.identity, cache_dir)
    try:
        write_text(path, json.dumps(made.as_dict(), indent=1, allow_nan=False, default=str) + "\n")
    except OSError as error:
        click.echo(f"the certificate could not be kept in {path}: {error}; it will be measured again next time", err=True)


def _kept(lm: LanguageModel, prints: Mapping[str, Any], cache_dir: str | None) -> Certificate | None:
    """What was found before on the very same model; None where nothing was, or it cannot be read."""
    its = identity(lm, prints)
    try:
        content = json.loads(_path(its, cache_dir).read_text(encoding="utf-8"))
        if content.pop("identity") != json.loads(json.dumps(its, default=str)):
            return None
        del content["certified"]
        findings = tuple(
            CheckResult(None, f["name"], f["observed"], "<=", f["limit"], f["n"], f["unit"], f["meaning"])
            for f in content.pop("findings")
        )
        return Certificate(identity=its, findings=findings, **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _short(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"
