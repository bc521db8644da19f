"""The certificate on models that attend in unusual ways or with unusual numbers: sound ones pass, and a fault is still seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cedkv.checks import probe_checks
from cedkv.checks.certificate import Certificate, certify
from cedkv.checks.rotation import rotation_moves_queries
from cedkv.models.fingerprint import fingerprint
from cedkv.models.loading import LanguageModel
from tests.support import tiny

SINKS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 600,
         "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 50}


def loaded(
    folder: Path, architecture: str, change: Callable[[Any], None] | None = None, dtype: str = "float32", **settings: Any
) -> LanguageModel:
    model = tiny.model(architecture, **settings)
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return tiny.load(folder, f"runtime.torch_dtype={dtype}")[1]


def certified(lm: LanguageModel, folder: Path) -> Certificate:
    return certify(lm, fingerprint(lm), str(folder))


def sharper(factor: float) -> Callable[[Any], None]:
    """Larger scores: queries times a factor."""

    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)

    return change


def large_bias(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.normal_().mul_(2000)


@pytest.mark.parametrize(
    ("architecture", "change"), [("llama", sharper(10)), ("qwen2", large_bias)], ids=["sharp queries", "large bias of keys"]
)
def test_large_scores_round_more(architecture: str, change: Any, tmp_path: Path) -> None:
    lm = loaded(tmp_path, architecture, change)
    assert certified(lm, tmp_path).failed([]) == []


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_wrong_rows_are_seen_at_any_size_of_scores(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are shifted by one token, on a model whose limit is wide because its scores are large."""
    lm = loaded(tmp_path, "llama", sharper(factor))
    real = probe_checks.AttentionRows.measure

    def shifted(self: Any, case: Any) -> float:
        for maps in case.teacher.maps.values():
            maps[:] = [rows.roll(1, dims=-1) for rows in maps]
        return real(self, case)

    monkeypatch.setattr(probe_checks.AttentionRows, "measure", shifted)
    assert "attention_rows" in certified(lm, tmp_path).failed([])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rotation_is_measured_without_what_a_sink_does(dtype: str, tmp_path: Path) -> None:
    """Alone with a sink a token keeps a share of itself that depends on rounding; what the rotation does does not."""
    lm = loaded(tmp_path, "gpt_oss", dtype=dtype, **SINKS)
    (rotation,) = [check for check in certified(lm, tmp_path).findings if check.name == "rotation_equivariance"]
    assert rotation.verdict == "pass"
    assert lm.rope_layouts is not None


@pytest.mark.parametrize(("beta", "only_rotated"), [(0.5, False), (0.0, True)])
def test_queries_scaled_by_position_are_not_moved(beta: float, only_rotated: bool, tmp_path: Path) -> None:
    lm = loaded(tmp_path, "ministral3", head_dim=16, rope_parameters={**SCALED, "llama_4_scaling_beta": beta})
    assert rotation_moves_queries(lm, "on-42-00000", 5, range(20, 30), 37) == only_rotated
    assert rotation_moves_queries(lm, "on-42-00000", 5, range(50, 60), 37), "from 50 to 99 the scale is one"
    assert certified(lm, tmp_path).failed([]) == []


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("doge", {}), ("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 1024})],
    ids=["mask by name", "scaled by the width of values"],
)
def test_eager_attention_is_called_as_the_model_calls_it(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    assert certified(loaded(tmp_path, architecture, **settings), tmp_path).failed([]) == []
