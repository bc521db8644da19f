"""Where a configuration comes from: a YAML file, ``key=value`` overrides, named options. All of it ends in one check."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cedkv.config.options import OPTIONS
from cedkv.config.schema import Phase2Config, Text
from cedkv.core.errors import ConfigError
from cedkv.core.files import open_user_text
from cedkv.core.text import near_match, preview, redact

MAX_BYTES, MAX_DEPTH, MAX_PROBLEMS = 100_000, 10, 10
"""Of a configuration file, and of what is said about one."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and aliases; ``1e-4`` is a number, and ``010`` and ``1:30`` are not 8 and 90."""

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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if str(key_node.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key_node.value!r} appears twice", problem_mark=key_node.start_mark)
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The counterpart: quotes a text that ``_Loader`` would read as a number."""


_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.rsplit(":", 1)[-1] not in _NUMBERS]
    for first, forms in _Loader.yaml_implicit_resolvers.items()
}
for _name, _form in _NUMBERS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^({_form})$"), list("-+.0123456789"))


def to_yaml(config: Phase2Config) -> str:
    """The configuration as the text of a file that ``resolve`` reads back to the same values."""
    return yaml.dump({"phase2": config.model_dump()}, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def leaf_keys() -> dict[str, Any]:
    """Every configuration key (``select.mode``) with its annotation."""
    keys: dict[str, Any] = {}
    for name, field in Phase2Config.model_fields.items():
        block = field.annotation
        if isinstance(block, type) and issubclass(block, BaseModel):
            keys.update({f"{name}.{leaf}": f.annotation for leaf, f in block.model_fields.items()})
        else:
            keys[name] = field.annotation
    return keys


def resolve(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    options: Mapping[str, str | None] | None = None,
) -> Phase2Config:
    """Read, merge and check a configuration.

    Args:
        path: YAML file with a ``phase2`` block; None for the defaults.
        overrides: texts like ``select.span_len=6,eval.off_samples=32``.
        options: values by names of ``OPTIONS``; None values are not set.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid one), bad value, or a contradiction.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    pairs = [pair for text in overrides for pair in _split_overrides(text)]
    for name, value in (options or {}).items():
        if value is not None:
            pairs.append((OPTIONS[name][0], value))
    return _checked(tree, pairs)


def resolve_over(config: Phase2Config, settings: Mapping[str, str]) -> Phase2Config:
    """Another configuration with some keys set, read and checked as overrides are. Raises ConfigError as ``resolve``."""
    return _checked(config.model_dump(), list(settings.items()))


def _checked(tree: dict[str, Any], pairs: list[tuple[str, str]]) -> Phase2Config:
    for key, text in pairs:
        _assign(tree, key, text)
    try:
        return Phase2Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_readable(error)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    name = preview(str(path), 200)
    try:
        with open_user_text(path, MAX_BYTES) as file:
            text = file.read()
    except ValueError as error:
        raise ConfigError(f"cannot read configuration {name}: {error}; give the path of a YAML file") from None
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not readable as YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(tree, dict) or set(tree) != {"phase2"} or not isinstance(tree["phase2"], dict | None):
        found = preview(list(islice(tree, 5))) if isinstance(tree, dict) else type(tree).__name__
        raise ConfigError(f"{name}: expected exactly one top-level block 'phase2:', found {found}")
    return tree["phase2"] or {}


def _split_overrides(text: str) -> list[tuple[str, str]]:
    """``a=1,b=[1,2]`` -> pairs; commas inside brackets or quotes do not split."""
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
    known = leaf_keys()
    parameter = ""
    if key.startswith("select.params."):
        key, parameter = "select.params", key.removeprefix("select.params.")
    if key not in known:
        raise ConfigError(f"unknown configuration key {preview(key)}{near_match(key, known)}")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{key} = {preview(text)}: not readable as a YAML value; quote it if it is text") from None
    only_text = set(get_args(known[key]) or (known[key],)) <= {str, type(None), Text}
    if only_text and not text.startswith(("'", '"')) and (value is not None or text.startswith("#")):
        value = text  # as it stands: YAML would drop what follows " #", and read 123 as a number
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


def _readable(error: ValidationError) -> str:
    """One line per problem: key, value, rule, nearest valid name, and the default as an example of what is right."""
    known = leaf_keys()
    lines: dict[str, None] = {}
    problems = error.errors(include_url=False)
    for item in problems[:MAX_PROBLEMS]:
        path = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            dotted = ".".join(path)
            lines[f"unknown configuration key {preview(dotted)}{near_match(dotted, known)}"] = None
            continue
        if item["type"] == "value_error":
            lines[str(item["ctx"]["error"])] = None
            continue
        key = next((name for n in (1, 2) if (name := ".".join(path[:n])) in known), path[0])
        message = item["msg"][0].lower() + item["msg"][1:]
        hint = ""
        if item["type"] == "literal_error" and isinstance(item["input"], str):
            choices = re.findall(r"'([^']+)'", item["ctx"]["expected"])
            near = difflib.get_close_matches(item["input"][:80], choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
        what = "value" if key in known else "block"
        example = f" (default: {_default(key)})" if key in known else ""
        value = redact(preview(item["input"]))
        lines[f"phase2.{key}: {what} {value} refused: {message}{hint}{example}"] = None
    more = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return "\n".join([*lines, *more])


def _default(key: str) -> str:
    value: Any = Phase2Config()
    for part in key.split("."):
        value = getattr(value, part)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
