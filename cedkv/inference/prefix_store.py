"""Prefixes on disk, as safetensors: no pickle is written or read.

A file has ``keys.N`` and ``values.N`` per layer, ``visible`` and ``query_start``, and in its metadata

    cedkv.prefix    JSON: the provenance of the prefix (``fingerprint.prefix_fingerprint``), the placement of every row, and
                    ``details``, what its maker wants to know of it again
    cedkv.sha256    digest of that JSON and of all tensors

A file is rejected, with the differences named, when it is damaged or was edited, or when the prefix was made by another model,
tokenizer, dtype or version, or for other tokens or positions than the requested ones.
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


def save_prefix(
    prefix: KVPrefix,
    placements: Sequence[Placement],
    provenance: Mapping[str, Any],
    path: Path,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write a prefix to ``path``; a complete file is put in place by a rename.

    Args:
        placements: one per row.
        provenance: ``prefix_fingerprint`` of the model.
        details: JSON values that ``load_with_details`` returns.
    """
    tensors = {"visible": prefix.visible, "query_start": prefix.query_start}
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        tensors[f"keys.{layer}"], tensors[f"values.{layer}"] = key, value
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    described = {"made_by": provenance, "placements": _as_dicts(placements), "details": details or {}}
    content = json.dumps(described, sort_keys=True, allow_nan=False)
    metadata = {CONTENT: content, DIGEST: tensors_digest(tensors.items(), content.encode())}
    partial = path.with_name(path.name + ".part")
    save_file(tensors, partial, metadata)
    partial.replace(path)


def load_prefix(path: Path, placements: Sequence[Placement], provenance: Mapping[str, Any], device: torch.device) -> KVPrefix:
    """Load a prefix that ``save_prefix`` wrote for the same placements and the same model.

    Args:
        placements: the expected placement of each row.
        provenance: ``prefix_fingerprint`` of the model.
        device: device of the loaded tensors.

    Raises:
        DataError: the file is missing, damaged, edited, or made by another model or for other placements; each difference is
            named.
    """
    content, tensors = _read(path)
    stored = content["made_by"] | _flat(content["placements"])
    _check_same(path, stored, {**provenance, **_flat(_as_dicts(placements))})
    return _prefix(tensors, device)


def load_with_details(
    path: Path, provenance: Mapping[str, Any], device: torch.device
) -> tuple[KVPrefix, list[Placement], dict[str, Any]]:
    """Load a prefix that ``save_prefix`` wrote for the same model, with its placements and its details.

    Raises:
        DataError: as ``load_prefix``, whatever the placements.
    """
    content, tensors = _read(path)
    _check_same(path, content["made_by"], provenance)
    placements = [
        Placement(tuple(p["kept_tokens"]), tuple(p["key_positions"]), p["query_start"], p["slots"])
        for p in content["placements"]
    ]
    return _prefix(tensors, device), placements, content["details"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what a file says about its prefix, and its tensors. Raises DataError: missing, damaged or edited."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is not a stored prefix: {error}; create it again") from None
    if not metadata.keys() >= {CONTENT, DIGEST}:
        raise DataError(f"{path} is not a stored prefix: it is safetensors of something else; create it again")
    if tensors_digest(tensors.items(), metadata[CONTENT].encode()) != metadata[DIGEST]:
        raise DataError(f"{path} does not fit its sha256: it was damaged or edited after it was written; create it again")
    content: dict[str, Any] = json.loads(metadata[CONTENT])
    return content, tensors


def _check_same(path: Path, stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raise DataError, which names the differences, if a prefix was made by or for something else."""
    expected = json.loads(json.dumps(requested))
    differing = [name for name in dict.fromkeys([*stored, *expected]) if stored.get(name) != expected.get(name)]
    if differing:
        lines = [f"{name}: {_short(stored.get(name))} stored, {_short(expected.get(name))} expected" for name in differing[:8]]
        if len(differing) > 8:
            lines.append(f"... and {len(differing) - 8} more")
        raise DataError(
            f"{path} holds a prefix made by another model or for other tokens, whose K/V are not valid here:\n  "
            + "\n  ".join(lines)
            + "\nCreate it again"
        )


def _prefix(tensors: Mapping[str, torch.Tensor], device: torch.device) -> KVPrefix:
    layers = range(sum(name.startswith("keys.") for name in tensors))
    return KVPrefix(
        tuple(tensors[f"keys.{layer}"].to(device) for layer in layers),
        tuple(tensors[f"values.{layer}"].to(device) for layer in layers),
        tensors["visible"].to(device),
        tensors["query_start"].to(device),
    )


def _as_dicts(placements: Sequence[Placement]) -> list[dict[str, Any]]:
    return [asdict(placement) for placement in placements]


def _flat(placements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Map ``row 3: key_positions`` to the value, for every row and field."""
    return {f"row {row}: {name}": value for row, placement in enumerate(placements) for name, value in placement.items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
