"""Compare a model folder's weight files with each other before they are read: index, shards, adapters, whole or damaged.

transformers reads every tensor of every shard that the index names, where the last one wins, and prefers
``model.safetensors`` to an index without a word. So a folder in which two files disagree is another model than it says, and is
rejected by the files' names.
Only the headers of the files are read here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cedkv.core.errors import ModelError
from cedkv.core.text import number

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"(?:shard-\d{5}-)?model-\d{5}-of-\d{5}\.safetensors")
_UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Weight files that run code when they are read."""
_MAX_HEADER = 100_000_000
"""Bytes; the safetensors library reads no longer header."""
_AGAIN = "download it again"


def check_weights(folder: Path, named: object, prefix: str) -> None:
    """Raise unless the weights of a folder are complete, and one set.

    Args:
        folder: a folder with config.json; of a hub model its snapshot in the cache.
        named: the file that config.json names as its weights (``transformers_weights``); None for the usual names.
        prefix: what names of weights may begin with or not (``base_model_prefix``).

    Raises:
        ModelError: no safetensors, files that contradict each other, or a damaged file; says which, and what to do.
    """
    if named is not None and not (isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))):
        raise ModelError(f"{folder}/config.json: transformers_weights = {named!r} names no safetensors file; remove the line")
    file = next((name for name in ([named] if named else [SINGLE, INDEX]) if (folder / name).is_file()), None)
    if file is None:
        raise _without_weights(folder, named)
    tensors = _check_shards(folder, file) if file.endswith(".json") else _check_single(folder, file)
    weights: dict[str, str] = {}
    for tensor in tensors:
        weight = tensor
        while prefix and weight.startswith(f"{prefix}."):
            weight = weight.removeprefix(f"{prefix}.")
        other = weights.setdefault(weight, tensor)
        if other != tensor:
            raise ModelError(
                f"{folder}: {other} and {tensor} are two names of one weight, and both stand in its files: transformers loads "
                "one of them without a word. Remove the one that is not the model's"
            )


def check_adapter(folder: Path) -> None:
    """Raise if an adapter lies beside a model's weights: transformers applies it where peft is installed, and only there.

    Raises:
        ModelError: says how to merge the adapter.
    """
    if (folder / ADAPTER).exists():
        raise ModelError(
            f"{folder} holds an adapter ({ADAPTER}) beside the model: it would be applied where peft is installed, and only "
            f"there, so the folder does not say what the weights are. {_merge(folder)}; or remove {ADAPTER}, to use the model "
            "without it"
        )


def _merge(folder: Path) -> str:
    return (
        "Merge it into the weights (peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(NEW_FOLDER)) and give that folder"
    )


def adapter_alone(folder: Path) -> str | None:
    """Return what to say of a folder without config.json that holds an adapter; None if it holds none."""
    if not (folder / ADAPTER).exists():
        return None
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return f"{folder} holds an adapter alone (of {base!r}), not a model. {_merge(folder)}"


