"""The engine against kvpress: how many evaluations of a (sample, arm) each makes in a second.

kvpress runs in an environment of its own, because it wants an older transformers: made once under the cache folder, beside
the weights. One of its evaluations is a demo that is run and cut down to as many tokens as the engine's prefix has, by
SnapKV, then the query and one answer token, through its own text-generation pipeline. The engine's evaluations are those of
all arms, checks and repetitions left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, engine, loaded, median_ratio, part, quickstart, results_only, row, seconds
from cedkv.conditions import Condition
from cedkv.config.schema import Phase2Config
from cedkv.models import model_cache, smollm2
from cedkv.tasks.load import Samples
from cedkv.units import evaluations, plan_samples

PAIRS, SAMPLES = 3, 32
TARGETS = {"prefill": ">= 5", "gather": ">= 10"}
WANTED = ("kvpress==0.5.5", "transformers<5.3")


def rows(pairs: int = PAIRS, samples: int = SAMPLES) -> list[Row]:
    """Evaluations a second of the engine over those of kvpress, for each source of K/V."""
    names = {kv: f"engine ({kv}) over kvpress, (sample, arm) evaluations a second" for kv in TARGETS}
    try:
        python = environment(model_cache.cache_root(None) / "bench-kvpress")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1][:160]
        return [row(f"{name}; not measured: {reason}", None, TARGETS[kv]) for kv, name in names.items()]
    lm, every = loaded()
    some = part(every, 0, samples)
    configs = {kv: results_only(quickstart(f"prefix.kv_source={kv}")) for kv in TARGETS}
    counts = {kv: count(config, some) for kv, config in configs.items()}
    times: dict[str, list[tuple[float, float]]] = {kv: [] for kv in configs}
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(python, Path(folder), some)
        worker.seconds()
        for _ in range(pairs):
            for kv, config in configs.items():
                own = seconds(lambda config=config: engine(lm, config, some))  # type: ignore[misc]
                times[kv].append((worker.seconds() / len(some.on), own / counts[kv]))
        worker.close()
    found = [row(names[kv], median_ratio(times[kv]), target) for kv, target in TARGETS.items()]
    each = sorted(theirs for theirs, _ in times["prefill"])[pairs // 2]
    release = worker.versions
    title = f"kvpress {release['kvpress']} (transformers {release['transformers']}), seconds an evaluation"
    return [*found, row(f"{title}; {worker.right} of {len(some.on)} right", each)]


def count(config: Phase2Config, samples: Samples) -> int:
    """(sample, arm) evaluations in the engine's records."""
    conditions = [Condition("run", config)]
    return sum(evaluations(conditions, unit, "2", samples.on) for unit in plan_samples(conditions, samples, "2"))


def environment(folder: Path) -> Path:
    """The Python of an environment with kvpress, made where it is not there yet.

    Raises:
        subprocess.CalledProcessError: pip cannot install it; its stderr says why.
    """
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ready = folder / ".ready"
    if not ready.exists():
        _done(sys.executable, "-m", "venv", str(folder))
        same = f"torch=={torch.__version__.split('+')[0]}"
        _done(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *WANTED, same)
        ready.touch()
    return python


def _done(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Worker:
    """``kvpress_worker.py`` under the other Python, waiting between its rounds."""

    def __init__(self, python: Path, folder: Path, samples: Samples) -> None:
        keep = quickstart().select.span_budget * quickstart().select.span_len
        texts = [(s.episode.demo_text, s.episode.query_text, keep) for s in samples.on]
        (folder / "samples.json").write_text(json.dumps(texts))
        command = [str(python), "-P", str(Path(__file__).with_name("kvpress_worker.py")), str(smollm2.folder(None)),
                   str(folder / "samples.json")]  # fmt: skip
        self._errors = (folder / "stderr").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=folder
        )  # fmt: skip
        self._wanted = [s.episode.answer_text.strip() for s in samples.on]
        self.versions = self._read()
        self.right = 0

    def seconds(self) -> float:
        """Wall time of one round over all samples."""
        if self._process.stdin is None:
            raise RuntimeError("no way to the worker")
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found = self._read()
        self.right = sum(a.strip() == b for a, b in zip(found["answers"], self._wanted, strict=True))
        return float(found["seconds"])

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"kvpress ended: {self._errors.read()[-1500:]}")
        return dict(json.loads(line))
