"""cedkv: can a few spans of a demonstration's KV cache replace the whole demonstration, and do no harm elsewhere?

The names below are public: the library (docs/library.md), and what a package needs that extends cedkv (docs/extending.md).
They are imported when they are first used, so that ``import cedkv`` and ``--help`` stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cedkv.core.version import __version__

_PUBLIC = {
    "cedkv.checks.base": ("Check", "CheckInputs", "CheckResult", "MeasuredCheck", "RunRecords"),
    "cedkv.config.extensions": ("KV_SOURCES", "PADDING", "POSITIONING", "SELECTORS", "TASKS"),
    "cedkv.config.resolve": ("resolve",),
    "cedkv.config.schema": ("Phase2Config", "SelectBlock"),
    "cedkv.core.errors": ("CedkvError", "ConfigError", "DataError", "ModelError", "NumericsError"),
    "cedkv.core.seeding": ("rng_for",),
    "cedkv.core.values": ("Evidence", "OnEpisode", "Placement", "Selection", "Span", "TokenKind"),
    "cedkv.inference.prefix": ("KVSource",),
    "cedkv.library.models": ("load_model",),
    "cedkv.library.prefixes": ("PrefixBatch", "SelectedPrefix"),
    "cedkv.library.runs": ("Run", "compare", "evaluate", "read_run"),
    "cedkv.library.selecting": ("load_prefix", "select_kv"),
    "cedkv.models.loading": ("LanguageModel",),
    "cedkv.runs.pipeline": ("run",),
    "cedkv.runs.resolved": ("resolve_run",),
    "cedkv.selectors.base": ("SelectionTask", "Selector", "attention_score", "candidates", "pick_spaced", "pick_top"),
    "cedkv.tasks.base": ("Task", "TaskRequest"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

# Written out for type checkers, which take no name from a list that is computed; a test compares it with _PUBLIC.
__all__ = [
    "KV_SOURCES",
    "PADDING",
    "POSITIONING",
    "SELECTORS",
    "TASKS",
    "CedkvError",
    "Check",
    "CheckInputs",
    "CheckResult",
    "ConfigError",
    "DataError",
    "Evidence",
    "KVSource",
    "LanguageModel",
    "MeasuredCheck",
    "ModelError",
    "NumericsError",
    "OnEpisode",
    "Phase2Config",
    "Placement",
    "PrefixBatch",
    "Run",
    "RunRecords",
    "SelectBlock",
    "SelectedPrefix",
    "Selection",
    "SelectionTask",
    "Selector",
    "Span",
    "Task",
    "TaskRequest",
    "TokenKind",
    "__version__",
    "attention_score",
    "candidates",
    "compare",
    "evaluate",
    "load_model",
    "load_prefix",
    "pick_spaced",
    "pick_top",
    "read_run",
    "resolve",
    "resolve_run",
    "rng_for",
    "run",
    "select_kv",
]

if TYPE_CHECKING:
    from cedkv.checks.base import Check, CheckInputs, CheckResult, MeasuredCheck, RunRecords
    from cedkv.config.extensions import KV_SOURCES, PADDING, POSITIONING, SELECTORS, TASKS
    from cedkv.config.resolve import resolve
    from cedkv.config.schema import Phase2Config, SelectBlock
    from cedkv.core.errors import CedkvError, ConfigError, DataError, ModelError, NumericsError
    from cedkv.core.seeding import rng_for
    from cedkv.core.values import Evidence, OnEpisode, Placement, Selection, Span, TokenKind
    from cedkv.inference.prefix import KVSource
    from cedkv.library.models import load_model
    from cedkv.library.prefixes import PrefixBatch, SelectedPrefix
    from cedkv.library.runs import Run, compare, evaluate, read_run
    from cedkv.library.selecting import load_prefix, select_kv
    from cedkv.models.loading import LanguageModel
    from cedkv.runs.pipeline import run
    from cedkv.runs.resolved import resolve_run
    from cedkv.selectors.base import SelectionTask, Selector, attention_score, candidates, pick_spaced, pick_top
    from cedkv.tasks.base import Task, TaskRequest


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cedkv' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
