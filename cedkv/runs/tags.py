"""The tags of a run in MLflow that its results decide."""

from __future__ import annotations

from collections.abc import Sequence

from cedkv.analysis.results import ConditionResult, verdict_word


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
