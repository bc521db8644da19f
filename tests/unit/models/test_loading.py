"""Loading: the model asked for, in the dtype asked for, or an error that says why and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cedkv.core.errors import ConfigError, ModelError
from cedkv.models import hub, opening, smollm2
from cedkv.models.devices import pick_device
from tests.support import tiny

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of the test's own, to be damaged."""
    return tiny.save(tmp_path / "model", "llama")


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def rejected(name: Path | str, *overrides: str, match: str = "") -> str:
    with pytest.raises(ModelError, match=match) as caught:
        tiny.load(name, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "no-such-model"])
def test_hub_that_cannot_be_reached_names_the_cause_and_three_ways_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is taken in the model's place."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = rejected(name, match=f"model '{name}' cannot be loaded: .*connect to")
    assert "No other model is used in its place" in message
    for way in ("HF_ENDPOINT", "hf auth login", "model_id=/path/to/folder", f"model_id={smollm2.NAME}"):
        assert way in message


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "../model", "~/no-such-model", "models/of/mine"])
def test_a_path_that_is_not_there_is_no_hub_id(name: str) -> None:
    message = rejected(name, match="there is no such folder")
    assert os.path.abspath(os.path.expanduser(name)) in message


def test_gated_model_tells_to_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own words are kept; they say which page has the licence to accept."""

    def gated(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://example.org/m. 401")

    monkeypatch.setattr(hub, "cached_file", gated)
    assert "hf auth login" in rejected(
        "org/gated", match=r"gated repo\. Make sure to have access to it at https://example.org/m"
    )


def test_missing_weights_are_not_random_numbers(folder: Path) -> None:
    """transformers fills them in with a mere warning."""
    set_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    rejected(folder, match=r"model\.layers\.1\.mlp\.up_proj\.weight'\] are missing")


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    set_config(folder, intermediate_size=96)
    rejected(folder, match=r"model\.layers\.0\.mlp\.down_proj\.weight.*have another shape")


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("pickle-was-read",)


def test_pickled_weights_are_rejected_unread(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .bin file is a pickle, and reading one runs what is in it."""
    monkeypatch.chdir(tmp_path)
    (folder / WEIGHTS).unlink()
    torch.save({"model.norm.weight": torch.ones(64), "x": _Bomb()}, folder / "pytorch_model.bin")
    rejected(folder, match=r"pytorch_model\.bin, and reading that file runs code in it")
    assert not Path("pickle-was-read").exists()


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtype_is_the_one_asked_for(tmp_path: Path, saved: torch.dtype, wanted: str) -> None:
    """``from_pretrained`` takes the checkpoint's dtype unless told; bfloat16 flips near-tied answers."""
    tiny.model("llama").to(saved).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    _, lm = tiny.load(tmp_path, f"runtime.torch_dtype={wanted}")
    assert {parameter.dtype for parameter in lm.model.parameters()} == {getattr(torch, wanted)}
    assert {turn.inv_freq.dtype for turn in lm.rope_layouts} == {torch.float32}, "positions in bfloat16 are wrong beyond 256"
    assert lm.meta["torch_dtype"] == wanted


def test_what_is_loaded_is_ready_for_scoring(model_folder: Path) -> None:
    """Dropout off, our attention on, and the facts of the report are those of the model."""
    _, lm = tiny.load(model_folder)
    assert not lm.model.training
    assert lm.model.config._attn_implementation == "cedkv"
    assert (lm.meta["layers"], lm.meta["query_heads"], lm.meta["kv_heads"], lm.meta["vocabulary"]) == (4, 4, 2, 500)
    assert lm.meta["parameters"] == sum(parameter.numel() for parameter in lm.model.parameters())
    json.dumps(lm.meta, allow_nan=False)


def test_layer_beyond_the_last_is_rejected_before_weights_are_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=r"layer_scope\.injection names layer 4, the model's last is 3"):
        tiny.load(folder, "layer_scope.injection=[0,4]")


def test_a_folder_has_no_revisions(folder: Path) -> None:
    """The run would say a revision that nothing in it is of."""
    with pytest.raises(ConfigError, match=r"model\.revision = 'main': .* has no revisions, as a hub model has; leave it null"):
        tiny.load(folder, "model.revision=main")


@pytest.mark.parametrize(("bos", "by"), [(True, "tokenizer"), (False, "no one")])
def test_meta_says_who_puts_bos(tmp_path: Path, bos: bool, by: str) -> None:
    assert tiny.load(tiny.save(tmp_path, bos=bos))[1].meta["bos_put_by"] == by


def test_smollm2_has_no_revisions() -> None:
    with pytest.raises(ConfigError, match="leave it null"):
        tiny.load(smollm2.NAME, "model.revision=main")


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_an_error_not_the_cpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda:99")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if device == "cuda:99" else 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"runtime\.device = '{device}' is not available .*; use auto or cpu"):
        pick_device(device)


def test_auto_takes_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device("auto").type == expected


@pytest.mark.parametrize(
    ("dtype", "method", "match"),
    [
        (torch.bfloat16, "fp8", r"is bfloat16 after loading.*float32: the model is quantised \(fp8\).*torch_dtype=bfloat16"),
        (torch.float16, None, r"is float16 after loading.*not marked as quantised.*torch_dtype=float16"),
        (torch.float8_e4m3fn, None, r"is float8_e4m3fn after loading.*Take a model that is not quantised$"),
    ],
)
def test_weights_in_another_dtype_than_asked_for_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, method: str | None, match: str
) -> None:
    """What transformers unpacks to a dtype of its own would be multiplied with activations of another."""
    real = AutoModelForCausalLM.from_pretrained

    def unpacked(*arguments: Any, **named: Any) -> Any:
        model, info = real(*arguments, **named)
        model.model.layers[1].mlp.up_proj.to(dtype)
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unpacked)
    monkeypatch.setattr(opening, "_quantisation", lambda _: method)
    rejected(folder, match=match)


def test_the_method_of_quantised_weights_is_the_opened_configuration_s(folder: Path) -> None:
    """Without a GPU transformers unpacks float8 weights and forgets that they were quantised."""
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    set_config(folder, quantization_config=settings)

    def packed(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if "proj" in name]:
            weights[name] = weights[name].to(torch.float8_e4m3fn)
            rows, columns = weights[name].shape
            weights[f"{name}_scale_inv"] = torch.ones(rows // 16, columns // 16)

    set_weights(folder, packed)
    if torch.cuda.is_available():
        pytest.skip("weights stay packed on a GPU")
    _, lm = tiny.load(folder)
    assert lm.meta["quantisation"] == "fp8"
    assert lm.meta["parameter_dtypes"] == {"float32": len(list(lm.model.parameters()))}
