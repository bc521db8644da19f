"""The tags of a run in MLflow: what it is of, known from its start, and what its results decide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from cedkv.analysis.results import ConditionResult, verdict_word
from cedkv.config.schema import Phase2Config
from cedkv.core.text import redact

SHARD, CODE = "shard", "code"
"""The tags of a shard (``1/4``), and of a run that was resumed with other code (``changed``)."""


def config_tags(configs: Sequence[Phase2Config]) -> dict[str, str]:
    """Return the tags that say what a run is of: model, task or file of samples, selector; those in which all conditions agree.

    Of a model the last part of its id: ``Qwen2.5-1.5B-Instruct``.
    """
    tags = [
        {"model": PurePath(c.model.id).name or c.model.id, "task": c.data.source, "selector": c.select.mode} for c in configs
    ]
    return {name: redact(value) for name, value in tags[0].items() if all(other[name] == value for other in tags)}


def condition_tags(result: ConditionResult) -> dict[str, str]:
    """Return the tags of a finished condition: checks and preconditions, gates, numbers of samples."""
    tags: dict[str, str] = {check.tag: check.verdict for check in result.results.checks}
    return tags | {name: verdict_word(value) for name, value in result.results.verdicts.items()} | _sample_tags(result)


def shared_tags(results: Sequence[ConditionResult]) -> dict[str, str]:
    """Return the tags of preconditions and of numbers of samples for the parent of these conditions."""
    values: dict[str, set[str]] = {}
    for result in results:
        preconditions = {check.tag: check.verdict for check in result.results.checks if check.gate == "precondition"}
        for tag, value in {**preconditions, **_sample_tags(result)}.items():
            values.setdefault(tag, set()).add(value)
    return {tag: found.pop() if len(found) == 1 else "differs: see the nested runs" for tag, found in values.items()}


def _sample_tags(result: ConditionResult) -> dict[str, str]:
    """Return how many samples were used, and how many were left out."""
    counts = {"on": len(result.records.on), "off": len(result.records.off)}
    counts["unusable"] = sum(left_out.count for left_out in result.unusable)
    return {f"samples.{name}": str(count) for name, count in counts.items()}
