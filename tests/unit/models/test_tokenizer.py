"""Loading a tokenizer: as its files say, or a rejection that says what is missing and what to do."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer, ByT5Tokenizer

from cedkv.core.errors import ModelError
from cedkv.models.tokenizer import load_tokenizer, token_text
from cedkv.tasks.tokenize import SampleTokenizer
from tests.support import tiny, zoo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of the test's own."""
    return tiny.save(tmp_path / "model", "llama")


def load(folder: Path, vocabulary: int = 1000, chat: bool = True) -> Any:
    return load_tokenizer(str(folder), {"trust_remote_code": False}, vocabulary, chat)


def rejected(folder: Path, match: str) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        tiny.load(folder)
    return str(caught.value)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", zoo.USABLE)
def test_every_usable_kind_loads_with_a_model(name: str, tmp_path: Path) -> None:
    _, lm = tiny.load(tiny.save_with(tmp_path, zoo.made(name)))
    assert lm.vocabulary == len(zoo.made(name))
    assert lm.tokenizer("Word: dax").input_ids == zoo.made(name)("Word: dax").input_ids


@pytest.mark.parametrize("name", zoo.LOSSY)
def test_kinds_that_lose_text_are_rejected(name: str, tmp_path: Path) -> None:
    rejected(tiny.save_with(tmp_path, zoo.made(name)), match="does not reproduce a text: .*drops case, spaces or line breaks")


def test_lower_case_is_rejected(folder: Path) -> None:
    """Seen for real: a tokenizer that came back as another class and lost every space."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    rejected(folder, match="does not reproduce a text: .*Word: blick.* became .*word: blick")


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "GemmaTokenizerFast", "Qwen2TokenizerFast", "NoSuchTokenizer"])
def test_tokenizer_json_is_taken_as_it_stands(kind: str, tmp_path: Path) -> None:
    """transformers makes it again by the rules of the class that tokenizer_config.json names, and says nothing."""
    tiny.save_with(tmp_path, zoo.made("sentencepiece, prepend"))
    edit(tmp_path / "tokenizer_config.json", tokenizer_class=kind)
    texts = ["Word: dax\nSymbol:", "  two spaces", "<s>[INST] é語"]
    expected = [Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids for text in texts]
    assert [load(tmp_path)(text).input_ids for text in texts] == expected
    if kind == "GemmaTokenizerFast":
        other = AutoTokenizer.from_pretrained(tmp_path)
        assert [other(text).input_ids for text in texts] != expected, "else reading the file as it stands is not needed"


def test_without_a_tokenizer_json_it_is_made_from_vocabulary_and_merges(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert load(folder)("Word: dax\nSymbol:").input_ids == tiny.tokenizer()("Word: dax\nSymbol:").input_ids


@pytest.mark.parametrize("content", [None, b"{", b'{"model": {}}'], ids=["missing", "no JSON", "no tokenizer"])
def test_folder_without_a_readable_tokenizer(folder: Path, content: bytes | None) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_bytes(content)
    assert "save_pretrained(folder)" in rejected(folder, match="its tokenizer cannot be read: ")


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed, so nothing is missing")
def test_sentencepiece_model_alone_says_what_is_missing(folder: Path) -> None:
    """The package sentencepiece, which reads tokenizer.model, is none of ours: those files are rare by now."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    assert "tokenizer.model with the package sentencepiece" in rejected(folder, match="its tokenizer cannot be read: ")


def test_slow_tokenizer_is_rejected(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    ByT5Tokenizer().save_pretrained(folder)
    rejected(folder, match="no character offsets .* use a model that has a tokenizer.json")


def test_tokenizer_of_another_model_is_rejected(tmp_path: Path) -> None:
    """Its ids would read rows of the embedding that are not there, or mean something else."""
    tiny.model("llama").save_pretrained(tmp_path)
    zoo.made("sentencepiece, gemma").save_pretrained(tmp_path)
    rejected(tmp_path, match="beyond the model's vocabulary of 500: it belongs to another model")


def test_added_token_beyond_the_vocabulary_may_stay(tmp_path: Path) -> None:
    """A sign for images in a model that reads text alone; samples that hold it are rejected by name."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path, 500).convert_tokens_to_ids("<image>") == 500


def test_truncation_and_padding_that_were_saved_are_not_applied(folder: Path) -> None:
    """They shorten texts without a word."""
    edit(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
                 "pad_token": "</s>"},
    )  # fmt: skip
    text = "Word: dax\nSymbol: red\n\n" * 3
    assert load(folder)(text, add_special_tokens=False).input_ids == tiny.tokenizer()(text).input_ids


@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("add_bos", [True, False, None])
def test_bos_is_what_the_loaded_tokenizer_does(tmp_path: Path, post_processor: bool, add_bos: bool | None) -> None:
    """``add_bos_token`` and the post-processor may disagree; what counts is what comes out, in every arm alike."""
    tiny.save(tmp_path, bos=post_processor, chat=False)
    if add_bos is not None:
        edit(tmp_path / "tokenizer_config.json", add_bos_token=add_bos)
    tokenizer = load(tmp_path)
    assert (tokenizer("x").input_ids[0] == tokenizer.bos_token_id) == bool(SampleTokenizer.of(tokenizer).bos)
    if add_bos is None:
        assert bool(SampleTokenizer.of(tokenizer).bos) == post_processor


def test_chat_template_can_be_left_out(folder: Path) -> None:
    assert load(folder).chat_template
    assert not load(folder, chat=False).chat_template
    _, lm = tiny.load(folder, "model.chat_template=false")
    assert not lm.meta["chat_template"]


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece, prepend", "sentencepiece, gemma"])
def test_text_of_a_token_keeps_its_space(name: str) -> None:
    ids = zoo.made(name)("Word: dax\nSymbol: red", add_special_tokens=False).input_ids
    assert "".join(token_text(zoo.made(name), token) for token in ids).lstrip() == "Word: dax\nSymbol: red"
    assert token_text(zoo.made(name), ids[-1]) == " red"


def test_a_row_of_the_vocabulary_without_a_token_is_its_id(tmp_path: Path) -> None:
    """Models have more rows than tokens; one of them may win. Both numbers are in the facts about the model."""
    _, lm = tiny.load(tiny.save(tmp_path, vocab_size=512))
    assert (lm.meta["vocabulary"], lm.meta["tokenizer_size"]) == (512, 500)
    assert token_text(lm.tokenizer, 511) == "[token 511]"
    assert token_text(lm.tokenizer, lm.tokenizer("red").input_ids[0]).startswith("r")
    assert token_text(lm.tokenizer, 0) == "<s>"
