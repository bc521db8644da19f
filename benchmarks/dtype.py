"""bfloat16 against float32: how fast bare forwards are, what the numerical floor is, and what it does to results."""

from __future__ import annotations

from typing import Any

from benchmarks.common import Row, engine, loaded, median_ratio, paired, part, quickstart, row
from benchmarks.forward import bare
from benchmarks.machine import NATIVE, flags
from cedkv.checks.base import RunRecords
from cedkv.config.schema import KL_LIMIT
from cedkv.core.values import Record
from cedkv.metrics_phase2 import run_metrics

PAIRS, SAMPLES, SLOW = 3, 16, 4
"""Pairs of bare calls; ON samples, and how many where bfloat16 is slow."""
ACCURACY = "phase2_on_acc_"
KL = {"phase2_rel_kl_to_teacher_select": "rel_kl_to_teacher", "phase2_off_delta_p99_select": "off_delta_p99 (nats)",
      "phase2_delta_on_mean_select": "delta_on (nats)"}  # fmt: skip


def rows(pairs: int = PAIRS, samples: int | None = None, plumbed: int = 2) -> list[Row]:
    """Speed has a target where the processor has instructions for bfloat16; the floor's is Gate A's limit for its dtype."""
    full, every = loaded()
    half, _ = loaded("bfloat16")
    lengths = [64] * 24
    for lm in (full, half):
        bare(lm, lengths[:8], 512)
    times = paired([lambda: bare(full, lengths, 512)] * pairs, [lambda: bare(half, lengths, 512)] * pairs)
    native = bool(NATIVE & flags())
    where = "" if native else "; this processor has no instructions for it, so no target"
    found = [row(f"bfloat16 over float32, speed of bare forwards{where}", median_ratio(times), ">= 3" if native else None)]
    samples = samples or (SAMPLES if native else SLOW)
    some = part(every, 0, samples)
    metrics: dict[str, dict[str, Any]] = {}
    for dtype, lm in (("float32", full), ("bfloat16", half)):
        config = quickstart(f"runtime.torch_dtype={dtype}")
        sizes = config.eval.model_copy(update={"repro_runs": 1, "gate_a_samples": plumbed})
        records = engine(lm, config.model_copy(update={"eval": sizes}), some)
        metrics[dtype] = run_metrics(_samples(records, "on"), _samples(records, "off"))
        floor = RunRecords(config, plumbing=[record for record in records if record["type"] == "plumbing"]).floor
        found.append(row(f"numerical floor in {dtype} (nats, {plumbed} samples)", floor, f"<= {KL_LIMIT[dtype]}"))
    for name, value in metrics["bfloat16"].items():
        if name.startswith(ACCURACY) and not name.endswith("_std"):
            change = value - metrics["float32"][name]
            found.append(row(f"{name.removeprefix(ACCURACY)} accuracy in bfloat16 minus float32 ({samples} samples)", change))
    for name, shown in KL.items():
        found += [row(f"{shown} in {dtype}", its[name]) for dtype, its in metrics.items()]
    return found


def _samples(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["type"] == "sample" and record["kind"] == kind]