def _without_weights(folder: Path, named: str | None) -> ModelError:
    if named is not None:
        return ModelError(f"{folder}: its config.json names {named} as its weights, and there is no such file; {_AGAIN}")
    holds = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    shards = _shards(folder)
    if shards:
        return ModelError(
            f"{folder} holds {shards[0]} ({len(shards)} such) and no {INDEX}, which names what belongs together; {_AGAIN}"
        )
    if any(folder.glob("consolidated*.safetensors")):
        return ModelError(
            f"{folder} holds its weights only as consolidated*.safetensors, in the names of Mistral's own library, which "
            f"transformers does not read. Download {SINGLE}, or {INDEX} and its shards, of the same model"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return ModelError(
            f"{folder} holds no {SINGLE} and no {INDEX}, and transformers looks for no other name ({', '.join(others[:3])}). "
            f"If that is the whole model, name it {SINGLE}"
        )
    unsafe = sorted(path.name for pattern in _UNSAFE_WEIGHTS for path in folder.glob(pattern))
    if unsafe:
        return ModelError(
            f"{folder} holds its weights only as {unsafe[0]}, and reading that file runs code in it: only safetensors "
            "are read. If you trust the file, convert it with transformers: "
            'm = AutoModelForCausalLM.from_pretrained("FOLDER", use_safetensors=False); m.save_pretrained("FOLDER")'
        )
    return ModelError(
        f"{folder} holds no weights: it needs *.safetensors (it holds {holds}). Download the complete folder."
        f"{gguf_hint(folder)}"
    )


def gguf_hint(folder: Path) -> str:
    """Return what to say where a folder holds a GGUF file; empty if it holds none."""
    files = sorted(folder.glob("*.gguf"))
    return f" For the model in a GGUF file give the file itself: -P model_id={files[0]}" if files else ""


def _shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors") if _SHARD.fullmatch(path.name))


def _check_single(folder: Path, file: str) -> list[str]:
    """Return the names of its tensors; raise if it is damaged, or shards or an index beside it are another set of weights."""
    tensors = list(read_header(folder / file))
    if file != SINGLE:
        return tensors  # config.json chooses it by name
    beside = _shards(folder)
    if (folder / INDEX).is_file() and set(_weight_map(folder / INDEX).values()) != {SINGLE}:
        beside.append(INDEX)
    if beside:
        raise ModelError(
            f"{folder} holds two sets of weights, {file} and {beside[0]} ({len(beside)} such), of which transformers loads one "
            "without a word. Remove the set that is not the model's"
        )
    return tensors


def _check_shards(folder: Path, index: str) -> list[str]:
    """Return the names of all tensors; raise unless each stands in the one shard that the index names for it."""
    weight_map = _weight_map(folder / index)
    files = sorted(set(weight_map.values()))
    stands_in: dict[str, str] = {}
    for file in files:
        path = folder / file
        if not path.resolve().is_file():
            raise ModelError(f"{folder}: {index} names {file}, and there is no such file: {_AGAIN}")
        for tensor in read_header(path):
            if tensor in stands_in:
                raise ModelError(
                    f"{folder}: {tensor} stands in {stands_in[tensor]} and in {file}, and {index} names "
                    f"{weight_map.get(tensor)}: transformers loads the last one. Remove the one that is not the model's"
                )
            stands_in[tensor] = file
    for tensor, file in weight_map.items():
        found = stands_in.pop(tensor, None)
        if found != file:
            where = f"it stands in {found}" if found else "no shard has it"
            raise ModelError(f"{folder}: {index} says that {tensor} is in {file}, and {where}: {_AGAIN}, with all shards")
    if stands_in:
        tensor, file = next(iter(stands_in.items()))
        raise ModelError(
            f"{folder}: {file} holds {tensor} ({len(stands_in)} such), which {index} does not name, and which would be loaded "
            "all the same: index and shards are of different downloads. Download both again"
        )
    left = sorted(set(_shards(folder)) - set(files)) if index == INDEX else []
    if left:
        raise ModelError(
            f"{folder} holds {left[0]} ({len(left)} such), which {index} does not name: two sets of shards lie in one folder. "
            "Remove the set that is not the model's"
        )
    return list(weight_map)


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(_in_folder(file) for file in weight_map.values())):
        raise ModelError(
            f'{index}: its "weight_map" does not name a safetensors file of this folder for every tensor; {_AGAIN}'
        )
    return weight_map


def _in_folder(file: object) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that must be an object in which no key stands twice.

    Raises:
        ModelError: unreadable, no object, or a key stands twice (of which a parser would take the last).
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ModelError(f"{path}: {twice!r} stands in it twice: which one holds is not defined. Remove one of them")
        return content

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {_kind(path) or error}; {_AGAIN}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; {_AGAIN}")
    return content


def read_header(path: Path) -> dict[str, Any]:
    """Return tensor -> dtype, shape and offsets, from the header of a safetensors file.

    Raises:
        ModelError: not a safetensors file, or one that is cut off; says what it is instead.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if size > 8 and length <= min(_MAX_HEADER, size - 8) else None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    except ValueError:
        header = None
    tensors = {name: value for name, value in header.items() if name != "__metadata__"} if isinstance(header, dict) else None
    try:
        end = None if tensors is None else max([value["data_offsets"][1] for value in tensors.values()], default=0)
        missing = None if end is None else 8 + length + end - size
    except (TypeError, KeyError, IndexError):
        missing = None
    if tensors is None or missing is None:
        raise ModelError(f"{path} is no safetensors file: {_kind(path) or 'its header cannot be read'}; {_AGAIN}")
    if missing:
        what = f"{number(missing, 3)} bytes are missing at its end" if missing > 0 else f"{number(-missing, 3)} bytes too many"
        raise ModelError(f"{path} is damaged: {what} ({size} bytes, its header speaks of {size + missing}); {_AGAIN}")
    return tensors


def _kind(path: Path) -> str | None:
    """Return what a file is that is not what its name says, as far as its first bytes show it."""
    try:
        with path.open("rb") as file:
            start = file.read(200).lstrip()
    except OSError:
        return None
    if not start:
        return "it is empty (a download that stopped)"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself (git lfs pull)"
    if start[:1] == b"<":
        return "it is a web page, not the file itself (a login, or an error of a proxy)"
    return None
