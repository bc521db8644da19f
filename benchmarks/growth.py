"""How time and peak memory grow: with the number of ON samples, and with the length of the demo.

Each run is a process of its own, from the start to the written report (MLflow on a local sqlite store), because a process's
peak memory never falls. Samples are counted with a tiny model, whose own size hides nothing. Long demos run through the first
layers of ``smollm2-135m``, told to read twice the tokens: what grows with a demo does so in every layer.

A machine's clock may fall by a quarter within minutes of load. So the largest size has its turn in the middle, and the others
before it and after it, in the other order: all have the same mean time since the beginning, and a clock that falls evenly
cancels out.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.common import Row, row
from cedkv.core.environment import environment_variables

COUNTS = (200, 2600, 5000)
"""ON samples, evenly spaced; 128 OFF prompts in all."""
LENGTHS = (4096, 6144, 8192)
"""Demo tokens, evenly spaced. With 2,048 or fewer a process has its most memory elsewhere: one with 512 has as much."""
LAYERS = 4
"""Of ``smollm2-135m``, for long demos."""
SCORINGS = {
    "with attention scoring": "attention_diversity_span",
    "with attention scoring of every row": "accumulated_attention",
    "without attention scoring": "delimiter_span",
}
LEAST = 24.0
"""MB below which a growth is noise of the allocator."""


def rows() -> list[Row]:
    """All figures; takes some minutes."""
    return samples_rows() + length_rows()


def samples_rows(counts: Sequence[int] = COUNTS) -> list[Row]:
    """Peak memory flat, and time linear, in the number of ON samples: what later samples cost, against what earlier ones do."""
    seconds, peaks = dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0.0)
    for n in (*counts, *counts[-2::-1]):
        run = _measured("samples", n)
        seconds[n] += run["seconds"] / (1 if n == counts[-1] else 2)
        peaks[n] = max(peaks[n], run["peak"])
    few, many = counts[0], counts[-1]
    steps = [(seconds[more] - seconds[less]) / (more - less) * 1e3 for less, more in pairwise(counts)]
    memory = f"peak memory, {many:,} against {few} ON samples (MB: {peaks[many]:.0f}, {peaks[few]:.0f})"
    time_ = f"time of a further ON sample, late against early (ms: {steps[-1]:.1f}, {steps[0]:.1f})"
    return [row(memory, peaks[many] / peaks[few], "<= 1.1"), row(time_, steps[-1] / steps[0], "<= 1.1")]


def length_rows(lengths: Sequence[int] = LENGTHS) -> list[Row]:
    """Peak memory linear in the demo's length: as many tokens more, as much memory more."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = _first_layers(Path(folder), 2 * lengths[-1])
        for label, mode in SCORINGS.items():
            peaks = [_measured("length", length, mode, model)["peak"] for length in lengths]
            first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
            ratio = max(second, LEAST) / max(first, LEAST) / ((lengths[2] - lengths[1]) / (lengths[1] - lengths[0]))
            shown = ", ".join(f"{peak:.0f} at {length:,}" for length, peak in zip(lengths, peaks, strict=True))
            found.append(row(f"growth of peak memory a demo token, {label} (MB: {shown})", ratio, "<= 1.25"))
    return found


def _measured(*what: object) -> dict[str, float]:
    """Peak memory in MB and seconds of evaluation of one run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.growth", "--run", folder, *map(str, what)]
        clean = {name: value for name, value in environment_variables().items() if not name.startswith("MLFLOW_")}
        done = subprocess.run(command, env={**clean, "TQDM_DISABLE": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _run(folder: Path, what: str, n: int, mode: str = "", model: str = "") -> None:
    """One run, in ``folder``; prints what ``_measured`` returns."""
    from cedkv.config.resolve import resolve
    from tests.support import tiny
    from tests.support.runs import run_phase2

    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    if what == "samples":
        sizes = [f"eval.on_samples={n}", "eval.off_samples=128", "eval.n_random_trials=1", "runtime.batch_size=auto"]
        config = tiny.config(tiny.save(folder / "model"), *sizes)
    else:
        line = {"demo_text": _demo(n), "query_text": "Word: dax\nSymbol:", "answer_text": " red"}
        (folder / "on.jsonl").write_text(json.dumps(line) + "\n")
        sizes = [f"model.id={model}", "runtime.device=cpu", "data.on_path=on.jsonl", "eval.on_samples=1",
                 "eval.off_samples=2", "eval.gate_a_samples=1", "eval.repro_runs=2", "eval.n_random_trials=1",
                 f"select.mode={mode}"]  # fmt: skip
        config = resolve(None, sizes)
    started = time.perf_counter()
    run_phase2(config, "2")
    print(json.dumps({"peak": peak_memory(), "seconds": time.perf_counter() - started}))


def _first_layers(folder: Path, positions: int) -> Path:
    """Save the first layers of ``smollm2-135m``, with so many positions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cedkv.models import smollm2

    source = smollm2.folder(None)
    few = {"num_hidden_layers": LAYERS, "max_position_embeddings": positions}
    AutoModelForCausalLM.from_pretrained(source, **few).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def _demo(length: int) -> str:
    """About so many tokens of word-symbol pairs, the queried one among them."""
    rng = random.Random(0)  # noqa: S311  (no secret)
    words = ["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)) for _ in range(length)]
    pairs = [f"Word: {word}\nSymbol: {rng.choice(['blue', 'green', 'black'])}\n\n" for word in words]
    kept = pairs[: int(length / 10.15)]
    return "".join([*kept[:3], "Word: dax\nSymbol: red\n\n", *kept[3:]])


def peak_memory() -> float:
    """The most memory this process has had, in MB. (Linux: of this program alone; ``ru_maxrss`` starts at the parent's.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


if __name__ == "__main__" and sys.argv[1:2] == ["--run"]:
    _run(Path(sys.argv[2]).resolve(), sys.argv[3], int(sys.argv[4]), *sys.argv[5:])
