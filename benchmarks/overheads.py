"""What is not model time: answers of the command line, and the quickstart's start, logging, report and figures.

The measure of a start is a bare process that imports what the run needs, the code of the model's family included, and ends.
"""

from __future__ import annotations

import gc
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
BARE = "import mlflow, torch, transformers\nfrom transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM"
FEW = ("--max_on", "4", "--max_off", "8")
"""Samples of the grids: few, so that it is the condition that costs."""
CONDITIONS = (
    "attention_diversity_span",
    "random_span",
    "delimiter_span",
    "sink_recent",
    "oracle_span",
    "accumulated_attention",
)


def rows(*sizes: str) -> list[Row]:
    """Seconds of wall time; ``sizes`` are more options of the command, for a smaller run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared(folder)
        bare = [_bare(folder)]
        found = _timed(folder, *sizes)
        bare += [_bare(folder), _bare(folder)]
        outside, imports = found["whole"] - found["forward"], statistics.median(bare)
        few, many = (_timed(folder, "ablate-selector", *FEW, "--select_modes", ",".join(CONDITIONS[:n])) for n in (2, 6))
        added = (many["whole"] - many["forward"] - few["whole"] + few["forward"]) / 4
        helped = _median(folder, 0, "--help")
        rejected = _median(folder, 2, "--set", "select.mod=random_span")
    ratio = outside / imports
    return [
        row("python -m cedkv --help (s)", helped, "< 0.4"),
        row("a bad configuration rejected (s)", rejected, "< 0.5"),
        row("quickstart, all that is not inside a forward pass, over a bare process that imports the same", ratio, "<= 1.5"),
        row("quickstart, all that is not inside a forward pass (s)", outside),
        row("a bare process that imports torch, transformers with the model's code, and mlflow (s)", imports),
        row("a further condition of a grid, all that is not inside a forward pass (s; 4 samples)", added, "<= 0.3"),
        row("quickstart, whole command (s)", found["whole"]),
        row("second start loads cached weights (s)", found["load"], "< 2"),
    ]


def _timed(folder: Path, *arguments: str) -> dict[str, float]:
    """Seconds of a whole command on the quickstart's configuration, of its forward passes, and of loading the model."""
    started = time.perf_counter()
    found: dict[str, float] = json.loads(command(folder, "benchmarks.overheads", "--run", *arguments).splitlines()[-1])
    return {**found, "whole": time.perf_counter() - started}


def _bare(folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", BARE], cwd=folder, env=clean_environment(folder), capture_output=True, check=True)
    return time.perf_counter() - started


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
    subcommand, rest = (options[:1], options[1:]) if options[:1] == ["ablate-selector"] else ([], options)
    main([*subcommand, "--config", str(QUICKSTART), "--set", "runtime.device=cpu", *rest], standalone_mode=False)
    print(json.dumps(spent), flush=True)
    gc.freeze()  # as a command does at its end


if __name__ == "__main__" and sys.argv[1:2] == ["--run"]:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _run(sys.argv[2:])
