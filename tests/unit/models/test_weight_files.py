"""Folders whose files contradict each other, or are not what their names say: rejected by the file's name, before loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cedkv.core.errors import ModelError
from cedkv.models.weight_files import ADAPTER, INDEX, SINGLE
from tests.support import tiny

SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with one file of weights."""
    return tiny.save(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def split(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in three shards."""
    folder = tmp_path_factory.mktemp("split") / "model"
    shutil.copytree(whole, folder)
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(weights)
    weight_map = {name: SHARDS[i * 3 // len(names)] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({n: weights[n] for n in names if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "single"))


@pytest.fixture
def sharded(split: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(split, tmp_path / "sharded"))


def rejected(folder: Path, match: str) -> str:
    """The error of loading; it names the folder, and sends nobody to a hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
        with pytest.raises(ModelError, match=match) as caught:
            tiny.load(folder)
    said = str(caught.value)
    assert str(folder) in said
    assert "HF_ENDPOINT" not in said
    return said


def index(folder: Path, **changes: Any) -> None:
    """Change what the index says; a tensor becomes None to be left out."""
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] |= changes
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file is not None}
    (folder / INDEX).write_text(json.dumps(content))


def shard(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, {"format": "pt"})


def test_a_sound_set_of_shards_is_loaded(sharded: Path, whole: Path) -> None:
    _, one = tiny.load(whole)
    _, three = tiny.load(sharded)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), three.model.parameters(), strict=True))


def test_a_weight_that_stands_in_two_shards(sharded: Path) -> None:
    """The index names one, the last shard would be loaded."""
    shard(sharded, SHARDS[2], lambda weights: weights.update({TENSOR: torch.zeros(128, 64)}))
    said = rejected(sharded, rf"{TENSOR} stands in model-0000.-of-00003\.safetensors and in {SHARDS[2]}")
    assert f"names {json.loads((sharded / INDEX).read_text())['weight_map'][TENSOR]}" in said


@pytest.mark.parametrize("other", [TENSOR.removeprefix("model."), f"model.{TENSOR}"])
def test_two_names_of_one_weight(folder: Path, sharded: Path, other: str) -> None:
    """Names begin with the base model's or not; which of two is loaded depends on their order."""
    shard(folder, SINGLE, lambda weights: weights.update({other: torch.zeros(128, 64)}))
    rejected(folder, "are two names of one weight, and both stand in its files")
    shard(sharded, SHARDS[2], lambda weights: weights.update({other: torch.zeros(128, 64)}))
    index(sharded, **{other: SHARDS[2]})
    rejected(sharded, "are two names of one weight")


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    named = json.loads((sharded / INDEX).read_text())["weight_map"][TENSOR]
    index(sharded, **{TENSOR: next(each for each in SHARDS if each != named)})
    rejected(sharded, f"says that {TENSOR} is in .*, and it stands in {named}")


def test_an_index_that_names_what_no_shard_has(sharded: Path) -> None:
    index(sharded, **{"model.layers.9.mlp.up_proj.weight": SHARDS[0]})
    rejected(sharded, "model.layers.9.mlp.up_proj.weight is in .*, and no shard has it")


def test_a_shard_with_what_the_index_does_not_name(sharded: Path) -> None:
    """transformers would load it all the same."""
    index(sharded, **{TENSOR: None})
    rejected(sharded, f"holds {TENSOR} \\(1 such\\), which .* does not name")


def test_a_missing_shard_and_one_too_many(sharded: Path) -> None:
    shutil.copy(sharded / SHARDS[0], sharded / "model-00004-of-00004.safetensors")
    rejected(sharded, r"holds model-00004-of-00004\.safetensors \(1 such\), which .* does not name: two sets of shards")
    (sharded / SHARDS[1]).unlink()
    rejected(sharded, f"names {SHARDS[1]}, and there is no such file")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"x": 1}}',
     '{"weight_map": {"x": "../model.safetensors"}}', '{"weight_map": {"x": "pytorch_model.bin"}}'],
)  # fmt: skip
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    rejected(sharded, rf"{INDEX}(:| cannot be read as JSON:| holds no JSON object).*download it again")


