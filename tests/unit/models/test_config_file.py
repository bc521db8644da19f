"""One wrong value in a good config.json: the model is loaded, or rejected with the cause; nothing else comes out of it.

And what the file says twice, or leaves out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from cedkv.cli.app import main
from cedkv.core.errors import ModelError
from cedkv.models.loading import LanguageModel
from cedkv.models.opening import open_spec
from tests.support import tiny

LEFT_OUT = ("left out",)
LINEAR = {"rope_type": "linear", "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not LEFT_OUT}))


def load(folder: Path) -> LanguageModel:
    return tiny.load(folder)[1]


def rejected(folder: Path, match: str | None = None) -> str:
    """The error of opening a model; no weights are read for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
        with pytest.raises(ModelError, match=match) as caught:
            open_spec(tiny.config(folder))
    return str(caught.value)


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim",
         "max_position_embeddings", "intermediate_size")  # fmt: skip
REJECTED: list[dict[str, Any]] = [
    *({name: value} for name in SIZES for value in (-1, 1024.0, "x", [1])), *({name: None} for name in SIZES[:3]),
    {"num_hidden_layers": 0}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}, {"head_dim": 0}, {"vocab_size": 0},
    {"max_position_embeddings": 0}, {"num_hidden_layers": 10**12}, {"num_attention_heads": 10**12},
    {"num_attention_heads": 5}, {"num_key_value_heads": 3}, {"num_key_value_heads": 8}, {"max_position_embeddings": 9},
    {"hidden_act": "unknown"}, {"hidden_act": None}, {"rms_norm_eps": "1e-6"}, {"bos_token_id": [0]}, {"pad_token_id": "x"},
    {"tie_word_embeddings": "yes"}, {"attention_bias": 1.5}, {"dtype": "x"}, {"use_return_dict": False}, {"id2label": "x"},
    {"is_encoder_decoder": True}, {"is_causal": False}, {"text_config": {}}, {"model_type": "x"}, {"model_type": None},
    {"per_layer_config": "x"}, {"base_model_tp_plan": "x"}, {"max_new_tokens": "x"},
    {"layer_types": ["full_attention"]}, {"layer_types": ["x"] * 4}, {"layer_types": "full_attention"},
    {"layer_types": [1] * 4}, {"layer_types": ["sliding_attention"] * 4}, {"sliding_window": 0}, {"sliding_window": -1},
    {"sliding_window": "x"}, {"sliding_window": 16},
    *({"rope_parameters": value} for value in (
        0, "x", [1], {"rope_type": "linear"}, {"type": "su"}, {"rope_type": "x"}, {"rope_type": None},
        {"rope_type": ["default"]},
        LINEAR | {"factor": "2"}, LINEAR | {"factor": 0}, LINEAR | {"factor": -2.0}, {"rope_type": "yarn"},
        {"rope_type": "llama3"}, {"rope_type": "longrope"}, {"rope_type": "dynamic"}, LONGROPE | {"short_factor": [1.0] * 3},
        LONGROPE | {"long_factor": "x"}, LONGROPE | {"original_max_position_embeddings": "x"},
        {"rope_type": "default", "rope_theta": 0}, {"rope_type": "default", "rope_theta": "10000"},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"}, {"full_attention": {"rope_type": "default"}})),
    {"rope_scaling": "x"}, {"rope_scaling": {"rope_type": "linear"}}, {"rope_scaling": {"type": "su", "factor": 4.0}},
    *({"quantization_config": value} for value in (
        "fp8", [1], {}, {"bits": 4}, {"quant_method": None}, {"quant_method": ["fp8"]}, {"quant_method": "no-such-method"},
        {"bits": 4, "group_size": 64})),
    {"quantization": {"bits": 4, "group_size": 64}},
]  # fmt: skip


@pytest.mark.parametrize("change", REJECTED, ids=lambda change: json.dumps(change)[:60])
def test_one_wrong_value_is_a_model_error_before_weights(folder: Path, change: dict[str, Any]) -> None:
    edit(folder, **change)
    said = rejected(folder)
    assert len(said) < 2000
    assert "HF_ENDPOINT" not in said, "the folder is here: no hub has a part in it"


NOT_OPENED_HERE: list[dict[str, Any]] = [
    {"num_hidden_layers": LEFT_OUT}, {"hidden_size": LEFT_OUT}, {"num_key_value_heads": LEFT_OUT}, {"vocab_size": LEFT_OUT},
    {"hidden_size": 0}, {"intermediate_size": 0}, {"intermediate_size": 10**12}, {"vocab_size": 10**12}, {"head_dim": 10**12},
    {"attention_bias": True}, {"quantization_config": {"quant_method": "gptq"}},
    {"quantization_config": {"quant_method": "awq"}},
    {"fusion_config": "x"}, {"_experts_implementation": "x"}, {"transformers_weights": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", NOT_OPENED_HERE, ids=lambda change: str(change)[:60])
def test_what_only_the_weights_contradict_is_a_model_error_too(folder: Path, change: dict[str, Any]) -> None:
    edit(folder, **change)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "HF_ENDPOINT" not in str(caught.value)


REPLACED: list[dict[str, Any]] = [
    {"_attn_implementation": "flash_attention_2"}, {"_attn_implementation": "flash_attention_3"}, {"_attn_implementation": "x"},
    {"_attn_implementation": 1}, {"attn_implementation": "flash_attention_2"}, {"return_dict": False}, {"use_cache": False},
    {"output_attentions": True}, {"output_hidden_states": True},
]  # fmt: skip


@pytest.mark.parametrize("change", REPLACED, ids=json.dumps)
def test_what_every_call_here_says_itself_is_ignored(folder: Path, change: dict[str, Any]) -> None:
    edit(folder, **change)
    lm = load(folder)
    assert lm.model.config._attn_implementation == "cedkv"
    ids = lm.tokenizer("Word: dax", return_tensors="pt").input_ids
    assert lm.model(ids).logits.shape[-1] == 500


TWICE: dict[str, tuple[dict[str, Any], str]] = {
    "theta": ({"rope_theta": 5e5}, r"rope_theta is 500000\.0 and 10000\.0"),
    "scaling": ({"rope_scaling": LINEAR}, "factor of rope_parameters and of rope_scaling is None and 2"),
    "type": (
        {"rope_parameters": {"rope_type": "yarn", "type": "linear", "factor": 2.0}},
        "type of RoPE is 'linear' and 'yarn'",
    ),
    "share": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0},
        "partial_rotary_factor is 1.0 and 0.5",
    ),
    "length": (
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 1024}, "original_max_position_embeddings": 256},
        "original_max_position_embeddings is 256 and 1024",
    ),
}


