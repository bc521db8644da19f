"""A demonstration of four shots, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cedkv.library.models import load_model
from cedkv.library.selecting import select_kv
from cedkv.models.loading import LanguageModel

SHOTS = [("dax", "red"), ("wug", "blue"), ("blick", "green"), ("fep", "gold")]
DEMO = "".join(f"Word: {word}\nSymbol: {symbol}\n\n" for word, symbol in SHOTS)
ANSWERS = [symbol for _, symbol in SHOTS]
QUERIES = ["Word: wug\nSymbol:", "Word: blick\nSymbol:", "Word: a longer one\nSymbol:"]
SMALL: dict[str, Any] = {"span_len": 4, "span_budget": 3, "min_span_distance": 4, "prefix_len": 24}


@pytest.fixture(scope="session")
def lm(llama_folder: Path) -> LanguageModel:
    return load_model(llama_folder, device="cpu", batch_size=4)


def select(lm: LanguageModel, query: Any = QUERIES[0], **settings: Any) -> Any:
    """Prefixes with small settings."""
    return select_kv(lm, DEMO, query, **{**SMALL, **settings})
