"""The selectors, one file each: ``cedkv/selectors/<name>.py`` has a function ``choose(task) -> tuple[Span, ...]``.

To add one, write its file and put its name into ``select.mode`` of ``cedkv/config.py``; the command line, the errors and
the tests that run over all selectors pick it up from there. A file may also say, each in one line:

    NEEDS = frozenset({"causal_drop"})   evidence beyond attention: a field of ``Evidence``, computed only when needed
    REFERENCE = "why"                    it is a point of reference, never the winner of a comparison
    ORACLE = True                        it knows the answer
    UNBOUNDED = True                     it may keep more than span_budget x span_len tokens, and than prefix_len
    PARTNER = True                       it is injected in front of another sample's query
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import get_args

from cedkv.config.schema import SelectBlock
from cedkv.core.values import Selection
from cedkv.selectors.base import SelectionTask

NAMES: tuple[str, ...] = get_args(SelectBlock.model_fields["mode"].annotation)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"cedkv.selectors.{name}")


def needs(name: str) -> frozenset[str]:
    """The fields of ``Evidence`` beyond attention that a selector reads."""
    found: frozenset[str] = getattr(_module(name), "NEEDS", frozenset())
    return found


def reference(name: str) -> str | None:
    """Why a selector is a point of reference only; None for a candidate."""
    return getattr(_module(name), "REFERENCE", None)


def is_oracle(name: str) -> bool:
    """Whether a selector knows the answer."""
    return bool(getattr(_module(name), "ORACLE", False))


def kind(name: str) -> str:
    """``candidate``, ``reference`` or ``oracle``."""
    return "oracle" if is_oracle(name) else "candidate" if reference(name) is None else "reference"


def is_unbounded(name: str) -> bool:
    """Whether a selector may keep more tokens than the budget and than ``prefix_len``."""
    return bool(getattr(_module(name), "UNBOUNDED", False))


def uses_partner(name: str) -> bool:
    """Whether a selector's prefix goes in front of another sample's query."""
    return bool(getattr(_module(name), "PARTNER", False))


def select(name: str, task: SelectionTask) -> Selection:
    """Choose spans, and add what is kept whatever the selector: BOS and the first ``keep_sink`` tokens after it."""
    spans = tuple(sorted(_module(name).choose(task), key=lambda span: span.start))
    first = int(task.token_kinds[0] == "bos")
    kept = set(range(min(first + task.select.keep_sink, len(task.token_kinds))))
    for span in spans:
        kept.update(range(span.start, span.end))
    return Selection(spans, tuple(sorted(kept)))
