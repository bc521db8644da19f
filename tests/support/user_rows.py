"""Files of rows for tests, and the episodes that are built from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cedkv.core.values import OnEpisode
from cedkv.tasks.load import Samples, load_samples
from tests.support import tiny

COLOURS = ("red", "blue", "green")


def write(folder: Path, rows: Any, name: str = "own.json") -> str:
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def load(path: str, *overrides: str, n: int = 6) -> Samples:
    config = tiny.config("nowhere", f"data.on_path='{path}'", f"eval.on_samples={n}", *overrides)
    return load_samples(config, tiny.tokenizer(), 1024, 500)


def episodes(path: str, *overrides: str, n: int = 6) -> list[OnEpisode]:
    return [sample.episode for sample in load(path, *overrides, n=n).on]


def shots(episode: OnEpisode) -> list[str]:
    return [episode.demo_text[start:end] for start, end in episode.shots or ()]


def asked(episode: OnEpisode) -> str:
    return episode.query_text.removeprefix("Q: ").removesuffix("\nA:")


def outputs(episode: OnEpisode) -> list[str]:
    return [episode.demo_text[start:end] for start, end, kind in episode.char_kinds if kind == "answer"]


def gold(episode: OnEpisode) -> str | None:
    return None if episode.gold is None else episode.demo_text[slice(*episode.gold)]
