"""What measures share: the row of the table, paired timing, the quickstart's model and samples, the engine without checks.

Ratios are taken from pairs: the two sides run one after the other, in turn first and second, and the median of the pairs'
ratios counts. What else the machine does then falls on both sides alike.
"""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cedkv.conditions import Condition
from cedkv.config.resolve import resolve
from cedkv.config.schema import Phase2Config
from cedkv.core.environment import environment_variables
from cedkv.core.values import Record
from cedkv.eval_phase2 import run_units
from cedkv.models import loading
from cedkv.models.loading import LanguageModel
from cedkv.tasks.load import Samples, load_samples
from cedkv.units import plan_samples

Row = dict[str, Any]
"""``{name, value, target, holds}``; value and holds are None where nothing was measured, target where none is set."""

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
_HOLDS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}


def row(name: str, value: float | None, target: str | None = None) -> Row:
    """A row of the table; ``target`` is ``<= 1.15`` and the like."""
    holds = None
    if value is not None and target is not None:
        sign, limit = target.split()
        holds = bool(_HOLDS[sign](value, float(limit)))
    return {"name": name, "value": None if value is None else float(f"{value:.3g}"), "target": target, "holds": holds}


def failed(name: str, error: Exception) -> Row:
    """A row for a measure that broke off, which does not hold; ``python -m benchmarks`` ends with exit code 1 then."""
    return {"name": f"{name} failed: {' '.join(str(error).split())[:300]}", "value": None, "target": None, "holds": False}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def paired(one: Sequence[Callable[[], object]], other: Sequence[Callable[[], object]]) -> list[tuple[float, float]]:
    """Wall times of each pair, the second side first in every other one."""
    found = []
    for at, (left, right) in enumerate(zip(one, other, strict=True)):
        if at % 2:
            after = seconds(right)
            found.append((seconds(left), after))
        else:
            before = seconds(left)
            found.append((before, seconds(right)))
    return found


def median_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """The median of left over right."""
    return statistics.median(left / right for left, right in pairs)


def quickstart(*overrides: str) -> Phase2Config:
    """The quickstart's configuration, on the CPU unless overridden."""
    return resolve(QUICKSTART, ["runtime.device=cpu", *overrides])


@cache
def loaded(dtype: str = "float32", device: str = "cpu") -> tuple[LanguageModel, Samples]:
    """The quickstart's model and samples."""
    config = quickstart(f"runtime.torch_dtype={dtype}", f"runtime.device={device}")
    lm = loading.load(config)
    return lm, load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)


def part(samples: Samples, start: int, n: int) -> Samples:
    """``n`` ON samples from ``start`` on and as many OFF prompts for each as there are in all."""
    each = len(samples.off) // len(samples.on)
    off = samples.off[start * each : (start + n) * each]
    return Samples(samples.on[start : start + n], off, samples.on_source, samples.off_source)


def results_only(config: Phase2Config) -> Phase2Config:
    """The configuration without Gate A's checks and repetitions: what a loop of one's own would compute.

    No run can be asked for this (the schema rejects it), because nothing could be decided from it.
    """
    sizes = config.eval.model_copy(update={"repro_runs": 1, "gate_a_samples": 0})
    return config.model_copy(update={"eval": sizes})


def engine(lm: LanguageModel, config: Phase2Config, samples: Samples) -> list[Record]:
    """All records of one condition. On a card so few samples are one unit, as a run there finds it."""
    conditions = [Condition("run", config)]
    units = plan_samples(conditions, samples, "2", size=len(samples.on) if lm.device.type == "cuda" else None)
    return [record for _, found in run_units(lm, conditions, samples, units, "2", lambda *_: None) for record in found["run"]]


def clean_environment(folder: Path) -> dict[str, str]:
    """For commands measured as processes: this source tree, an MLflow store in ``folder``, no progress bars."""
    inherited = {name: value for name, value in environment_variables().items() if not name.startswith("MLFLOW_")}
    return {**inherited, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "TQDM_DISABLE": "1"}
