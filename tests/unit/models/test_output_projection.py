"""||W_o v|| from the Gram matrices of a model's output projection; models whose projection is given something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cedkv.core.errors import ModelError
from cedkv.kv.readers import value_norms
from cedkv.models.opening import open_spec
from cedkv.models.output_projection import grams, projections, unsupported_projection
from tests.families.models import FAMILIES, save
from tests.support import tiny

FAMILY = {family.name: family for family in FAMILIES}


def loaded(name: str, folder: Path) -> Any:
    return tiny.load(save(FAMILY[name], folder))[1]


@pytest.mark.parametrize("name", ["Llama", "Llama, one key head", "GPT-2", "GPT-NeoX (Pythia)", "Phi-3", "OPT", "gpt-oss"])
def test_norms_are_what_a_head_alone_writes(name: str, tmp_path: Path) -> None:
    """Whatever the projection's name, layout (Conv1D stores W_o transposed) and bias."""
    lm = loaded(name, tmp_path)
    found, by_layer = grams(lm), projections(lm.model)
    torch.manual_seed(0)
    for layer, gram in found.items():
        heads, dim = gram.shape[:2]
        kv_heads = lm.meta["kv_heads"]
        value = torch.randn(2, kv_heads, 3, dim)
        norms = value_norms(value, gram)
        projection = by_layer[layer]
        for row in range(2):
            for head in range(heads):
                for token in range(3):
                    alone = torch.zeros(1, heads * dim)
                    alone[0, head * dim : (head + 1) * dim] = value[row, head * kv_heads // heads, token]
                    written = (projection(alone) - projection(torch.zeros_like(alone))).norm()
                    assert float(norms[row, head, token]) == pytest.approx(float(written.detach()), rel=1e-4)
    assert set(found) == set(range(4))
    assert isinstance(by_layer[0], Conv1D) is (name == "GPT-2")


def test_measured_once(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lm = tiny.load(llama_folder)
    first = grams(lm)
    monkeypatch.setattr(lm.model, "forward", lambda *_, **__: pytest.fail("measured again"))
    assert grams(lm) is first


def test_a_norm_in_front_of_the_projection_is_rejected(tmp_path: Path) -> None:
    """BitNet normalises the attention output over all heads before it is projected."""
    with pytest.raises(
        ModelError, match=r"output projection of layer 0 is not given the attention output.*value_weighting=none"
    ):
        grams(loaded("BitNet", tmp_path))


@pytest.mark.parametrize("layer", [0, 2])
def test_a_gate_on_the_output_is_rejected_by_name(llama_folder: Path, layer: int) -> None:
    """As in Qwen3-Next: the projection is given the attention output times a gate."""
    _, lm = tiny.load(llama_folder)
    projection = lm.model.model.layers[layer].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, arguments: (arguments[0] * torch.sigmoid(arguments[0]),))
    with pytest.raises(ModelError, match=rf"{llama_folder}: the output projection of layer {layer} is not given"):
        grams(lm)


def test_a_projection_that_is_not_called_is_rejected(llama_folder: Path) -> None:
    """Its input is never seen: nothing says that its weights are W_o."""
    _, lm = tiny.load(llama_folder)
    attention = lm.model.model.layers[1].self_attn
    attention.forward = with_another_projection(attention, torch.nn.Linear(64, 64, bias=False))
    with pytest.raises(ModelError, match="output projection of layer 1"):
        grams(lm)


def with_another_projection(attention: Any, other: torch.nn.Module) -> Any:
    """The module's forward, in which another projection stands in for its own."""
    real, own = attention.forward, attention.o_proj

    def forward(*arguments: Any, **named: Any) -> Any:
        attention.o_proj = other
        try:
            return real(*arguments, **named)
        finally:
            attention.o_proj = own

    return forward


def test_no_projection_is_named(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names of the modules alone: the model is built without storage, and no weights are loaded."""
    spec = open_spec(tiny.config(llama_folder))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    assert unsupported_projection(spec) is None
    attention = spec.skeleton.model.layers[3].self_attn
    attention.mixing = attention._modules.pop("o_proj")
    assert unsupported_projection(spec) == "its attention in layer 3 has no o_proj, out_proj, dense, c_proj, wo"
    assert {parameter.device.type for parameter in spec.skeleton.parameters()} == {"meta"}


def test_bfloat16_is_within_its_rounding(tmp_path: Path) -> None:
    folder = save(replace(FAMILY["Llama"]), tmp_path)
    exact, rounded = (grams(tiny.load(folder, f"runtime.torch_dtype={dtype}")[1]) for dtype in ("float32", "bfloat16"))
    assert all((exact[n] - rounded[n]).abs().max() < 0.05 * exact[n].abs().max() for n in exact)
