"""What a checkpoint must hold, and its own code: never run by accident, never code that may change, always told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file

from cedkv.core.errors import ConfigError, ModelError
from cedkv.models import hub
from cedkv.models.checkpoint import code_digest, trust_tag
from tests.support import tiny
from tests.support.runs import run_phase2

WEIGHTS = "model.safetensors"
CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).write_text("ran")


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of the test's own."""
    return tiny.save(tmp_path / "model", "llama")


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rejected(folder: Path, match: str, *overrides: str) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        tiny.load(folder, *overrides)
    return str(caught.value)


@pytest.fixture
def with_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose model is in its own Python file, which leaves a mark when it runs."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
    (folder / "modeling_mine.py").write_text(CODE.format(marker=str(folder.parent / "mark")))
    classes = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit(folder, model_type="mine", architectures=["MineForCausalLM"], auto_map=classes)
    return folder


def test_code_is_not_run_unless_asked_for(with_code: Path) -> None:
    message = rejected(with_code, "needs code from its checkpoint .* is not run: model.trust_remote_code is false")
    assert "-P trust_remote_code=true" in message
    assert not (with_code.parent / "mark").exists()


def test_code_that_is_asked_for_runs_and_is_told(with_code: Path, store: str) -> None:
    """On the run, in the report of its runtime, and in what a resumed run must agree with."""
    digest = code_digest(with_code)
    config = tiny.config(with_code, "model.trust_remote_code=true", "eval.on_samples=2", "eval.gate_a_samples=2")
    run_phase2(config, "1.5")
    assert (with_code.parent / "mark").exists()
    (run,) = mlflow.search_runs(
        experiment_names=["cedkv"], filter_string=f"tags.trust_remote_code = '{digest}'", output_format="list"
    )
    (meta,) = Path("outputs").glob("*/artifacts/hf_runtime_meta.json")
    assert json.loads(meta.read_text())["trust_remote_code"] == digest
    assert run.data.params["phase2.model.trust_remote_code"] == "true"
    with (with_code / "modeling_mine.py").open("a") as file:
        file.write("# other code\n")
    assert code_digest(with_code) != digest


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "a" * 39, "A" * 40, "g" * 40])
def test_code_out_of_a_hub_needs_a_full_commit(revision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch or a tag may be other code tomorrow. Rejected before anything is fetched."""
    monkeypatch.setattr(hub, "cached_file", lambda *_, **__: pytest.fail("fetched"))
    own = ["model.trust_remote_code=true", *([f"model.revision={revision}"] if revision else [])]
    with pytest.raises(ConfigError, match=r"set model\.revision .* to the full commit you have read"):
        tiny.load("org/name", *own)


def test_code_out_of_another_repository_is_rejected(with_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(with_code, auto_map={"AutoConfig": "other/code--modeling_mine.MineConfig"})
    rejected(with_code, r"code from another repository \(other/code--", "model.trust_remote_code=true")
    assert not (with_code.parent / "mark").exists()


def test_runs_without_code_of_a_checkpoint_have_no_tag(folder: Path) -> None:
    config, lm = tiny.load(folder)
    assert trust_tag(config.model) == {}
    assert lm.meta["trust_remote_code"] is False
    commit = "0123456789abcdef" * 2 + "01234567"
    hub = tiny.config("org/name", "model.trust_remote_code=true", f"model.revision={commit}")
    assert trust_tag(hub.model) == {"trust_remote_code": commit}


def test_folder_without_config(tmp_path: Path) -> None:
    rejected(tmp_path, r"not a model folder: it has no config\.json \(it holds nothing\)")
    (tmp_path / "readme.md").touch()
    rejected(tmp_path, r"it holds readme\.md\)")


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", '{"model_type": 3}', "\xff"])
def test_config_that_is_none(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    rejected(folder, r"config\.json (cannot be read as JSON: .*download it again|holds no JSON object|names no model)")


def test_pickled_weights_alone_say_how_to_convert(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert "use_safetensors=False" in rejected(
        folder, r"its weights only as pytorch_model\.bin, and reading that file runs code in it"
    )


def test_folder_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    rejected(folder, r"holds no weights: it needs \*\.safetensors \(it holds .*config\.json")


def test_sharded_weights_without_generation_config(folder: Path) -> None:
    """As base models often come."""
    _, whole = tiny.load(folder)
    (folder / WEIGHTS).unlink()
    whole.model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    _, lm = tiny.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(lm.model.parameters(), whole.model.parameters(), strict=True))
    shards[1].unlink()
    rejected(folder, f"names {shards[1].name}, and there is no such file: download it again")
