"""Eight selector conditions against one: whole commands, from start to exit.

The single one has a turn before and after the grid, so that a clock that falls evenly cancels out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import QUICKSTART, Row, clean_environment, row, seconds

EIGHT = ("attention_diversity_span", "delimiter_span", "random_span", "stratified_random_span", "accumulated_attention",
         "sink_recent", "oracle_span", "wrong_demo")  # fmt: skip
"""Those under one budget that need no pass of their own; of the other three, causal_drop_span and transfer_span ask the
teacher more, and full_demo keeps everything."""
SAMPLES = 32


def rows(samples: int = SAMPLES) -> list[Row]:
    """Wall time of the ablation over that of the single run."""
    sizes = ["--config", str(QUICKSTART), "--max_on", str(samples), "--max_off", str(2 * samples), "--device", "cpu"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one, eight = (
            ["entrypoints.phase2_eval", *sizes],
            ["entrypoints.ablate_selector", *sizes, "--select_modes", ",".join(EIGHT)],
        )
        prepared(folder)
        before = seconds(lambda: command(folder, *one))
        grid = seconds(lambda: command(folder, *eight))
        single = (before + seconds(lambda: command(folder, *one))) / 2
    return [
        row(f"eight selector conditions over one, whole command ({samples} samples)", grid / single, "<= 2.2"),
        row("one condition, whole command (s)", single),
    ]


def command(folder: Path, *arguments: str) -> str:
    """Run ``python -m ...`` in a folder; its standard output."""
    asked = [sys.executable, "-m", *arguments]
    done = subprocess.run(asked, cwd=folder, env=clean_environment(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(asked)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def prepared(folder: Path) -> None:
    """Make the MLflow store, which a user's first run does once."""
    command(folder, "mlflow", "db", "upgrade", f"sqlite:///{folder}/mlflow.db")
