"""The conditions of a comparison: from lists of settings to configurations, each valid, each with a name. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from cedkv.config.extensions import SELECTORS
from cedkv.config.options import COMPARISONS
from cedkv.config.resolve import resolve_over
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.text import preview

MODE, PLACE = "select.mode", "injection.positioning_mode"
POSITIONING_DEFAULTS = {
    PLACE: ["compact", "absolute"],
    "prefix.padding_mode": ["null_pad", "shrink_to_selected"],
    "prefix.kv_source": ["prefill", "gather"],
    "select.keep_sink": ["0", "4"],
}


@dataclass(frozen=True)
class Condition:
    """One way of making and injecting prefixes. Conditions of a run differ in that alone: model and samples are the same."""

    key: str
    config: Phase2Config


def build_conditions(name: str, config: Phase2Config, lists: Mapping[str, str | None]) -> list[Condition]:
    """The conditions of a comparison. The first values of the lists make the first one, which all others are compared with.

    Args:
        lists: option name (of ``COMPARISONS``) -> comma-separated values (``select_modes`` also ``all``). With any given,
            the conditions are their product; with none, ``ablate_selector`` takes its standard set and
            ``compare_positioning`` its full grid.

    Raises:
        ConfigError: a list with an empty or a repeated value, a value that its key refuses, a condition that cannot be
            (it is named), or fewer than two conditions.
    """
    given = {COMPARISONS[name][option][0]: _values(option, text) for option, text in lists.items() if text is not None}
    if name == "compare_positioning":
        settings = _product({**POSITIONING_DEFAULTS, **given})
    elif given:
        settings = _product(given)
    else:
        settings = _standard(config)
    conditions: dict[str, Condition] = {}
    for setting in settings:
        made = _resolved(config, setting)
        conditions.setdefault(made.model_dump_json(), Condition(_key(setting), made))
    found = list(conditions.values())
    if len(found) < 2:
        raise ConfigError(f"{name} needs at least two different conditions, the lists give {len(found)}; add values")
    return found


def factors(conditions: Sequence[Condition]) -> dict[str, dict[str, object]]:
    """For each condition's key the settings in which the conditions differ."""
    flat = {condition.key: condition.config.dotted() for condition in conditions}
    first = next(iter(flat.values()))
    differing = [name for name in first if any(values[name] != first[name] for values in flat.values())]
    return {key: {name.removeprefix("phase2."): values[name] for name in differing} for key, values in flat.items()}


def labels(conditions: Sequence[Condition]) -> dict[str, str]:
    """For each condition's key a short name. Where the conditions are a whole product, everything that varies: ``compact ·
    gather · sink 4``; otherwise the selector, and what else differs from the first condition.
    """
    varied = factors(conditions)
    first = next(iter(varied.values()))
    sizes = [len({str(values[name]) for values in varied.values()}) for name in first]
    whole = math.prod(sizes) == len(conditions)
    found = {}
    for condition in conditions:
        values = varied[condition.key]
        preview = {name: value for name, value in values.items() if whole or value != first[name]}
        parts = [] if whole and MODE not in preview else [condition.config.select.mode.removesuffix("_span")]
        parts += [_word(name, preview[name]) for name in sorted(preview, key=lambda name: name != PLACE) if name != MODE]
        found[condition.key] = " · ".join(parts)
    return found


def _word(name: str, value: object) -> str:
    if name in (PLACE, "prefix.padding_mode", "prefix.kv_source"):
        return str(value).removesuffix("_to_selected")
    return f"{name.rsplit('.', 1)[-1].removeprefix('keep_')} {value}"


def _values(option: str, text: str) -> list[str]:
    """``a,b`` or ``[0,1],all`` -> its values; commas inside brackets do not split. ``all`` selectors are their names."""
    found = [part.strip() for part in re.split(r",(?![^\[]*\])", text)]
    if "" in found:
        raise ConfigError(f"{option} = {preview(text)}: a value is empty; separate values by single commas")
    if option == "select_modes" and found == ["all"]:
        return SELECTORS.names()
    if option == "select_modes" and "all" in found:
        raise ConfigError(f"{option} = {preview(text)}: 'all' stands alone; it is every selector already")
    twice = sorted({value for value in found if found.count(value) > 1})
    if twice:
        raise ConfigError(
            f"{option} = {preview(text)}: {', '.join(map(preview, twice[:5]))} appears twice; give each value once"
        )
    return found


def _resolved(config: Phase2Config, setting: Mapping[str, str]) -> Phase2Config:
    """The configuration of a condition; what is wrong with it is said together with its name."""
    if MODE in setting and setting[MODE] != config.select.mode:
        setting = {"select.params": "{}", **setting}  # another selector has other parameters
    try:
        return resolve_over(config, setting)
    except ConfigError as error:
        raise ConfigError(f"condition {_key(setting)}: {error}") from None


def _product(lists: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]


def _standard(config: Phase2Config) -> list[dict[str, str]]:
    """Every selector, and what it takes to answer the standard questions (budget, sinks, span length) about one."""
    own, select = config.select.mode, config.select
    settings: list[dict[str, str]] = [{"select.mode": own}]
    settings += [{"select.mode": mode} for mode in SELECTORS.builtin if mode != own]
    budgets = sorted({1, max(1, select.span_budget // 2), select.span_budget * 2} - {select.span_budget})
    settings += [{"select.span_budget": str(n)} for n in budgets if n * select.span_len + select.keep_sink <= config.prefix_len]
    if select.span_len % 2 == 0:
        shorter = select.span_len // 2
        settings.append(
            {
                "select.span_len": str(shorter),
                "select.span_budget": str(select.span_budget * 2),
                "select.min_span_distance": str(min(select.min_span_distance, shorter)),
            }
        )
    if select.span_budget % 2 == 0:
        settings.append({"select.span_len": str(select.span_len * 2), "select.span_budget": str(select.span_budget // 2)})
    sink = 0 if select.keep_sink else 4
    room = select.span_budget * select.span_len + sink <= config.prefix_len
    sinks = [str(select.keep_sink), str(sink)] if room else [str(select.keep_sink)]
    settings += _product({"select.keep_sink": sinks, "prefix.kv_source": ["prefill", "gather"]})
    settings.append({"injection.positioning_mode": "absolute", "select.mode": "full_demo"})
    return settings


def _key(setting: Mapping[str, str]) -> str:
    return json.dumps(setting, sort_keys=True)[1:-1].replace('"', "").replace(": ", "=")
