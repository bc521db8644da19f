"""What config.json says, and whether it contradicts itself: transformers takes one of two values and says nothing.

A contradiction is rejected by the names of both values. What the file leaves out, and transformers fills in with a default that
no weight shows, is stated: in a run's facts about the model, and in the certificate.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cedkv.core.errors import ModelError
from cedkv.core.text import preview
from cedkv.models.weight_files import adapter_alone, gguf_hint, read_json

_ROPE_SETTINGS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Settings of config.json that may stand at its top and among the settings of RoPE."""


def check_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json, as it is written.

    Raises:
        ModelError: config.json is missing, unreadable, names no model type, contradicts itself, or is of another library.
    """
    path = folder / "config.json"
    if not path.exists():
        holds = ", ".join(sorted(each.name for each in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            adapter_alone(folder)
            or f"model.id = {str(folder)!r} is not a model folder: it has no config.json (it holds {holds}). Give the folder "
            f"that holds config.json, *.safetensors and tokenizer.json; a download may have stopped.{gguf_hint(folder)}"
        )
    content = read_json(path)
    if not isinstance(content.get("model_type"), str):
        raise ModelError(f'{path} names no model: it needs a "model_type"; take the one of the checkpoint')
    quantised = content.get("quantization_config", content.get("quantization"))
    if isinstance(quantised, dict) and {"bits", "group_size"} <= quantised.keys() and "quant_method" not in quantised:
        raise ModelError(
            f"{path} is of a model converted for MLX (quantization: {preview(quantised)}), whose packed weights transformers "
            "does not read; take the model that it was converted from"
        )
    for setting, here, there in _contradictions(content):
        raise ModelError(
            f"{path} contradicts itself: {setting} is {preview(here)} and {preview(there)}, and transformers takes one of them "
            "without a word. Keep the one that the model was trained with"
        )
    return content


def _contradictions(content: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (setting, value, other value)."""
    given = {name: content.get(name) for name in ("rope_parameters", "rope_scaling")}
    rope, scaling = ({**value} if isinstance(value, dict) else {} for value in given.values())
    for settings in (rope, scaling):
        if "type" in settings:
            if settings.setdefault("rope_type", settings["type"]) != settings["type"]:
                yield "the type of RoPE", settings["type"], settings["rope_type"]
            del settings["type"]
    if rope and scaling:
        for key in sorted((rope.keys() | scaling.keys()) - {"rope_theta"}):
            default = "default" if key == "rope_type" else None
            if rope.get(key, default) != scaling.get(key, default):
                yield f"{key} of rope_parameters and of rope_scaling", rope.get(key, default), scaling.get(key, default)
    for key in _ROPE_SETTINGS:
        values = [each[key] for each in (content, rope, scaling) if each.get(key) is not None]
        for value in values[1:]:
            if value != values[0]:
                yield key, values[0], value


def defaults_taken(content: dict[str, Any], config: Any) -> list[str]:
    """Return what config.json leaves out and no weight shows, each with the value that transformers takes.

    Args:
        content: config.json as it is written.
        config: the configuration that the model is made of.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    theta, length = rope.get("rope_theta"), getattr(config, "max_position_embeddings", None)
    written = _keys(content)
    taken = []
    if theta is not None and not any("theta" in key or "base" in key for key in written if key.startswith(("rope", "rotary"))):
        taken.append(f"config.json names no rope_theta: transformers takes {theta:g}")
    if not {"max_position_embeddings", config.attribute_map.get("max_position_embeddings")} & written:
        taken.append(f"config.json names no max_position_embeddings: transformers takes {length}")
    return taken


def _keys(content: dict[str, Any]) -> set[str]:
    """Return the keys of a configuration and of the settings in it."""
    inner = [_keys(value) for value in content.values() if isinstance(value, dict)]
    return set(content).union(*inner)
