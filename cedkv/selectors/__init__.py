"""The selectors, one file each: ``cedkv/selectors/<name>.py`` has a function ``choose(task) -> tuple[Span, ...]``.

To add one, write its file and put its name into ``select.mode`` of ``cedkv/config.py``; the command line, the errors and
the tests that run over all selectors pick it up from there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import get_args

from cedkv.config import SelectBlock
from cedkv.selectors.common import SelectionTask
from cedkv.types import Selection, Span

NAMES: tuple[str, ...] = get_args(SelectBlock.model_fields["mode"].annotation)
NEEDS_CAUSAL_DROP = frozenset({"causal_drop_span"})


def selector(name: str) -> Callable[[SelectionTask], tuple[Span, ...]]:
    """The ``choose`` function of a selector."""
    choose: Callable[[SelectionTask], tuple[Span, ...]] = importlib.import_module(f"cedkv.selectors.{name}").choose
    return choose


def select(name: str, task: SelectionTask) -> Selection:
    """Choose spans, and add what is kept whatever the selector: BOS and the first ``keep_sink`` tokens after it."""
    spans = tuple(sorted(selector(name)(task), key=lambda span: span.start))
    first = int(task.token_kinds[0] == "bos")
    kept = set(range(min(first + task.select.keep_sink, len(task.token_kinds))))
    for span in spans:
        kept.update(range(span.start, span.end))
    return Selection(spans, tuple(sorted(kept)))
