"""Models out of a GGUF file: the same logits and ids as the model it was written from, or a rejection by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType, dequantize, quantize

from cedkv.checks import certificate
from cedkv.cli.data import data_command
from cedkv.config.resolve import resolve
from cedkv.core.errors import ConfigError, ModelError
from cedkv.models import gguf_file, gguf_model, loading, model_cache
from cedkv.models.fingerprint import fingerprint, prefix_fingerprint
from cedkv.models.opening import open_spec
from tests.support import gguf_making, tiny
from tests.support.gguf_making import SMALL_GEMMA3

Q8_0 = GGMLQuantizationType.Q8_0
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
LINEAR = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama, tied": ("llama", "llama", {"tie_word_embeddings": True}),
    "llama, as 3.2": ("llama", "llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": ("gemma3", "gemma3_text", SMALL_GEMMA3),
    "gemma3, as 4B": ("gemma3", "gemma3_text", {**SMALL_GEMMA3, "rope_parameters": LINEAR}),
}
"""Name -> architecture in GGUF, model type, settings of the tiny model."""


def rope_factors(model: Any) -> np.ndarray:
    """By what llama.cpp's converter says each frequency is divided: its formula, from the paper's parameters."""
    head_dim, rope = model.config.head_dim, model.config.rope_parameters
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    smooth = (8192 / wavelengths - 1) / (4 - 1)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    low = np.where(wavelengths > 8192, rope["factor"], between)
    return np.where(wavelengths < 8192 / 4, 1.0, low).astype(np.float32)


def parts(name: str = "llama") -> tuple[Any, str, dict[str, Any], dict[str, np.ndarray]]:
    """A tiny model, its architecture in GGUF, its metadata and tensors."""
    architecture, model_type, settings = KINDS[name]
    model = tiny.model(model_type, **settings)
    for key, weight in model.named_parameters():  # norms that are all 1 (Gemma: 0) would hide an offset
        if "norm" in key:
            torch.nn.init.normal_(weight, mean=weight.mean().item(), std=0.2)
    metadata = {
        **gguf_making.described(model, architecture),
        **gguf_making.vocabulary(tiny.tokenizer(), "gpt-2"),
        "general.file_type": 0,
    }
    weights = gguf_making.tensors(model, architecture)
    if model.config.rope_parameters.get("rope_type") == "llama3":
        weights["rope_freqs.weight"] = rope_factors(model)
    return model, architecture, metadata, weights


def written(path: Path, name: str = "llama", without: str = "-", **changes: Any) -> Path:
    """A GGUF file of a kind, less the tensors with ``without`` in the name; ``changes``: of metadata, with __ for a dot."""
    _, architecture, metadata, weights = parts(name)
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    return gguf_making.write(path, architecture, metadata, {key: value for key, value in weights.items() if without not in key})


def load(path: Path, cache: Path, *overrides: str) -> loading.LanguageModel:
    return tiny.load(path, f"model.cache_dir={cache}", *overrides)[1]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(7, 47)[None]).logits
    return found


# --- the model is the one of the file


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_model_the_file_was_written_from(name: str, tmp_path: Path) -> None:
    """40 tokens: more than the sliding window of 24, so that a window, a scaling or a norm that is lost shows."""
    model, architecture, metadata, weights = parts(name)
    lm = load(gguf_making.write(tmp_path / "m.gguf", architecture, metadata, weights), tmp_path / "cache")
    expected = logits(model)
    assert (logits(lm.model) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert lm.meta["weights_without_place"] == []
    assert lm.meta["gguf"]["architecture"] == architecture


def test_quantised_weights_are_the_dequantised_ones(tmp_path: Path) -> None:
    _, architecture, metadata, weights = parts()
    path = gguf_making.write(tmp_path / "m.gguf", architecture, metadata | {"general.file_type": 7}, weights, {"ffn_up": Q8_0})
    lm = load(path, tmp_path / "cache")
    expected = dequantize(quantize(weights["blk.2.ffn_up.weight"], Q8_0), Q8_0)
    assert np.array_equal(lm.model.state_dict()["model.layers.2.mlp.up_proj.weight"].numpy(), expected)
    assert not np.array_equal(expected, weights["blk.2.ffn_up.weight"]), "Q8_0 rounds"
    assert lm.meta["quantisation"] is None, "what is loaded is float32"
    assert lm.meta["gguf"]["quantisation"] == "Q8_0"
    assert lm.meta["gguf"]["tensor_types"] == {"F32": 35, "Q8_0": 4}


def test_the_engine_runs_on_it(tmp_path: Path) -> None:
    records = tiny.records(written(tmp_path / "m.gguf"), f"model.cache_dir={tmp_path / 'cache'}")
    assert {record["kind"] for record in records if record["type"] == "sample"} == {"on", "off"}


# --- the cache


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, Path]:
    """A file, and the cache in which it is converted."""
    path = written(tmp_path / "m.gguf")
    load(path, tmp_path / "cache")
    return path, tmp_path / "cache"


def test_a_file_is_converted_once_wherever_it_lies(converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = converted
    first = load(path, cache)
    for step in ("read", "convert_weights", "convert_tokenizer"):
        monkeypatch.setattr(gguf_model, step, lambda *_: pytest.fail("converted again"))
    moved = shutil.copy(path, path.with_name("other.gguf"))
    second = load(moved, cache)
    assert second.meta["gguf"] == {**first.meta["gguf"], "file": "other.gguf"}
    assert first.meta["gguf"]["sha256"] == model_cache.sha256(path)
    assert fingerprint(first) == fingerprint(second)
    assert prefix_fingerprint(first) == prefix_fingerprint(second)
    assert certificate.identity(first, fingerprint(first)) == certificate.identity(second, fingerprint(second))
    assert fingerprint(first)["model.gguf"] == model_cache.sha256(path)


def test_another_file_of_that_name_is_another_model(converted: tuple[Path, Path]) -> None:
    path, cache = converted
    first = load(path, cache)
    written(path, general__name="the same weights, another file")
    second = load(path, cache)
    assert fingerprint(first)["model.gguf"] != fingerprint(second)["model.gguf"]
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 4


def test_damaged_weights_are_made_again(converted: tuple[Path, Path]) -> None:
    path, cache = converted
    expected = logits(load(path, cache).model)
    (weights,) = cache.glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert torch.equal(logits(load(path, cache).model), expected)
    assert len(list(cache.glob("*-damaged-*/files/model.safetensors"))) == 1


def test_opening_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``cedkv data`` needs a tokenizer alone."""
    monkeypatch.setattr(gguf_model, "convert_weights", lambda *_: pytest.fail("weights were converted"))
    path, cache = written(tmp_path / "m.gguf"), tmp_path / "cache"
    arguments = ["--model_id", str(path), "--set", f"model.cache_dir={cache}", "--task", "symbol_lookup", "--show", "1"]
    found = CliRunner().invoke(data_command, arguments)
    assert found.exit_code == 0, found.output
    assert "Symbol:" in found.output
    assert list(cache.glob("*/model.safetensors")) == []