@pytest.mark.parametrize(("change", "match"), TWICE.values(), ids=TWICE)
def test_a_configuration_that_says_two_things_is_rejected(folder: Path, change: dict[str, Any], match: str) -> None:
    edit(folder, **change)
    rejected(folder, f"contradicts itself: .*{match}")


def test_what_is_said_twice_and_is_the_same_is_no_contradiction(folder: Path) -> None:
    """As files are that both transformers 4 and 5 read."""
    edit(folder, rope_theta=1e4, rope_parameters={"rope_theta": 1e4, **LINEAR}, rope_scaling={"type": "linear", "factor": 2.0})
    assert load(folder).meta["rope_parameters"]["factor"] == 2.0


def test_a_key_that_stands_twice_in_the_file(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"rms_norm_eps": 1e-5, ', 1))
    rejected(folder, "'rms_norm_eps' stands in it twice")


@pytest.mark.parametrize("nested", [{}, {"original_max_position_embeddings": 256}])
def test_the_length_where_angles_change_is_the_one_that_the_model_uses(folder: Path, nested: dict[str, int]) -> None:
    """transformers takes a length at the file's top only when it builds the model: opened, the configuration says another."""
    edit(folder, rope_parameters=LONGROPE | nested, original_max_position_embeddings=256)
    lm = load(folder)
    assert lm.capabilities.max_positions == 256
    assert lm.model.config.rope_parameters["original_max_position_embeddings"] == 256


def test_defaults_that_no_weight_shows_are_stated(folder: Path) -> None:
    """In the run's facts; a file that names them has nothing to state."""
    assert load(folder).meta["config_notes"] == []
    edit(folder, rope_parameters=LEFT_OUT, max_position_embeddings=LEFT_OUT)
    assert load(folder).meta["config_notes"] == [
        "config.json names no rope_theta: transformers takes 10000",
        "config.json names no max_position_embeddings: transformers takes 2048",
    ]
    edit(folder, rope_theta=3e4, max_position_embeddings=512)
    assert load(folder).meta["config_notes"] == []


def test_a_head_that_is_tied_in_the_configuration_alone_is_stated(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)
    (note,) = load(folder).meta["config_notes"]
    assert note.startswith("config.json ties lm_head to the embedding")


def test_a_wrong_value_ends_a_run_with_2_and_leaves_none(folder: Path, tmp_path: Path, store: str) -> None:
    import mlflow
    from click.testing import CliRunner

    edit(folder, hidden_act="unknown")
    before = len(mlflow.search_runs(search_all_experiments=True))
    done = CliRunner().invoke(main, ["--phase2-model-id", str(folder), "--phase", "2", "--set", "runtime.device=cpu"])
    assert done.exit_code == 2, done.output
    assert "unknown" in done.output
    assert "resume" not in done.output
    assert len(mlflow.search_runs(search_all_experiments=True)) == before
    assert not list((tmp_path / "outputs").glob("*/*")) if (tmp_path / "outputs").exists() else True
