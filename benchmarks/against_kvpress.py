"""The engine against kvpress, on the same evaluations of (sample, arm), and how many queries SnapKV answers when it sees them.

kvpress runs in an environment of its own, because it wants an older transformers: made once under the cache folder, beside
the weights. Its own text-generation pipeline does what the engine's records hold, checks and repetitions left out: base
without a context, the teacher behind the whole demo, the select arm behind a demo that SnapKV cuts down to as many tokens as
the engine's prefix has, random trials by its random press, and OFF prompts alone and behind the select arm's prefix. What it
can share, it shares: all questions behind one prefix are asked of one prefill.

SnapKV scores a context's tokens by its last ones, so in these evaluations it does not see the query, and what it answers there
says nothing about it. For accuracy, the query stands in the context but for its last token, and its tokens do the scoring.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, engine, failed, loaded, median_ratio, part, quickstart, results_only, row, seconds
from cedkv.config.schema import Phase2Config
from cedkv.models import model_cache, smollm2
from cedkv.models.loading import LanguageModel
from cedkv.models.tokenizer import tokens_text
from cedkv.tasks.load import Samples

PAIRS, SAMPLES = 2, 16
TARGETS = {"prefill": ">= 5.5", "gather": ">= 10"}
WANTED = ("kvpress==0.5.5", "transformers<5.3")


def rows(pairs: int = PAIRS, samples: int = SAMPLES, device: str = "cpu") -> list[Row]:
    """Time of kvpress over that of the engine, for each source of K/V, and accuracies; both on one device."""
    names = {kv: f"engine ({kv}) over kvpress, the same (sample, arm) evaluations a second" for kv in TARGETS}
    try:
        python = environment(model_cache.cache_root(None) / f"bench-kvpress{'' if device == 'cpu' else f'-{device}'}")
        return _measured(python, names, pairs, samples, device)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1][:160]
        return [row(f"{name}; not measured: {reason}", None, TARGETS[kv]) for kv, name in names.items()]
    except BrokenWorkerError as error:  # so that a card's other figures are not lost with it
        return [failed("against_kvpress", error)]


def _measured(python: Path, names: dict[str, str], pairs: int, samples: int, device: str) -> list[Row]:
    lm, every = loaded(device=device)
    some, own = part(every, 0, samples), (f"runtime.device={device}", "eval.off_tokens=0")
    configs = {kv: results_only(quickstart(f"prefix.kv_source={kv}", *own)) for kv in TARGETS}
    jobs = {"evaluations": evaluation_jobs(configs["prefill"], some), "aware": aware_jobs(configs["prefill"], lm, some)}
    n = sum(len(job["questions"]) for job in jobs["evaluations"])
    times: dict[str, list[tuple[float, float]]] = {kv: [] for kv in configs}
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(python, Path(folder), jobs, device)
        answers = worker.done("aware")["answers"]
        order = list(configs)
        for _ in range(pairs):  # kvpress between the two, which change places
            first = seconds(lambda: engine(lm, configs[order[0]], some))
            theirs = worker.done("evaluations")["seconds"]
            second = seconds(lambda: engine(lm, configs[order[1]], some))
            times[order[0]].append((theirs, first))
            times[order[1]].append((theirs, second))
            order.reverse()
        worker.close()
    found = [row(names[kv], median_ratio(times[kv]), target) for kv, target in TARGETS.items()]
    each = sorted(theirs for theirs, _ in times["prefill"])[pairs // 2] / n
    release = worker.versions
    title = f"kvpress {release['kvpress']} (transformers {release['transformers']})"
    right = [answer.strip() == sample.episode.answer_text.strip() for answer, sample in zip(answers, some.on, strict=True)]
    selected = [record["correct_select"] for record in engine(lm, configs["prefill"], some) if record.get("kind") == "on"]
    return [
        *found,
        row(f"{title}, seconds an evaluation", each),
        row(f"{title}, accuracy of SnapKV that sees the query ({len(right)} samples)", sum(right) / len(right)),
        row(f"engine, accuracy of the select arm on them ({configs['prefill'].select.mode})", sum(selected) / len(selected)),
    ]


def evaluation_jobs(config: Phase2Config, samples: Samples) -> list[dict[str, Any]]:
    """What the engine evaluates, as jobs of kvpress; OFF prompts are dealt to the ON samples in turn."""
    keep = config.select.span_budget * config.select.span_len
    jobs: list[dict[str, Any]] = []
    for i, sample in enumerate(samples.on):
        demo, query = sample.episode.demo_text, sample.episode.query_text
        off = [prompt.prompt_text for prompt in samples.off[i :: len(samples.on)]]
        jobs += [
            {"context": "", "questions": [query, *off], "press": None},
            {"context": demo, "questions": [query], "press": None},
            {"context": demo, "questions": [query, *off], "press": {"kind": "snapkv", "keep": keep}},
        ]
        jobs += [
            {"context": demo, "questions": [query], "press": {"kind": "random", "keep": keep, "seed": trial}}
            for trial in range(config.eval.n_random_trials)
        ]
    return jobs


def aware_jobs(config: Phase2Config, lm: LanguageModel, samples: Samples) -> list[dict[str, Any]]:
    """SnapKV with the query's tokens as its window, but for the last one, which is asked."""
    keep = config.select.span_budget * config.select.span_len
    jobs: list[dict[str, Any]] = []
    for sample in samples.on:
        query, last = sample.episode.query_text, tokens_text(lm.tokenizer, sample.query_token_ids[-1:])
        press = {"kind": "snapkv", "keep": keep, "window": len(sample.query_token_ids) - 1}
        jobs.append({"context": sample.episode.demo_text + query.removesuffix(last), "questions": [last], "press": press})
    return jobs


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


class BrokenWorkerError(Exception):
    """kvpress ended early; what it said."""


class Worker:
    """``kvpress_worker.py`` under the other Python, waiting between its rounds; ``versions``: of its packages."""

    def __init__(self, python: Path, folder: Path, jobs: dict[str, list[dict[str, Any]]], device: str) -> None:
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [str(python), "-P", str(Path(__file__).with_name("kvpress_worker.py")), str(smollm2.folder(None)),
                   str(folder / "jobs.json"), device]  # fmt: skip
        self._errors = (folder / "stderr").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=folder
        )  # fmt: skip
        self.versions = self._read()

    def done(self, name: str) -> dict[str, Any]:
        """Do a list of jobs: seconds of wall time, and the answers."""
        if self._process.stdin is None:
            raise RuntimeError("no way to the worker")
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._errors.seek(0)
            raise BrokenWorkerError(f"kvpress ended: {self._errors.read()[-1500:]}")
        return dict(json.loads(line))