def test_an_index_that_names_a_tensor_twice(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{TENSOR}": "{SHARDS[0]}", '))
    rejected(sharded, f"'{TENSOR}' stands in it twice")


@pytest.mark.parametrize("beside", [SHARDS[0], "shard-00001-model-00001-of-00002.safetensors", INDEX])
def test_two_sets_of_weights(folder: Path, split: Path, beside: str) -> None:
    """A single file wins over an index, and shards of distributed training over both, without a word."""
    shutil.copy(split / (beside if beside == INDEX else SHARDS[0]), folder / beside)
    rejected(folder, rf"two sets of weights, model\.safetensors and {beside}")


def test_files_beside_the_weights_that_are_no_other_set(folder: Path) -> None:
    """An index of the one file, and the weights in the names of another library."""
    shutil.copy(folder / SINGLE, folder / "consolidated.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / SINGLE), SINGLE)}))
    assert tiny.load(folder)[1].meta["layers"] == 4


DAMAGED = {
    "empty": (lambda _: b"", "is no safetensors file: it is empty"),
    "a pointer of git-lfs": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    "a web page": (lambda _: b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "other bytes": (lambda _: b"\xff" * 99, "its header cannot be read"),
    "a header that is cut off": (lambda whole: whole[:100], "its header cannot be read"),
    "a header that says nothing": (lambda _: (4).to_bytes(8, "little") + b"[{}]", "its header cannot be read"),
    "half a file": (lambda whole: whole[: len(whole) // 2], "is damaged: .* bytes are missing at its end"),
    "a byte less": (lambda whole: whole[:-1], "is damaged: 1 bytes are missing at its end"),
    "a byte more": (lambda whole: whole + b"\0", "is damaged: 1 bytes too many"),
}


@pytest.mark.parametrize(("change", "match"), DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("name", [SINGLE, SHARDS[1]])
def test_a_damaged_file_is_named(whole: Path, split: Path, tmp_path: Path, name: str, change: Any, match: str) -> None:
    folder = Path(shutil.copytree(whole if name == SINGLE else split, tmp_path / "model"))
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    rejected(folder, f"{name} {match}|{name} is no safetensors file: .*{match}")


def test_an_adapter_beside_a_model(folder: Path) -> None:
    """transformers applies it where peft is installed."""
    (folder / ADAPTER).write_text('{"base_model_name_or_path": "org/base"}')
    assert "merge_and_unload" in rejected(folder, "holds an adapter .* beside the model")


@pytest.mark.parametrize("content", ['{"base_model_name_or_path": "org/base"}', "{}", "[]", "{"])
def test_an_adapter_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / ADAPTER).write_text(content)
    rejected(tmp_path, "holds an adapter alone .*, not a model")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("consolidated.safetensors", "only as consolidated"),
        ("consolidated.00.safetensors", "only as consolidated"),
        ("weights.safetensors", r"no other name \(weights\.safetensors\)"),
        (SHARDS[0], "and no model.safetensors.index.json"),
    ],
)
def test_weights_by_another_name(folder: Path, name: str, match: str) -> None:
    (folder / SINGLE).rename(folder / name)
    rejected(folder, match)


def test_a_configuration_that_names_its_weights(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    (folder / SINGLE).rename(folder / "weights.safetensors")
    path.write_text(json.dumps({**content, "transformers_weights": "weights.safetensors"}))
    assert tiny.load(folder)[1].meta["layers"] == 4
    path.write_text(json.dumps({**content, "transformers_weights": "other.safetensors"}))
    rejected(folder, r"names other\.safetensors as its weights, and there is no such file")
    path.write_text(json.dumps({**content, "transformers_weights": "weights.bin"}))
    rejected(folder, r"transformers_weights = 'weights\.bin' names no safetensors file")
