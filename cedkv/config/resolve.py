"""Read a configuration: a YAML file, ``key=value`` overrides and named options, merged and validated once."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cedkv.config.data import Template
from cedkv.config.fields import Text
from cedkv.config.options import OPTIONS
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.core.files import open_user_text
from cedkv.core.text import near_match, one_line, preview, redact

MAX_BYTES, MAX_DEPTH, MAX_PROBLEMS = 100_000, 10, 10
"""Limits: bytes and nesting levels of a configuration file, and problems listed in one error message."""


NAMED = ("select.params", "data.params", "data.fields", "data.verbalizer", "model.template_kwargs")
"""Keys that hold names and values of the user's own, of which one can be set: ``select.params.decay=0.9``."""


class _Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys and aliases; ``1e-4`` is a number, and ``010`` and ``1:30`` are not 8 and 90."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not used here", problem_mark=parent.start_mark if parent else None
            )
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_DEPTH} levels", problem_mark=parent.start_mark if parent else None
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, IndexError, KeyError, TypeError):
            # PyYAML takes for granted that a value fits its tag: "!!bool x" is a KeyError, "!!timestamp x" an AttributeError
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.MarkedYAMLError(
                problem=f"{preview(node.value)} is not a value of {tag}", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):  # a list or text tagged !!map is not one: the base class rejects it
            seen = set()
            for key_node, _ in node.value:
                if str(key_node.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {key_node.value!r} appears twice", problem_mark=key_node.start_mark
                    )
                seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The counterpart of ``_Loader``: quotes a text that ``_Loader`` would read as a number."""


_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] not in _NUMBERS]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^({_pattern})$"), list("-+.0123456789"))


def to_yaml(config: Phase2Config) -> str:
    """Return the configuration as the text of a file that ``resolve`` reads back to the same values."""
    return yaml.dump({"phase2": config.model_dump()}, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def leaf_keys() -> dict[str, Any]:
    """Return every configuration key (``select.mode``) with its annotation."""
    keys: dict[str, Any] = {}
    for name, field in Phase2Config.model_fields.items():
        block = field.annotation
        if isinstance(block, type) and issubclass(block, BaseModel):
            keys.update({f"{name}.{leaf}": f.annotation for leaf, f in block.model_fields.items()})
        else:
            keys[name] = field.annotation
    return keys


def resolve(
    path: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    options: Mapping[str, str | None] | None = None,
) -> Phase2Config:
    """Read, merge and validate a configuration.

    Args:
        path: YAML file with a ``phase2`` block; None for the defaults.
        overrides: texts like ``select.span_len=6,eval.off_samples=32``, or one of them.
        options: values by names of ``OPTIONS``; None values are not set.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid one), invalid value, or contradicting values.
    """
    if not isinstance(path, str | os.PathLike | None):
        raise ConfigError(
            f"configuration {preview(path)} is not the path of a YAML file; give single keys as overrides, "
            "['select.span_len=6'], or to a function of the library as keyword arguments, span_len=6"
        )
    tree = _read_yaml(Path(path)) if path is not None else {}
    pairs = [pair for text in ([overrides] if isinstance(overrides, str) else overrides) for pair in _split_overrides(text)]
    for name, value in (options or {}).items():
        if value is None:
            continue
        if name not in OPTIONS:
            raise ConfigError(f"no option is named {preview(name)}{near_match(str(name), OPTIONS)}")
        if not isinstance(value, str):
            raise ConfigError(
                f"option {name} = {preview(value)} is no text; options are read as a shell gives them: {str(value)!r}"
            )
        pairs.append((OPTIONS[name][0], value))
    return _validate(tree, pairs)


def from_values(tree: Mapping[str, Any]) -> Phase2Config:
    """Return the configuration of blocks of values, as a run's report has them.

    Raises:
        ConfigError: as ``resolve``.
    """
    return _validate(dict(tree), [])


def resolve_over(config: Phase2Config, settings: Mapping[str, str]) -> Phase2Config:
    """Return a copy of a configuration with some keys set.

    Args:
        settings: configuration key -> value as text, read as an override is.

    Raises:
        ConfigError: as ``resolve``.
    """
    return _validate(config.model_dump(), list(settings.items()))


def with_values(config: Phase2Config, values: Mapping[str, Any]) -> Phase2Config:
    """Return a copy of a configuration with some keys set to Python values.

    Args:
        values: configuration key (``select.span_len``) -> value; a path counts as its text, a tuple as a list.

    Raises:
        ConfigError: as ``resolve``.
    """
    tree = config.model_dump()
    for key, value in values.items():
        if key not in leaf_keys():
            raise ConfigError(f"unknown configuration key {preview(key)}{near_match(key, leaf_keys())}")
        _put(
            tree,
            key,
            os.fspath(value) if isinstance(value, os.PathLike) else list(value) if isinstance(value, tuple) else value,
        )
    return _validate(tree, [])


def _validate(tree: dict[str, Any], pairs: list[tuple[str, str]]) -> Phase2Config:
    """Return the configuration of a tree of blocks in which ``(key, text)`` pairs are set."""
    for key, text in pairs:
        _assign(tree, key, text)
    _check_keys(tree, "phase2")
    try:
        return Phase2Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None


def _check_keys(block: Mapping[Any, Any], path: str) -> None:
    """Raise ConfigError for a key with a lone surrogate, of which pydantic's error says neither the key nor where it is."""
    for key, value in block.items():
        if isinstance(key, str) and any("\ud800" <= char <= "\udfff" for char in key):
            raise ConfigError(f"{path}: key {preview(key)} holds half a character (a lone surrogate); use the name of a key")
        if isinstance(value, dict):
            _check_keys(value, f"{path}.{key}")


