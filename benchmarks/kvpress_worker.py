"""kvpress's text-generation pipeline, run by the Python of its own environment; knows nothing of this suite.

    python kvpress_worker.py MODEL_FOLDER JOBS.json DEVICE

JOBS.json has lists of jobs by name. A job is {"context": text, "questions": [text], "press": null or {"kind": "snapkv" or
"random", "keep": tokens, "window": tokens or absent, "seed": number or absent}}: the context is run once and cut down to
``keep`` tokens and the window's, then every question is answered with one token. Prints a line of versions when it is ready;
then, for each line it reads, the name of a list, does its jobs and prints {"seconds": ..., "answers": [...]}.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import RandomPress, SnapKVPress
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

AS_IT_IS = "{{ bos_token }}{{ messages[0]['content'] }}"
"""A template that adds nothing but BOS: without any, the pipeline puts a line break between the question and its answer."""
WINDOW = 4
"""Last context tokens whose attention scores the rest, where a job does not say how many; they are kept, among ``keep``."""


def main(folder: str, path: str, device: str) -> None:
    """Load, then answer until there is no more to read."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = AS_IT_IS
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device=device)
    jobs = json.loads(Path(path).read_text())
    print(json.dumps({name: version(name) for name in ("kvpress", "transformers", "torch")}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        answers = [answer for job in jobs[line.strip()] for answer in _answers(pipe, **job)]
        print(json.dumps({"seconds": time.perf_counter() - started, "answers": answers}), flush=True)


def _answers(pipe: Any, context: str, questions: list[str], press: dict[str, Any] | None) -> list[str]:
    made = None if press is None else _press(len(pipe.tokenizer(context).input_ids) + 1, **press)
    return list(pipe(context, questions=questions, press=made, max_new_tokens=1)["answers"])


def _press(length: int, kind: str, keep: int, window: int | None = None, seed: int | None = None) -> Any:
    ratio = 1 - (keep + (window or 0) + 0.5) / length
    return RandomPress(ratio, seed) if kind == "random" else SnapKVPress(ratio, window or WINDOW)


if __name__ == "__main__":
    main(*sys.argv[1:])
