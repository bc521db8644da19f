"""Which conditions of a grid answer a standing question: groups that differ in what it asks about, and in nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from cedkv.analysis.comparison import families, setting, unique_up_to_padding
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import plural

Family = list[ConditionResult]
BUDGET, LENGTH, DISTANCE, MODE = "select.span_budget", "select.span_len", "select.min_span_distance", "select.mode"
SINK, SOURCE, PLACE = "select.keep_sink", "prefix.kv_source", "injection.positioning_mode"


def candidates(group: Family) -> Family:
    """The conditions of a family that are no reference point."""
    return [c for c in group if not c.reference and not c.oracle]


def budgets(results: Sequence[ConditionResult]) -> list[Family]:
    """Families that differ in the number of spans alone, by that number."""
    found = [candidates(group) for group in families(unique_up_to_padding(results), BUDGET)]
    return [sorted(group, key=lambda c: setting(c, BUDGET)) for group in found if len(group) > 1]


def sinks(results: Sequence[ConditionResult]) -> list[Family]:
    """Families that differ in sinks and source of the K/V, both of them."""
    found = [candidates(group) for group in families(unique_up_to_padding(results), SINK, SOURCE)]
    return [group for group in found if all(len({setting(c, name) for c in group}) > 1 for name in (SINK, SOURCE))]


def positions(results: Sequence[ConditionResult]) -> list[Family]:
    """Pairs that differ in positioning alone."""
    return [g for group in families(unique_up_to_padding(results), PLACE) if len(g := candidates(group)) > 1]


def lengths(results: Sequence[ConditionResult]) -> list[Family]:
    """Families with the same number of tokens in spans of different length, by that length."""
    found = []
    for group in families(unique_up_to_padding(results), BUDGET, LENGTH, DISTANCE):
        alike: dict[int, Family] = {}
        for c in sorted(candidates(group), key=lambda c: (setting(c, LENGTH), results.index(c))):
            alike.setdefault(setting(c, LENGTH) * setting(c, BUDGET), []).append(c)
        found += [g for g in alike.values() if len({setting(c, LENGTH) for c in g}) > 1]
    return found


def transfers(results: Sequence[ConditionResult]) -> list[Family]:
    """Families with spans of the query itself, of another query of its demo, and, where there, of another episode."""
    found = []
    for group in families(unique_up_to_padding(results), MODE):
        at = {setting(c, MODE): c for c in group}
        if "transfer_span" in at and "attention_diversity_span" in at:
            found.append([at[mode] for mode in ("attention_diversity_span", "transfer_span", "wrong_demo") if mode in at])
    return found


def selectors_with_whole(results: Sequence[ConditionResult]) -> list[Family]:
    """Families that differ in the selector alone and have the whole demonstration as a prefix."""
    found = families(unique_up_to_padding(results), MODE)
    return [group for group in found if any(setting(c, MODE) == "full_demo" for c in group) and group[0].records.off]


def ranked(results: Sequence[ConditionResult]) -> ConditionResult | None:
    """The first condition whose samples have causal drops of their candidates."""
    return next((c for c in results if any(r.get("candidate_causal_drop") for r in c.records.on)), None)


def shape(condition: ConditionResult) -> str:
    """``4 spans x 8 tokens``."""
    return f"{plural(setting(condition, BUDGET), 'span')} × {plural(setting(condition, LENGTH), 'token')}"
