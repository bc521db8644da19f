"""The conditions of a comparison: lists of settings become valid configurations, each with a key and a label."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol, TypeVar

from cedkv.config.extensions import SELECTORS
from cedkv.config.options import COMPARISONS
from cedkv.config.resolve import resolve_over
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.text import preview

TASK, MODE, POSITIONING = "data.task", "select.mode", "injection.positioning_mode"
PADDING, KV_SOURCE = "prefix.padding_mode", "prefix.kv_source"
POSITIONING_DEFAULTS = {
    POSITIONING: ["compact", "absolute"],
    PADDING: ["null_pad", "shrink_to_selected"],
    KV_SOURCE: ["prefill", "gather"],
    "select.keep_sink": ["0", "4"],
}
"""Values that ``compare_positioning`` takes for the lists that are not given."""
LEFT_OUT = ("greedy_teacher",)
"""Selectors that ``ablate_selector`` takes by name or by ``all`` alone: they cost more than all others together."""
LDS_MASKS = 32
"""Value that ``ablate_selector`` takes for ``eval.lds_masks`` where it is null."""


@dataclass(frozen=True)
class Condition:
    """One way of building and injecting prefixes; the conditions of a run share model and samples.

    key: the settings that make the condition, ``select.mode=random_span, select.keep_sink=4``; ``run`` for a single evaluation.
    """

    key: str
    config: Phase2Config


class HasConfig(Protocol):
    """A condition, or what came out of one."""

    @property
    def config(self) -> Phase2Config:
        """Its configuration."""


ConditionT = TypeVar("ConditionT", bound=HasConfig)


def by_task(conditions: Sequence[ConditionT]) -> dict[str, list[ConditionT]]:
    """Return the conditions of each task in their order, by the task's name; those of one task have the same samples.

    The name is empty where all conditions have the same samples: what is named by task is then named as in a single run.
    """
    groups: dict[str, list[ConditionT]] = {}
    for condition in conditions:
        groups.setdefault(condition.config.data.task, []).append(condition)
    return groups if len(groups) > 1 else {"": list(conditions)}


def task_names(conditions: Sequence[Condition]) -> dict[str, str]:
    """Return for each condition's key the name of its task (``by_task``)."""
    return {condition.key: task for task, group in by_task(conditions).items() for condition in group}


def in_task(task: str, name: str) -> str:
    """Return what something of one task is called in a run of several: ``symbol_lookup/unit/00000``; see ``by_task``."""
    return f"{task}/{name}" if task else name


def build_conditions(name: str, config: Phase2Config, lists: Mapping[str, str | None]) -> list[Condition]:
    """Return the conditions of a comparison; the first value of each list makes the first condition, the reference.

    Args:
        name: the comparison.
        config: settings that are not in a list.
        lists: option name (of ``COMPARISONS``) -> comma-separated values, or None for a list that is not given
            (``select_modes`` may also be ``all``). The conditions are the product of the lists; where none is given,
            ``ablate_selector`` takes its standard set and ``compare_positioning`` its full grid. ``tasks`` repeats these
            conditions on each task. ``ablate_selector`` judges scores too: with ``LDS_MASKS`` masks where ``eval.lds_masks``
            is null.

    Raises:
        ConfigError: a list with an empty or a repeated value, a value that its key rejects, a condition with contradicting
            settings (the message has its key), or fewer than two different conditions.
    """
    if name == "ablate_selector" and config.eval.lds_masks is None:
        config = resolve_over(config, {"eval.lds_masks": str(LDS_MASKS)})
    values = {COMPARISONS[name][option][0]: _values(option, text) for option, text in lists.items() if text is not None}
    tasks = values.pop(TASK, [])
    if tasks and config.data.on_path is not None:
        raise ConfigError(
            f"tasks = {preview(', '.join(tasks))} generate ON episodes and data.on_path = {preview(config.data.on_path)} "
            "names a file of them; leave one of the two out"
        )
    if name == "compare_positioning":
        # tokens run again in a gathered prefix alone
        sources = {KV_SOURCE: ["gather"]} if "prefix.boundary_replay" in values else {}
        grid = _product({**POSITIONING_DEFAULTS, **sources, **values})
    elif values:
        grid = _product(values)
    else:
        grid = _standard_set(config)
    if tasks:
        grid = [{TASK: task, **settings} for task in tasks for settings in grid]
    distinct: dict[str, Condition] = {}
    for settings in grid:
        resolved = _resolve(config, settings)
        distinct.setdefault(resolved.model_dump_json(), Condition(_key(settings), resolved))
    conditions = list(distinct.values())
    if len(conditions) < 2:
        raise ConfigError(f"{name} needs at least two different conditions, the lists give {len(conditions)}; add values")
    return conditions


def factors(conditions: Sequence[Condition]) -> dict[str, dict[str, object]]:
    """Return for each condition's key the settings in which the conditions differ."""
    flat = {condition.key: condition.config.by_key() for condition in conditions}
    first = next(iter(flat.values()))
    differing = [name for name in first if any(values[name] != first[name] for values in flat.values())]
    return {key: {name: values[name] for name in differing} for key, values in flat.items()}


