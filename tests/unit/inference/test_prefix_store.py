"""Prefixes on disk: what comes back is what went in, and nothing else is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cedkv.core.errors import DataError
from cedkv.core.values import Placement
from cedkv.inference.prefix_store import CONTENT, load_prefix, save_prefix
from cedkv.kv.cache import KVPrefix, assemble
from cedkv.models import fingerprint
from tests.support import tiny

CPU = torch.device("cpu")
PLACED = [Placement((0, 4, 5), (0, 1, 2), 3, 6)]
MADE_BY = {"model.id": "a", "model.weights": "00", "runtime.torch_dtype": "float32", "versions.torch": "2"}


def made(dtype: torch.dtype = torch.float32, layers: int = 12) -> KVPrefix:
    torch.manual_seed(0)
    some = tuple(torch.randn(1, 2, 3, 4).to(dtype) for _ in range(layers))  # more than ten: "keys.10" is not after "keys.1"
    return assemble(some, some[::-1], PLACED)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    save_prefix(made(), PLACED, MADE_BY, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    prefix, path = made(dtype), tmp_path / "p.safetensors"
    save_prefix(prefix, PLACED, MADE_BY, path)
    loaded = load_prefix(path, PLACED, MADE_BY, CPU)
    assert torch.equal(loaded.visible, prefix.visible)
    assert torch.equal(loaded.query_start, prefix.query_start)
    for left, right in zip(loaded.keys + loaded.values, prefix.keys + prefix.values, strict=True):
        assert left.dtype == dtype
        assert torch.equal(left, right)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_file_that_is_none_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(DataError, match="not a stored prefix"):
        load_prefix(path, PLACED, MADE_BY, CPU)
    path.write_bytes(b"\x80\x04 a pickle, say")
    with pytest.raises(DataError, match="not a stored prefix"):
        load_prefix(path, PLACED, MADE_BY, CPU)
    save_file({"keys.0": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="safetensors of something else"):
        load_prefix(path, PLACED, MADE_BY, CPU)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1, -5])
def test_a_truncated_file_is_rejected(stored: Path, kept: int) -> None:
    stored.write_bytes(stored.read_bytes()[:kept])
    with pytest.raises(DataError, match="not a stored prefix"):
        load_prefix(stored, PLACED, MADE_BY, CPU)


def test_a_file_with_any_byte_changed_is_rejected(stored: Path) -> None:
    whole = stored.read_bytes()
    for at in range(0, len(whole), 13):
        stored.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"not a stored prefix|does not fit its sha256"):
            load_prefix(stored, PLACED, MADE_BY, CPU)


def one_value(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["keys.3"][0, 0, 0, 0] += 1e-6


def another_dtype(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["values.0"] = tensors["values.0"].to(torch.bfloat16)


def layers_swapped(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["keys.0"], tensors["keys.1"] = tensors["keys.1"], tensors["keys.0"]


def one_layer_less(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    del tensors["keys.11"], tensors["values.11"]


def other_positions(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    content = json.loads(metadata[CONTENT])
    content["placements"][0]["query_start"] = 9
    metadata[CONTENT] = json.dumps(content)


@pytest.mark.parametrize("edit", [one_value, another_dtype, layers_swapped, one_layer_less, other_positions])
def test_an_edited_file_is_rejected(stored: Path, edit: Callable[..., None]) -> None:
    with safe_open(stored, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(tensors, metadata)
    save_file(tensors, stored, metadata)
    with pytest.raises(DataError, match="damaged or edited"):
        load_prefix(stored, PLACED, MADE_BY, CPU)


@pytest.mark.parametrize("name", MADE_BY)
def test_one_made_by_something_else_is_rejected_by_name(stored: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: {MADE_BY[name]} stored, other expected"):
        load_prefix(stored, PLACED, {**MADE_BY, name: "other"}, CPU)


@pytest.mark.parametrize(
    "changes", [{"kept_tokens": (0, 4, 6)}, {"key_positions": (0, 4, 5)}, {"query_start": 4}, {"slots": 3}], ids=str
)
def test_one_for_other_tokens_or_positions_is_rejected_by_name(stored: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"row 0: {next(iter(changes))}: .* stored, .* expected"):
        load_prefix(stored, [replace(PLACED[0], **changes)], MADE_BY, CPU)
    with pytest.raises(DataError, match="row 1: kept_tokens: None stored"):
        load_prefix(stored, PLACED * 2, MADE_BY, CPU)


def test_the_fingerprint_tells_models_apart(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of another seed, dtype or tokenizer are another model; the weights are read once."""
    read = []
    real = fingerprint.tensors_digest
    monkeypatch.setattr(fingerprint, "tensors_digest", lambda *given, **more: read.append(1) or real(*given, **more))
    _, lm = tiny.load(llama_folder)
    first = fingerprint.prefix_fingerprint(lm)
    assert fingerprint.prefix_fingerprint(lm) == first
    assert len(read) == len(lm.model.state_dict())
    _, again = tiny.load(llama_folder)
    assert fingerprint.prefix_fingerprint(again) == first
    assert first.keys() == {
        "model.id", "model.revision", "model.commit", "model.weights", "model.tokenizer", "runtime.torch_dtype",
        "versions.cedkv", "versions.torch", "versions.transformers",
    }  # fmt: skip

    def differing(folder: Path, *overrides: str) -> set[str]:
        other = fingerprint.prefix_fingerprint(tiny.load(folder, *overrides)[1])
        return {name for name in first if first[name] != other[name]}

    assert differing(tiny.save(tmp_path / "seed", "llama", seed=1)) == {"model.id", "model.weights"}
    assert differing(tiny.save(tmp_path / "bos", "llama", bos=True)) == {"model.id", "model.tokenizer"}
    assert differing(llama_folder, "runtime.torch_dtype=bfloat16") == {"model.weights", "runtime.torch_dtype"}


def test_no_pickle_is_read_or_written_anywhere() -> None:
    """Weights come through ``from_pretrained(use_safetensors=True)``, prefixes through safetensors."""
    sources = {path: path.read_text() for folder in ("cedkv", "entrypoints") for path in Path(folder).rglob("*.py")}
    assert len(sources) > 30
    for path, text in sources.items():
        for word in ("torch.load", "torch.save", "pickle", "joblib", "np.load", "allow_pickle", "weights_only"):
            assert word not in text.replace("no pickle is written or read", ""), f"{path}: {word}"
        assert text.count("from_pretrained(") == 0 or path.parts[1] == "models", path
    loading = sources[Path("cedkv/models/loading.py")]
    assert loading.count("AutoModelForCausalLM.from_pretrained(") == loading.count("use_safetensors=True") == 1
