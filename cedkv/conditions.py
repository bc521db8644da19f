"""The conditions of a comparison: from lists of settings to configurations, each valid, each with a name. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import product

from cedkv import selectors
from cedkv.config import Phase2Config
from cedkv.config_sources import resolve_over
from cedkv.errors import ConfigError
from cedkv.eval_phase2 import Condition
from cedkv.options import COMPARISONS

POSITIONING_DEFAULTS = {
    "injection.positioning_mode": ["compact", "absolute"],
    "prefix.padding_mode": ["null_pad", "shrink_to_selected"],
    "prefix.kv_source": ["prefill", "gather"],
    "select.keep_sink": ["0", "4"],
}


def build(name: str, config: Phase2Config, lists: Mapping[str, str | None]) -> list[Condition]:
    """The conditions of a comparison; the first one is the configuration itself where the lists contain it.

    Args:
        lists: option name (of ``COMPARISONS``) -> comma-separated values (``select_modes`` also ``all``). With any given,
            the conditions are their product; with none, ``ablate_selector`` takes its standard set and
            ``compare_positioning`` its full grid.

    Raises:
        ConfigError: a value that its key refuses, or a condition that cannot be.
    """
    given = {COMPARISONS[name][option][0]: _values(text) for option, text in lists.items() if text}
    if given.get("select.mode") == ["all"]:
        given["select.mode"] = list(selectors.NAMES)
    if name == "compare_positioning":
        settings = _product({**POSITIONING_DEFAULTS, **given})
    elif given:
        settings = _product(given)
    else:
        settings = _standard(config)
    conditions: dict[str, Condition] = {}
    for setting in settings:
        made = resolve_over(config, setting)
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


def label(condition: Condition, first: Condition) -> str:
    """A short name: the selector, and what else differs from the first condition."""
    mine, base = condition.config.dotted(), first.config.dotted()
    changed = [
        f"{name.rsplit('.', 1)[-1]} {mine[name]}" for name in mine if mine[name] != base[name] and name != "phase2.select.mode"
    ]
    return " · ".join([condition.config.select.mode.removesuffix("_span"), *changed])


def _values(text: str) -> list[str]:
    """``a,b`` or ``[0,1],all`` -> its values; commas inside brackets do not split."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _product(lists: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]


def _standard(config: Phase2Config) -> list[dict[str, str]]:
    """Every selector, and what it takes to answer the standard questions (budget, sinks, span length) about one."""
    own, select = config.select.mode, config.select
    settings: list[dict[str, str]] = [{"select.mode": own}]
    settings += [{"select.mode": mode} for mode in selectors.NAMES if mode != own]
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