def labels(conditions: Sequence[Condition]) -> dict[str, str]:
    """Return for each condition's key a short label.

    Where the conditions are a complete product, a label has every setting that varies: ``compact · gather · sink 4``;
    otherwise the selector, and the settings that differ from the first condition. It says nothing of the task: conditions of
    two tasks that are alike otherwise have the same label.
    """
    return {key: label for group in by_task(conditions).values() for key, label in _labels_in_task(group).items()}


def _labels_in_task(conditions: Sequence[Condition]) -> dict[str, str]:
    varied = factors(conditions)
    first = next(iter(varied.values()))
    sizes = [len({str(values[name]) for values in varied.values()}) for name in first]
    is_product = math.prod(sizes) == len(conditions)
    label_of = {}
    for condition in conditions:
        values = varied[condition.key]
        shown = {name: value for name, value in values.items() if is_product or value != first[name]}
        parts = [] if is_product and shown and MODE not in shown else [condition.config.select.mode.removesuffix("_span")]
        parts += [_label(name, shown[name]) for name in sorted(shown, key=lambda name: name != POSITIONING) if name != MODE]
        label_of[condition.key] = " · ".join(parts)
    return label_of


def _label(name: str, value: object) -> str:
    """Return a setting as part of a label: ``compact``, ``sink 4``."""
    if name in (POSITIONING, PADDING, KV_SOURCE):
        return str(value).removesuffix("_to_selected")
    shown = str(value).lower() if isinstance(value, bool) else value  # as it is spelled in a configuration
    return f"{name.rsplit('.', 1)[-1].removeprefix('keep_')} {shown}"


def _values(option: str, text: str) -> list[str]:
    """Return the values of ``a,b`` or ``[0,1],all``; commas inside brackets do not split, ``all`` is every selector."""
    values = [part.strip() for part in re.split(r",(?![^\[]*\])", text)]
    if "" in values:
        raise ConfigError(f"{option} = {preview(text)}: a value is empty; separate values by single commas")
    if option == "select_modes" and values == ["all"]:
        return SELECTORS.names()
    if option == "select_modes" and "all" in values:
        raise ConfigError(f"{option} = {preview(text)}: 'all' stands alone; it is every selector already")
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ConfigError(
            f"{option} = {preview(text)}: {', '.join(map(preview, repeated[:5]))} appears twice; give each value once"
        )
    return values


def _resolve(config: Phase2Config, settings: Mapping[str, str]) -> Phase2Config:
    """Return the configuration of a condition; an error names the condition by its key."""
    if MODE in settings and settings[MODE] != config.select.mode:
        settings = {"select.params": "{}", **settings}  # another selector has other parameters
    if TASK in settings and settings[TASK] != config.data.task:
        settings = {"data.params": "{}", **settings}
    try:
        return resolve_over(config, settings)
    except ConfigError as error:
        raise ConfigError(f"condition {_key(settings)}: {error}") from None


def _product(lists: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]


def _standard_set(config: Phase2Config) -> list[dict[str, str]]:
    """Return the settings of ``ablate_selector`` without lists.

    Every built-in selector but ``LEFT_OUT``; for the configured one also other budgets, span lengths, sinks and K/V sources,
    which the standard questions of the report compare; and the whole demo at its own positions, which is the teacher.
    """
    mode, select = config.select.mode, config.select
    grid: list[dict[str, str]] = [{MODE: mode}]
    grid += [{MODE: other} for other in SELECTORS.builtin if other not in (mode, *LEFT_OUT)]
    budgets = sorted({1, max(1, select.span_budget // 2), select.span_budget * 2} - {select.span_budget})
    grid += [{"select.span_budget": str(n)} for n in budgets if n * select.span_len + select.keep_sink <= config.prefix_len]
    if select.span_len % 2 == 0:
        half_len = select.span_len // 2
        half_spans = {"select.span_len": str(half_len), "select.span_budget": str(select.span_budget * 2)}
        grid.append({**half_spans, "select.min_span_distance": str(min(select.min_span_distance, half_len))})
    if select.span_budget % 2 == 0:
        grid.append({"select.span_len": str(select.span_len * 2), "select.span_budget": str(select.span_budget // 2)})
    other_sink = 0 if select.keep_sink else 4
    other_fits = select.span_budget * select.span_len + other_sink <= config.prefix_len
    sinks = [str(select.keep_sink), str(other_sink)] if other_fits else [str(select.keep_sink)]
    grid += _product({"select.keep_sink": sinks, KV_SOURCE: ["prefill", "gather"]})
    grid.append({POSITIONING: "absolute", MODE: "full_demo"})
    return grid


def _key(settings: Mapping[str, str]) -> str:
    """Return settings as a condition's key, sorted by name."""
    return json.dumps(settings, sort_keys=True)[1:-1].replace('"', "").replace(": ", "=")
