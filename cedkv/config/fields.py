"""Types of configuration values, and what all blocks of the configuration have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError, to_jsonable_python

from cedkv.core.errors import ConfigError
from cedkv.core.registry import Registry, build
from cedkv.core.shards import Shard
from cedkv.core.text import escape_control, redact


def check_text(text: str) -> str:
    """Return the text if it has neither control characters nor credentials."""
    if escape_control(text) != text or "\n" in text:
        raise PydanticCustomError("hidden", "text must hold no control or direction characters; remove them")
    if redact(text) != text:
        raise PydanticCustomError(
            "secret", "it holds credentials, and a configuration is stored with every run; give them by environment (HF_TOKEN)"
        )
    return text


def check_shard(text: str) -> str:
    """Return the text if it names a shard."""
    try:
        return str(Shard.parse(text))
    except ValueError as error:
        raise PydanticCustomError("shard", "{reason}", {"reason": str(error)}) from None


def name_in(registry: Registry[Any]) -> Callable[[str], str]:
    """Return a validator that accepts names of a registry."""

    def check(name: str) -> str:
        try:
            return registry.check(name)
        except ConfigError as error:
            raise PydanticCustomError("not_registered", "{reason}", {"reason": str(error)}) from None

    return check


Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(check_text)]
ShardName = Annotated[str, AfterValidator(check_shard)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Block(BaseModel):
    """Common rules of every configuration block: immutable, strictly typed, finite, and no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def filled_params(registry: Registry[Any], name: str, params: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the parameters of an implementation with those that have their default, so that every run records them.

    Args:
        key: the configuration key of the parameters, for messages.

    Raises:
        ValueError: the implementation rejects a parameter.
    """
    # Without params a built-in needs no check: all its parameters have defaults, and importing it takes time.
    if not params and name in registry.builtin:
        return params
    try:
        made = build(registry.get(name), params, key)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    filled: dict[str, Any] = to_jsonable_python({field.name: getattr(made, field.name) for field in fields(made)})
    return filled
