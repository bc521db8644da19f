"""kvpress's text-generation pipeline, run by the Python of its own environment; knows nothing of this suite.

    python kvpress_worker.py MODEL_FOLDER SAMPLES.json

SAMPLES.json is a list of [demo text, query text, tokens to keep]. Prints a line of versions when it is ready; then, for
each line it reads, evaluates all samples once, one answer token each, and prints {"seconds": ..., "answers": [...]}.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import SnapKVPress
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

WINDOW = 4
"""Last context tokens whose attention scores the rest; they are kept themselves."""


def main(folder: str, path: str) -> None:
    """Load, then answer until there is no more to read."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = None  # the demo as it is, after BOS
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu")
    samples = json.loads(Path(path).read_text())
    print(json.dumps({name: version(name) for name in ("kvpress", "transformers", "torch")}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        answers = [_answer(pipe, *sample) for sample in samples]
        print(json.dumps({"seconds": time.perf_counter() - started, "answers": answers}), flush=True)


def _answer(pipe: Any, demo: str, query: str, keep: int) -> str:
    length = len(pipe.tokenizer(demo, add_special_tokens=False).input_ids) + 1
    press = SnapKVPress(compression_ratio=1 - (keep + 0.5) / length, window_size=WINDOW)
    return str(pipe(demo, question=query, press=press, max_new_tokens=1)["answer"])


if __name__ == "__main__":
    main(*sys.argv[1:])
