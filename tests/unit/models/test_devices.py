"""Where a model runs. Spread models are run for real, over memory and disk; a second device is stood in for by ``meta``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cedkv.config.schema import RuntimeBlock
from cedkv.core.errors import ConfigError, ModelError
from cedkv.core.values import Placement, Record
from cedkv.kv.cache import KVPrefix, assemble, gather
from cedkv.kv.rope import RopeLayout
from cedkv.models import loading
from cedkv.models.devices import device_map, pick_device, to_device
from cedkv.models.fingerprint import weights_digest
from tests.support import tiny

SPREAD = {
    "model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "cpu", "model.layers.3": "disk", "model.norm": "disk", "lm_head": "cpu",
}  # fmt: skip


def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads put half of the layers on the disk, from where accelerate brings each in when it runs."""
    monkeypatch.setattr(loading, "device_map", lambda *_: SPREAD)


def floats(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, float)}


@pytest.mark.parametrize("kv_source", ["prefill", "gather"])
def test_spread_model_gives_the_same_figures(llama_folder: Path, monkeypatch: pytest.MonkeyPatch, kv_source: str) -> None:
    """All arms and Gate A: what a layer needs is where its weights are."""
    own = (f"prefix.kv_source={kv_source}", "eval.on_samples=2", "eval.off_samples=2", "eval.gate_a_samples=2")
    before = tiny.records(llama_folder, *own)
    spread(monkeypatch)
    after = tiny.records(llama_folder, *own)
    assert [set(one) for one in after] == [set(one) for one in before]
    for one, other in zip(after, before, strict=True):
        assert floats(one) == pytest.approx(floats(other), abs=1e-4)


def test_weights_on_the_disk_have_the_same_digest(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored results and prefixes belong to the weights, wherever those are."""
    _, whole = tiny.load(llama_folder)
    spread(monkeypatch)
    _, lm = tiny.load(llama_folder)
    assert lm.model.model.layers[1].mlp.up_proj.weight.is_meta
    assert lm.device == torch.device("cpu"), "of the embedding's inputs, whose weights are on the disk"
    assert lm.meta["device_map"] == SPREAD
    assert weights_digest(lm.model) == weights_digest(whole.model)


def test_device_map_auto(llama_folder: Path) -> None:
    """On a machine without an accelerator everything fits into memory."""
    config, lm = tiny.load(llama_folder, "runtime.device=auto", "runtime.device_map=auto")
    assert config.runtime.device_map == "auto"
    assert set(lm.meta["device_map"].values()) <= {"cpu", "mps", *map(str, range(torch.cuda.device_count()))}
    with pytest.raises(ConfigError, match=r"runtime\.device_map = auto spreads .* runtime\.device = cpu names one"):
        tiny.config(llama_folder, "runtime.device=cpu", "runtime.device_map=auto")


def on(device: str, *shape: int) -> torch.Tensor:
    return torch.ones(*shape, device=device)


def test_every_layer_of_a_prefix_stays_on_its_device() -> None:
    """One tensor that is taken to another device would be an error in the next pass of a model on two cards."""
    devices = ("cpu", "meta")
    layers = tuple(on(device, 2, 2, 6, 4) for device in devices)
    visible = torch.ones(2, 6, dtype=torch.bool)
    demo = KVPrefix(layers, layers, visible, torch.full((2,), 6))
    placements = [Placement((0, 3, 4), (0, 1, 2), 3, 5), Placement((2,), (0,), 1, 5)]
    keys, values = gather(demo, [0, 1], placements, (RopeLayout(torch.ones(2)),) * 2)
    made = assemble(keys, values, placements).rows([1, 0]).hide([[(0, 1)], [(0, 1)]])
    for layer, device in enumerate(devices):
        cached = made.fresh_cache().layers[layer]
        for tensor in (keys[layer], values[layer], made.keys[layer], made.values[layer], cached.keys, cached.values):
            assert tensor.device.type == device
    elsewhere = KVPrefix((on("cpu", 2, 2, 6, 4),) * 2, (on("cpu", 2, 2, 6, 4),) * 2, visible, torch.full((2,), 6))
    assert [key.device.type for key in elsewhere.to_devices_of(demo).keys] == list(devices)


class _Fixed(torch.nn.Module):
    """Stands for quantised or spread weights: moving or casting them raises in transformers."""

    def to(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("moved")

    def get_input_embeddings(self) -> torch.nn.Module:
        return torch.nn.Embedding(3, 2, device="meta")


def test_quantised_and_spread_models_are_never_moved() -> None:
    cpu = torch.device("cpu")
    assert device_map(RuntimeBlock(), cpu, quantised=False) is None
    assert device_map(RuntimeBlock(), cpu, quantised=True) == {"": cpu}
    assert device_map(RuntimeBlock(device_map="auto"), cpu, quantised=True) == "auto"
    assert to_device(_Fixed(), cpu, mapped=True) == torch.device("meta")
    with pytest.raises(AssertionError, match="moved"):
        to_device(_Fixed(), cpu, mapped=False)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq|GPTQ|optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq|AWQ|gptqmodel"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed"),
        ({"quant_method": "no-such-method"}, "no-such-method"),
    ],
)
def test_quantised_weights_that_cannot_be_loaded_here(tmp_path: Path, settings: dict[str, Any], what: str) -> None:
    """The checkpoint says how it is quantised; transformers says what it needs for that."""
    folder = tiny.save(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    with pytest.raises(ModelError, match=what) as caught:
        tiny.load(folder)
    assert "take one that is not quantised" in str(caught.value)


@pytest.mark.parametrize("setting", ["cuda:128", "cuda:255", "cuda:256", "cuda:99999999999"])
def test_an_index_that_torch_would_take_for_another_is_rejected(setting: str) -> None:
    """It holds 8 bits of it: cuda:256 would silently be the first card."""
    with pytest.raises(ConfigError, match=f"'{setting}' is no device"):
        pick_device(setting, anywhere=True)
