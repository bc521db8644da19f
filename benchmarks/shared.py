"""A run beside another process that computes: two cores, two torch threads each, and how the run's threads wait.

A side is a process of its own, because OpenMP reads its settings once. The other process multiplies matrices without end, with
OpenMP's defaults. Two cores that two such processes share leave each of them half of the time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.common import ROOT, Row, engine, loaded, part, quickstart, results_only, row, seconds
from cedkv.core import threads
from cedkv.core.environment import environment_variables

ROUNDS, SAMPLES = 3, 5
BUSY = "import torch\ntorch.set_num_threads(2)\na = torch.rand(1024, 1024)\nwhile True:\n    a @ a"
"""The other process."""
DEFAULTS = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""How long threads spin where nothing is set: GNU's OpenMP, and Intel's and LLVM's."""


def rows(rounds: int = ROUNDS, samples: int = SAMPLES) -> list[Row]:
    """Medians over rounds of a run's time alone and beside the other process, both with this package's choice and without."""
    chosen: dict[str, str] = {}
    threads.choose(chosen)
    alone, beside, default_alone = ([0.0] * rounds for _ in range(3))
    for i in range(rounds):
        alone[i], default_alone[i] = _timed(chosen, samples), _timed(DEFAULTS, samples)
        with _busy():
            beside[i] = _timed(chosen, samples)
    with _busy():
        default = _timed(DEFAULTS, samples) / default_alone[-1]
    slowed = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
    cost = statistics.median(a / d for a, d in zip(alone, default_alone, strict=True))
    named = ", ".join(f"{name}={value}" for name, value in chosen.items())
    return [
        row(f"beside another process over alone, wall time of {samples} samples on two cores ({named})", slowed, "<= 2.3"),
        row("the same with OpenMP's defaults, once", default),
        row("alone, over alone with OpenMP's defaults", cost, "<= 1.03"),
    ]


def _timed(settings: dict[str, str], samples: int) -> float:
    """Seconds of the engine in a process with these settings of its threads, and none that it inherits."""
    command = [sys.executable, "-m", "benchmarks.shared", "--run", str(samples)]
    done = subprocess.run(command, env=_environment(settings), cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


@contextmanager
def _busy() -> Iterator[None]:
    """Let the other process compute while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], env=_environment({}), preexec_fn=_on_two_cores)
    try:
        time.sleep(5)  # it has imported torch by then
        yield
    finally:
        process.kill()
        process.wait()


def _environment(settings: dict[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in environment_variables().items() if name not in threads.WAITING | threads.NUMBER}
    return {**inherited, **settings}


def _on_two_cores() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])


def _run(samples: int) -> None:
    lm, every = loaded()
    some, config = part(every, 0, samples), results_only(quickstart("runtime.threads=2"))
    engine(lm, config, part(every, samples, 1))
    print(seconds(lambda: engine(lm, config, some)))


if __name__ == "__main__" and sys.argv[1:2] == ["--run"]:
    _on_two_cores()
    _run(int(sys.argv[2]))
