"""Prefixes on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cedkv.errors import DataError
from cedkv.lm.cache import assemble
from cedkv.lm.store import load_prefix, save_prefix
from cedkv.types import Placement

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = tuple(torch.randn(1, 2, 3, 4).to(dtype) for _ in range(12))  # more than ten: "keys.10" is not after "keys.1"
    prefix = assemble(layers, layers[::-1], [Placement((0, 4, 5), (0, 1, 2), 3, 6)])
    save_prefix(prefix, tmp_path / "p.safetensors")
    loaded = load_prefix(tmp_path / "p.safetensors", CPU)
    assert torch.equal(loaded.visible, prefix.visible)
    assert torch.equal(loaded.query_start, prefix.query_start)
    for left, right in zip(loaded.keys + loaded.values, prefix.keys + prefix.values, strict=True):
        assert left.dtype == dtype
        assert torch.equal(left, right)


def test_anything_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(DataError, match="not a stored prefix"):
        load_prefix(path, CPU)
    path.write_bytes(b"\x80\x04 a pickle, say")
    with pytest.raises(DataError, match="not a stored prefix"):
        load_prefix(path, CPU)
    layers = (torch.randn(1, 2, 3, 4),)
    save_prefix(assemble(layers, layers, [Placement((0, 1, 2), (0, 1, 2), 3, 3)]), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="not a stored prefix"):
        load_prefix(path, CPU)
