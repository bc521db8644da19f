"""Runs and certificates of a tiny model, and the verdict of every registered check on them, by the check's key.

Right answers are dealt out. A model of random weights learns nothing from a demo, so the answer of every sample is declared to
be the greedy token of its teacher: the figures are then those of a model that does know the answer once it has read the demo.
Nothing else is replaced: all arms are computed by the engine.

Gate B says whether selection helps, so it is judged under ``LEARNED`` alone, where select keeps the whole demo. Select then is
the teacher (relative KL 0), base answers something else, and four of the five checks pass by a wide margin. The fifth, the
effect on OFF prompts, is large on random weights; its limit is 1% above the figure of the run without a fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cedkv.analysis.results import Records, collect
from cedkv.checks.base import CHECKS, Check, MeasuredCheck, RunRecords, all_checks
from cedkv.checks.certificate import FOLDER, certificate_checks, certify
from cedkv.conditions import Condition
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record
from cedkv.eval_phase2 import run_units
from cedkv.metrics_phase2 import run_metrics
from cedkv.models.fingerprint import fingerprint
from cedkv.models.loading import LanguageModel
from cedkv.tasks.load import load_samples
from cedkv.units import plan_samples
from tests.mutation.planted import Patch
from tests.support import tiny

Overrides = tuple[str, ...]
LEARNED: Overrides = ("select.mode=full_demo", "thresholds.rel_kl_to_teacher_max=0.5")
"""Select keeps everything, and has to be nearer to the teacher (0) than to base (1)."""


@dataclass(frozen=True)
class Reference:
    """What a run without a fault says.

    answers: sample id -> greedy token of the teacher.
    off_delta_p99: 99th percentile of KL(select || base) over OFF prompts, in nats.
    """

    answers: Mapping[str, int]
    off_delta_p99: float


def reference(folder: Path) -> Reference:
    """Run a model without a fault; call before a fault is planted."""
    _, records = _run(folder, LEARNED, {})
    off_delta_p99 = run_metrics(records.on, records.off)["phase2_off_delta_p99_select"]
    assert off_delta_p99 is not None
    return Reference({record["sample_id"]: record["token_teacher"] for record in records.on}, off_delta_p99)


def run_verdicts(folder: Path, overrides: Overrides, without_fault: Reference) -> dict[str, str]:
    """Return the verdict of every check of Gate A on a small run, of Gate B and preconditions under ``LEARNED``; by key."""
    limit = f"thresholds.off_delta_p99_max={1.01 * without_fault.off_delta_p99}"
    config, records = _run(folder, (*overrides, limit), without_fault.answers)
    metrics = run_metrics(records.on, records.off)
    run = RunRecords(config, records.on, records.off, records.plumbing, records.repro, metrics)
    gates = ("A", "B", "precondition") if overrides == LEARNED else ("A",)
    results = {check.key: check.judge(run) for check in all_checks() if check.gate in gates}
    return {key: result.verdict for key, result in results.items() if result is not None}


def certificate_verdicts(folder: Path, certificates: Path, patch: Patch) -> dict[str, str]:
    """Return the verdict of every finding of a certificate; by key.

    Args:
        certificates: where it is kept, so that no other test takes a model with a fault for this one.
    """
    patch.setenv(FOLDER, str(certificates))
    _, lm = _load(folder)
    certificate = certify(lm, fingerprint(lm), None)
    assert certificate.broke is None
    return {f"certificate.{finding.name}": finding.verdict for finding in certificate.findings}


def builtin_keys() -> set[str]:
    """Return the keys of all built-in checks; one that the certificate measures too has two: of its gate and of its finding."""
    keys = {check.key for check in all_checks() if check.key in CHECKS.builtin}
    return keys | {_finding_key(check) for check in certificate_checks() if check.key in CHECKS.builtin}


def _finding_key(check: Check) -> str:
    return f"certificate.{check.observation if isinstance(check, MeasuredCheck) else check.name}"


def _load(folder: Path, *overrides: str) -> tuple[Phase2Config, LanguageModel]:
    """Load a model for units of 4 samples, and for passes of more rows, which some checks need for a unit."""
    config, lm = tiny.load(folder, *overrides)
    lm.batching.max_rows = 32
    return config, lm


def _run(folder: Path, overrides: Overrides, answers: Mapping[str, int]) -> tuple[Phase2Config, Records]:
    """Run the engine with other right answers."""
    config, lm = _load(folder, *overrides)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    more = slice(3 if config.data.answer == "whole" else 0)  # answers of one to four tokens
    on = [
        replace(s, answer_token_ids=(answers.get(s.sample_id, s.answer_token_id), *s.demo_token_ids[5 : 5 + i % 4][more]))
        for i, s in enumerate(samples.on)
    ]
    samples, conditions = replace(samples, on=on), [Condition("run", config)]
    units = plan_samples(conditions, samples, "2")
    records: list[Record] = []
    for _, by_condition in run_units(lm, conditions, samples, units, "2", lambda *_: None):
        records += by_condition["run"]
    return config, collect(records)
