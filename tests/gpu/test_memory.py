"""What ``cedkv plan`` says of a card's memory, against what is allocated there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import peak
from cedkv.conditions import Condition
from cedkv.eval_phase2 import run_units
from cedkv.inference.batch import silent
from cedkv.runs.planning import plan_run
from cedkv.runs.resolved import resolve_inputs
from cedkv.tasks.load import load_samples
from cedkv.units import plan_samples
from tests.gpu.conftest import overrides
from tests.support import tiny

pytestmark = pytest.mark.gpu
WORKSPACES = 128 * 2**20
"""Bytes that cuBLAS takes for itself, once for a process."""


def test_a_plan_s_memory_is_not_exceeded(device: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)  # type: ignore[arg-type]
    sizes = ("eval.on_samples=32", "eval.off_samples=64", "runtime.batch_size=32")
    config, lm = tiny.load(folder, *overrides(device, *sizes))
    plan = plan_run(resolve_inputs("phase2", config, "2"), lambda _: None)
    assert plan.device.split(":")[0] == device
    assert ("libraries" in plan.memory) == (device == "cpu")
    assert plan.peak is not None
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    conditions = [Condition("run", config)]
    units = plan_samples(conditions, samples, "2")
    if torch.version.cuda is not None and device == "cuda":  # a stand-in has no memory of its own
        used = peak(lm, lambda: list(run_units(lm, conditions, samples, units, "2", silent)))
        assert used is not None
        assert plan.peak / 4 <= used <= 1.2 * plan.peak + WORKSPACES