def _parse(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        ValueError: it is not readable as YAML; the message says why, on one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # OverflowError: "\UFFFFFFFF"
        raise ValueError(one_line(error)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    name = preview(str(path), 200)
    try:
        with open_user_text(path, MAX_BYTES) as file:
            text = file.read()
    except ValueError as error:
        raise ConfigError(f"cannot read configuration {name}: {error}; give the path of a YAML file") from None
    try:
        tree = _parse(text)
    except ValueError as error:
        raise ConfigError(f"{name}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict) or set(tree) != {"phase2"} or not isinstance(tree["phase2"], dict | None):
        content = preview(list(islice(tree, 5))) if isinstance(tree, dict) else type(tree).__name__
        raise ConfigError(f"{name}: expected exactly one top-level block 'phase2:', found {content}")
    return tree["phase2"] or {}


def _split_overrides(text: str) -> list[tuple[str, str]]:
    """Return the ``(key, value)`` pairs of ``a=1,b=[1,2]``; commas inside brackets or quotes do not split."""
    if not isinstance(text, str):
        raise ConfigError(f"override {preview(text)} is no text; write it as 'key=value'")
    parts, depth, quote, current = [], 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        if char == "," and depth == 0 and not quote:
            parts.append(current)
            current = ""
        else:
            current += char
    parts.append(current)
    pairs = []
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ConfigError(
                f"override {preview(part)}: expected key=value, as in set='select.span_len=6,eval.off_samples=32'"
            )
        pairs.append((key.strip().removeprefix("phase2."), value.strip()))
    return pairs


def _assign(tree: dict[str, Any], key: str, text: str) -> None:
    """Set a key of the tree to the value that a text holds; ``select.params.NAME`` sets one entry of a block of names."""
    annotations = leaf_keys()
    parameter = ""
    for block in NAMED:
        if key.startswith(f"{block}."):
            key, parameter = block, key.removeprefix(f"{block}.")
    if key not in annotations:
        raise ConfigError(f"unknown configuration key {preview(key)}{near_match(key, annotations)}")
    union = get_args(annotations[key]) if get_origin(annotations[key]) in (Union, UnionType) else ()
    only_text = set(union or (annotations[key],)) <= {str, type(None), Text, Template} and not text.startswith(("'", '"'))
    try:
        value = _parse(text)
    except ValueError:
        if not only_text:
            raise ConfigError(f"{key} = {preview(text)}: not readable as a YAML value; quote it if it is text") from None
        value = text
    if only_text and (value is not None or text.startswith("#")):
        value = text  # unparsed: YAML would drop what follows " #", and read 123 as a number
    _put(tree, key, value, parameter)


def _put(tree: dict[str, Any], key: str, value: Any, parameter: str = "") -> None:
    """Set a key of the tree, or one parameter of a key that holds a block of names."""
    *blocks, leaf = key.split(".")
    for block in blocks:
        tree = tree.setdefault(block, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"phase2.{block}: expected a block of keys, found {preview(tree)}")
    if parameter:
        params = tree.setdefault(leaf, {})
        if not isinstance(params, dict):
            raise ConfigError(f"phase2.{key}: expected a block of names and values, found {preview(params)}")
        params[parameter] = value
    else:
        tree[leaf] = value


def _describe(error: ValidationError) -> str:
    """Return one line per problem: key, value, rule, nearest valid name, and the default as an example of a valid value."""
    keys = leaf_keys()
    lines: dict[str, None] = {}
    problems = error.errors(include_url=False)
    for item in problems[:MAX_PROBLEMS]:
        path = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            dotted = ".".join(path)
            lines[f"unknown configuration key {preview(dotted)}{near_match(dotted, keys)}"] = None
            continue
        if item["type"] == "value_error":
            lines[str(item["ctx"]["error"])] = None
            continue
        key = next((name for n in (1, 2) if (name := ".".join(path[:n])) in keys), path[0])
        message = item["msg"][0].lower() + item["msg"][1:]
        hint = ""
        if item["type"] == "literal_error" and isinstance(item["input"], str):
            choices = re.findall(r"'([^']+)'", item["ctx"]["expected"])
            near = difflib.get_close_matches(item["input"][:80], choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
        kind = "value" if key in keys else "block"
        example = f" (default: {_default(key)})" if key in keys else ""
        value = redact(preview(item["input"]))
        lines[f"phase2.{key}: {kind} {value} rejected: {message}{hint}{example}"] = None
    omitted = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return "\n".join([*lines, *omitted])


def _default(key: str) -> str:
    """Return the default of a key as YAML writes it."""
    value: Any = Phase2Config()
    for part in key.split("."):
        value = getattr(value, part)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
