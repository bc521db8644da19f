"""Prefixes on disk, as safetensors: no pickle is written or read.

A file is ``keys.N`` and ``values.N`` a layer, ``visible`` and ``query_start``, and in its metadata

    cedkv.prefix    JSON: what the prefix was made by (``fingerprint.prefix_fingerprint``), and the placement of every row
    cedkv.sha256    digest of that JSON and of all tensors

Loading is refused, naming what differs, when the file is damaged or was edited, or when the prefix was made by another model,
tokenizer, dtype or version, or for other tokens or positions than those asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cedkv.core.errors import DataError
from cedkv.core.values import Placement
from cedkv.kv.cache import KVPrefix
from cedkv.models.fingerprint import tensors_digest

CONTENT, DIGEST = "cedkv.prefix", "cedkv.sha256"


def save_prefix(prefix: KVPrefix, placements: Sequence[Placement], made_by: Mapping[str, Any], path: Path) -> None:
    """Write a prefix; the file takes its name when it is whole.

    Args:
        placements: of each row.
        made_by: ``prefix_fingerprint`` of the model.
    """
    tensors = {"visible": prefix.visible, "query_start": prefix.query_start}
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        tensors[f"keys.{layer}"], tensors[f"values.{layer}"] = key, value
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = json.dumps({"made_by": made_by, "placements": _plain(placements)}, sort_keys=True, allow_nan=False)
    metadata = {CONTENT: content, DIGEST: tensors_digest(tensors.items(), content.encode())}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata)
    part.replace(path)


def load_prefix(path: Path, placements: Sequence[Placement], made_by: Mapping[str, Any], device: torch.device) -> KVPrefix:
    """Read what ``save_prefix`` wrote, for the same placements and the same model.

    Raises:
        DataError: no such file, damaged, edited, or made by or for something else; each difference is named.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is not a stored prefix: {error}; make it again") from None
    if not metadata.keys() >= {CONTENT, DIGEST}:
        raise DataError(f"{path} is not a stored prefix: it is safetensors of something else; make it again")
    if tensors_digest(tensors.items(), metadata[CONTENT].encode()) != metadata[DIGEST]:
        raise DataError(f"{path} does not fit its sha256: it was damaged or edited after it was written; make it again")
    content = json.loads(metadata[CONTENT])
    then = content["made_by"] | _flat(content["placements"])
    now = json.loads(json.dumps({**made_by, **_flat(_plain(placements))}))
    differing = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    if differing:
        shown = [f"{name}: {_short(then.get(name))} stored, {_short(now.get(name))} wanted" for name in differing[:8]]
        raise DataError(
            f"{path} holds a prefix made by or for something else, whose K/V mean nothing here:\n  "
            + "\n  ".join([*shown, *([f"... and {len(differing) - 8} more"] if len(differing) > 8 else [])])
            + "\nMake it again"
        )
    layers = range(sum(name.startswith("keys.") for name in tensors))
    return KVPrefix(
        tuple(tensors[f"keys.{layer}"].to(device) for layer in layers),
        tuple(tensors[f"values.{layer}"].to(device) for layer in layers),
        tensors["visible"].to(device),
        tensors["query_start"].to(device),
    )


def _plain(placements: Sequence[Placement]) -> list[dict[str, Any]]:
    return [asdict(placement) for placement in placements]


def _flat(placements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``row 3: key_positions`` -> its value."""
    return {f"row {row}: {name}": value for row, placement in enumerate(placements) for name, value in placement.items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
