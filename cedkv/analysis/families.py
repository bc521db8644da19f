"""The groups of conditions that answer a standing question: they differ in what it asks about, and in nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from cedkv.analysis.comparison import groups_differing_in, setting, unique_up_to_padding
from cedkv.analysis.results import ConditionResult
from cedkv.core.text import plural
from cedkv.selectors.base import selector_class

Family = list[ConditionResult]
BUDGET, LENGTH, DISTANCE, MODE = "select.span_budget", "select.span_len", "select.min_span_distance", "select.mode"
PARAMS = "select.params"
SINK, SOURCE, POSITIONING = "select.keep_sink", "prefix.kv_source", "injection.positioning_mode"


def families(results: Sequence[ConditionResult], *names: str) -> list[Family]:
    """Return the families that differ in these dotted names alone; mathematically identical conditions count once."""
    return groups_differing_in(unique_up_to_padding(results), *names)


def candidates(group: Family) -> Family:
    """Return the conditions of a family that are no points of reference."""
    return [c for c in group if not c.reference]


def budgets(results: Sequence[ConditionResult]) -> list[Family]:
    """Return the families that differ in the number of spans alone, sorted by that number."""
    groups = [candidates(group) for group in families(results, BUDGET)]
    return [sorted(group, key=lambda c: setting(c, BUDGET)) for group in groups if len(group) > 1]


def selectors_by_budget(results: Sequence[ConditionResult]) -> list[list[Family]]:
    """Return the families that differ in selector and budget alone, split by selector (and its parameters), each part sorted by
    budget; only where two selectors have at least two budgets. A selector that ignores the budget is left out.
    """
    split = []
    for group in families(results, MODE, PARAMS, BUDGET):
        by_selector: dict[str, Family] = {}
        for c in sorted(group, key=lambda c: setting(c, BUDGET)):
            if selector_class(setting(c, MODE)).bounded:
                by_selector.setdefault(selector_name(c), []).append(c)
        if sum(len(part) > 1 for part in by_selector.values()) > 1:
            split.append(list(by_selector.values()))
    return split


def selectors_like_the_first(results: Sequence[ConditionResult]) -> Family:
    """Return the conditions that differ from the first one in the selector alone; all of them where there is none."""
    groups = families(results, MODE, PARAMS)
    return next((group for group in groups if results[0] in group), list(results))


def selector_name(condition: ConditionResult) -> str:
    """Return a selector with the parameters that are not its defaults: ``attention (kernel 5)``."""
    mode, params = str(setting(condition, MODE)), setting(condition, PARAMS)
    default = {field.name: field.default for field in fields(selector_class(mode))}
    parts = [f"{name} {value}" for name, value in params.items() if value != default.get(name)]
    return mode.removesuffix("_span") + (f" ({', '.join(parts)})" if parts else "")


def sinks(results: Sequence[ConditionResult]) -> list[Family]:
    """Return the families that differ both in kept sinks and in the source of the K/V."""
    groups = [candidates(group) for group in families(results, SINK, SOURCE)]
    return [group for group in groups if all(len({setting(c, name) for c in group}) > 1 for name in (SINK, SOURCE))]


def positions(results: Sequence[ConditionResult]) -> list[Family]:
    """Return the families that differ in positioning alone."""
    groups = [candidates(group) for group in families(results, POSITIONING)]
    return [group for group in groups if len(group) > 1]


def lengths(results: Sequence[ConditionResult]) -> list[Family]:
    """Return the families with the same number of tokens in spans of different length, sorted by that length."""
    same_size: list[Family] = []
    for group in families(results, BUDGET, LENGTH, DISTANCE):
        by_tokens: dict[int, Family] = {}
        for c in sorted(candidates(group), key=lambda c: (setting(c, LENGTH), results.index(c))):
            by_tokens.setdefault(setting(c, LENGTH) * setting(c, BUDGET), []).append(c)
        same_size += by_tokens.values()
    return [group for group in same_size if len({setting(c, LENGTH) for c in group}) > 1]


def transfers(results: Sequence[ConditionResult]) -> list[Family]:
    """Return the families with spans of the query itself, of another query of the same demonstration, and, if in the grid,
    of another episode.
    """
    transferred = []
    for group in families(results, MODE):
        by_mode = {setting(c, MODE): c for c in group}
        if "transfer_span" in by_mode and "attention_diversity_span" in by_mode:
            modes = ("attention_diversity_span", "transfer_span", "wrong_demo")
            transferred.append([by_mode[mode] for mode in modes if mode in by_mode])
    return transferred


def selectors_with_full_demo(results: Sequence[ConditionResult]) -> list[Family]:
    """Return the families that differ in the selector alone and contain the whole demonstration as a prefix."""
    groups = families(results, MODE)
    return [group for group in groups if any(setting(c, MODE) == "full_demo" for c in group) and group[0].records.off]


def with_causal_drops(results: Sequence[ConditionResult]) -> ConditionResult | None:
    """Return the first condition whose samples have causal drops of their candidate spans, if there is one."""
    return next((c for c in results if any(r.get("candidate_causal_drop") for r in c.records.on)), None)


def spans_by_tokens(condition: ConditionResult) -> str:
    """Return number and length of the spans in words: ``4 spans × 8 tokens``."""
    return f"{plural(setting(condition, BUDGET), 'span')} × {plural(setting(condition, LENGTH), 'token')}"
