"""Keyword arguments of the library become a configuration: short names of ``config.options``, or keys in full."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from cedkv.config.options import OPTIONS
from cedkv.config.resolve import leaf_keys, resolve, with_values
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.text import near_match, preview

ConfigLike = str | os.PathLike[str] | Phase2Config | None
"""A configuration: the path of a YAML file, a resolved configuration, or None for the defaults."""


def configuration(config: ConfigLike, values: Mapping[str, Any]) -> Phase2Config:
    """Return a configuration with some keys set.

    Args:
        values: configuration key -> value.

    Raises:
        ConfigError: as ``config.resolve.resolve``.
    """
    return with_values(config if isinstance(config, Phase2Config) else resolve(config), values)


def keys_of(settings: Mapping[str, Any], function: str, blocks: Collection[str] | None = None) -> dict[str, Any]:
    """Return configuration key -> value of keyword arguments.

    Args:
        settings: short name (``span_len``) or key (``select.span_len``) -> value.
        function: whose keyword arguments they are, for messages.
        blocks: blocks, and keys outside of blocks, that the function uses; None for all.

    Raises:
        ConfigError: an unknown name, a key that the function does not use, or a key that is given twice.
    """
    found: dict[str, Any] = {}
    keys = leaf_keys()
    for name, value in settings.items():
        key = OPTIONS[name][0] if name in OPTIONS else name
        if key not in keys:
            raise ConfigError(f"{function}: no setting is named {preview(name)}{near_match(name, [*OPTIONS, *keys])}")
        if blocks is not None and key.partition(".")[0] not in blocks:
            used = ", ".join(short for short, (full, _) in OPTIONS.items() if full.partition(".")[0] in blocks)
            raise ConfigError(f"{function} does not use {name} ({key}), so it would change nothing; it uses {used}")
        if key in found:
            raise ConfigError(f"{function}: {key} is given twice, as {name} and by another name; leave one out")
        found[key] = value
    return found
