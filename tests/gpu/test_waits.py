"""How often the host waits for a card in a unit, as torch tells it (``tests/integration/test_card.py``: on a stand-in)."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.common import results_only
from cedkv.conditions import Condition
from cedkv.eval_phase2 import run_units
from cedkv.inference.batch import silent
from cedkv.runs.rehearsal import counting
from cedkv.tasks.load import load_samples
from cedkv.units import plan_samples
from tests.gpu.conftest import overrides
from tests.support import tiny

pytestmark = pytest.mark.gpu
FEW = 12
"""Waits of a unit besides one of transformers a pass, which looks at the attention mask."""


@pytest.mark.parametrize("n", [4, 16])
def test_a_unit_waits_for_the_card_once_a_pass_at_most(card: str, llama_folder: Path, n: int) -> None:
    sizes = (f"eval.on_samples={n}", f"eval.off_samples={n}", f"runtime.batch_size={n}")
    config, lm = tiny.load(llama_folder, *overrides(card, *sizes))
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    conditions = [Condition("run", results_only(config))]
    (unit,) = plan_samples(conditions, samples, "2")
    with counting(lm.model) as count:  # in a run of its own, for it waits; this one makes what is made once, too
        list(run_units(lm, conditions, samples, [unit], "2", silent))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            list(run_units(lm, conditions, samples, [unit], "2", silent))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = Counter(
        f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"
        for warning in told
        if "called a synchronizing" in str(warning.message)
    )
    of_transformers = sum(times for where, times in waits.items() if where.startswith("transformers/"))
    assert sum(waits.values()) - of_transformers <= FEW, waits
    assert of_transformers <= count.passes, waits