def test_too_little_space_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = written(tmp_path / "m.gguf"), tmp_path / "cache"
    spec = open_spec(tiny.config(path, f"model.cache_dir={cache}"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(model_cache.shutil, "disk_usage", lambda _: usage._replace(free=150_000_000))
    with pytest.raises(ModelError, match=r"needs 0\.2 GB of disk space in .*cache, which has 0\.15 GB free: nothing was conv"):
        loading.load(tiny.config(path, f"model.cache_dir={cache}"), spec)


# --- rejected by name, before anything is converted


def truncated(path: Path, keep: float) -> Path:
    content = written(path).read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def of(content: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return write


def with_tensor(name: str, values: np.ndarray, kind: str = "llama") -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        _, architecture, metadata, weights = parts(kind)
        return gguf_making.write(path, architecture, metadata, {**weights, name: values})

    return write


REJECTED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (of(b""), r"is not a GGUF file: its 0 bytes begin with b'', not b'GGUF'"),
    "a pointer": (of(b"version https://git-lfs.github.com/spec/v1\n"), r"begin with b'vers'.*git-lfs has pointers"),
    "a header alone": (of(b"GGUF\x03\0\0\0"), "cannot be read as GGUF.*it has 8 bytes.*download it again"),
    "version 1": (of(b"GGUF\x01\0\0\0" + bytes(64)), "cannot be read as GGUF.*version 1"),
    "cut in the metadata": (lambda path: truncated(path, 0.005), "cannot be read as GGUF.*cut short"),
    "cut in the tensors": (lambda path: truncated(path, 0.9), "cannot be read as GGUF.*cut short"),
    "another architecture": (
        lambda path: gguf_making.write(path, "phi3", {}, {}), "architecture 'phi3'.*llama, qwen2, qwen3, gemma3",
    ),
    "a piece": (lambda path: written(path, split__count=3), "one of 3 pieces.*llama-gguf-split --merge"),
    "an adapter": (lambda path: written(path, general__type="adapter"), r"holds no model but 'adapter'"),
    "a tensor missing": (
        lambda path: written(path, without="blk.1.ffn_up"), r"lacks 1 tensors for 4 layers of llama, such as blk\.1\.ffn_up",
    ),
    "a bias that would be dropped": (with_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)), r"blk\.0\.attn_q\.bias"),
    "integers": (with_tensor("output.weight", np.ones((500, 64), np.int32)), "type I32, which .* cannot dequantise"),
    "experts": (lambda path: written(path, llama__expert_count=8), r"llama\.expert_count is 8, which transformers drops"),
    "yarn": (
        lambda path: written(path, llama__rope__scaling__type="yarn"),
        r"llama\.rope\.scaling\.type is 'yarn', and transformers reads 'none'",
    ),
    "part of a head rotated": (
        lambda path: written(path, llama__rope__dimension_count=8), r"dimension_count is 8, and transformers reads 16",
    ),
    "more values than keys": (
        lambda path: written(path, "qwen2", qwen2__attention__value_length=32), "value_length is 32, and transformers reads 16",
    ),
    "no epsilon": (
        lambda path: written(path, llama__attention__layer_norm_rms_epsilon=None), "layer_norm_rms_epsilon is missing",
    ),
    "a window that the kind has not": (
        lambda path: written(path, "qwen2", qwen2__attention__sliding_window=64), "window is 64, which transformers drops",
    ),
    "other layers with a window": (
        lambda path: written(path, "gemma3", gemma3__attention__sliding_window_pattern=2), "pattern is 2, .* reads 6",
    ),
    "capped logits": (
        lambda path: written(path, "gemma3", gemma3__final_logit_softcapping=30.0), "final_logit_softcapping is 30.0",
    ),
    "another scaling of frequencies": (
        with_tensor("rope_freqs.weight", np.linspace(1, 9, 8, dtype=np.float32)), r"rope_freqs\.weight scales .*another way",
    ),
    "a vocabulary of another size": (
        lambda path: written(path, llama__vocab_size=512), "500 tokens .vocab_size: 512. and embeddings for 500",
    ),
    "tokens without embeddings": (
        with_tensor("token_embd.weight", np.ones((512, 64), np.float32)), "500 tokens .vocab_size: 500. and embeddings for 512",
    ),
    "an unknown splitting": (
        lambda path: written(path, tokenizer__ggml__pre="tekken"), r"tokenizer\.ggml\.pre is 'tekken'; known are gpt-2, smollm",
    ),
    "WordPiece": (lambda path: written(path, tokenizer__ggml__model="bert"), r"tokenizer\.ggml\.model is 'bert'"),
    "EOS after every text": (lambda path: written(path, tokenizer__ggml__add_eos_token=True), "every text would end with EOS"),
    "no vocabulary": (lambda path: written(path, tokenizer__ggml__token_type=None), "no vocabulary with a type for each"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, match = REJECTED[name]
    monkeypatch.setattr(gguf_model, "convert_weights", lambda *_: pytest.fail("weights were converted"))
    with pytest.raises(ModelError, match=match) as caught:
        load(make(tmp_path / "m.gguf"), tmp_path / "cache")
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"], "nothing is left behind"


def test_mistral_that_transformers_reads_as_another_kind_is_rejected(tmp_path: Path) -> None:
    """By the file's name alone, transformers would give it a sliding window that the file does not state."""
    with pytest.raises(ModelError, match=r"general\.architecture is 'llama', and transformers reads a 'mistral'"):
        load(written(tmp_path / "m.gguf", general__name="mistral"), tmp_path / "cache")


def test_gemma3_with_other_heads_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        KINDS, "27B", ("gemma3", "gemma3_text", {**SMALL_GEMMA3, "head_dim": 128, "query_pre_attn_scalar": 168})
    )
    with pytest.raises(ModelError, match="heads have 128 dimensions, and by what scores are divided is known for 256 only"):
        load(written(tmp_path / "m.gguf", "27B"), tmp_path / "cache")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="names a GGUF file, and there is none; check the path"):
        load(tmp_path / "no.gguf", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "m.gguf")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ModelError, match=r"cannot be read: .*Permission denied; change its rights"):
        gguf_model.tokenizer_folder(path, str(tmp_path / "cache"))


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "llama"}'], ids=["no config", "empty config", "no weights"])
def test_a_folder_of_that_name_says_to_give_the_file_in_it(config: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "m.gguf"
    folder.mkdir()
    written(folder / "inner.gguf")
    if config is not None:
        tiny.tokenizer().save_pretrained(folder)
        (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"(model_id=.*m\.gguf/inner\.gguf|names no model)"):
        load(folder, tmp_path / "cache")


@pytest.mark.parametrize("override", ["model.revision=main", "model.trust_remote_code=true"])
def test_settings_of_the_hub_are_rejected(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave it"):
        load(written(tmp_path / "m.gguf"), tmp_path / "cache", override)


def test_without_the_extra_one_line_says_what_to_install(converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was converted before is loaded all the same."""
    path, cache = converted
    monkeypatch.setattr(gguf_file, "find_spec", lambda _: None)
    assert load(path, cache).meta["gguf"]["file"] == "m.gguf"
    with pytest.raises(ModelError) as caught:
        load(path, cache.with_name("another"))
    assert str(caught.value).endswith("the package gguf, which cannot be imported here: pip install 'cedkv[gguf]'")
    assert "\n" not in str(caught.value)


def test_options_say_that_a_file_can_be_given() -> None:
    assert resolve(None, ["model.id=~/m.gguf"]).model.id == "~/m.gguf"
    assert gguf_file.gguf_path("~/no/M.GGUF") == Path.home() / "no" / "M.GGUF"
    assert gguf_file.gguf_path("Qwen/Qwen2.5-0.5B-Instruct-GGUF") is None
    assert json.loads(json.dumps(gguf_file.TENSORS)).keys() == {"llama", "qwen2", "qwen3", "gemma3"}
