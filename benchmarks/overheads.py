"""What is not model time: answers of the command line, and the quickstart's start, logging, report and figures."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import QUICKSTART, Row, clean_environment, row
from benchmarks.grid import command, prepared

ANSWERS = 7
"""Times a command that answers at once is asked; the median counts."""


def rows(*sizes: str) -> list[Row]:
    """Seconds of wall time; ``sizes`` are more options of the command, for a smaller run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared(folder)
        started = time.perf_counter()
        found = json.loads(command(folder, "benchmarks.overheads", "--run", *sizes).splitlines()[-1])
        whole = time.perf_counter() - started
        helped = _median(folder, 0, "--help")
        rejected = _median(folder, 2, "--set", "select.mod=random_span")
    return [
        row("python -m cedkv --help (s)", helped, "< 0.4"),
        row("a bad configuration rejected (s)", rejected, "< 0.5"),
        row("quickstart, all that is not inside a forward pass (s)", whole - found["forward"], "< 5"),
        row("quickstart, whole command (s)", whole),
        row("second start loads cached weights (s)", found["load"], "< 2"),
    ]


def _median(folder: Path, code: int, *arguments: str) -> float:
    return statistics.median(_asked(folder, code, *arguments) for _ in range(ANSWERS))


def _asked(folder: Path, code: int, *arguments: str) -> float:
    command_line = [sys.executable, "-m", "cedkv", *arguments]
    started = time.perf_counter()
    done = subprocess.run(command_line, cwd=folder, env=clean_environment(folder), capture_output=True, check=False)
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(command_line)} ended with {done.returncode}, not with {code}")
    return time.perf_counter() - started


def _run(options: list[str]) -> None:
    """``python -m cedkv`` with a clock at the model; prints seconds inside its forward passes, and of loading it."""
    from cedkv.cli.app import main
    from cedkv.models import loading

    spent = {"forward": 0.0, "load": 0.0}
    began: list[float] = []
    load = loading.load

    def before(*_: Any) -> None:
        began.append(time.perf_counter())

    def after(*_: Any) -> None:
        start = began.pop()
        if not began:  # the base model is also called by the whole one
            spent["forward"] += time.perf_counter() - start

    def timed(*given: Any) -> loading.LanguageModel:
        start = time.perf_counter()
        lm = load(*given)
        spent["load"] = time.perf_counter() - start
        for module in (lm.model, lm.model.base_model):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
        return lm

    loading.load = timed  # type: ignore[assignment]
    main(["--config", str(QUICKSTART), "--phase2-device", "cpu", *options], standalone_mode=False)
    print(json.dumps(spent))


if __name__ == "__main__" and sys.argv[1:2] == ["--run"]:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _run(sys.argv[2:])
