"""What a selector reads and a model cannot give ends a run before weights are loaded, with the selector's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from cedkv.core.errors import DataError, ModelError
from cedkv.tasks.load import load_samples
from tests.families.models import FAMILIES
from tests.support import tiny
from tests.support.runs import run_comparison, run_phase2

pytestmark = pytest.mark.usefixtures("without_mlflow")

GEMMA_2 = next(family for family in FAMILIES if family.name == "Gemma 2")


def folder(path: Path, model_type: str, **settings: object) -> Path:
    """A model folder without weights."""
    sizes = tiny.SMALL | {"vocab_size": 500, "max_position_embeddings": 1024}
    AutoConfig.for_model(model_type, **sizes | settings).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def run(*overrides: str, at: Path) -> str:
    """The error of a run."""
    with pytest.raises((DataError, ModelError)) as caught:
        run_phase2(tiny.config(at, *overrides))
    return str(caught.value)


def loads(*overrides: str, at: Path) -> bool:
    """Whether a run comes to its weights, which there are not."""
    return "holds no weights" in run(*overrides, at=at)


def test_expected_attention_of_soft_capped_scores(tmp_path: Path) -> None:
    """Gemma 2: the expectation over queries needs scores that are linear in the query. Without its cap it could be read."""
    said = run("select.mode=expected_attention", at=folder(tmp_path / "m", "gemma2", **GEMMA_2.settings))
    assert "select.mode=expected_attention reads ExpectedAttention" in said
    assert "soft-capped at 5.0" in said
    without_cap = folder(tmp_path / "n", "gemma2", **GEMMA_2.settings | {"attn_logit_softcapping": None})
    assert loads("select.mode=expected_attention", at=without_cap)


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("attention_diversity_span", ("select.value_weighting=output_norm",)),
        ("value_weighted_attention", ()),
        ("replay", ("select.params={plus: true}",)),
        ("span_drop", ()),
    ],
)
def test_values_weighed_where_no_output_projection_is_known(tmp_path: Path, mode: str, more: tuple[str, ...]) -> None:
    """JetMoE projects in its mixture of experts; without weighing it can be run."""
    model = folder(tmp_path / "m", "jetmoe", kv_channels=16)
    said = run(f"select.mode={mode}", *more, at=model)
    assert f"select.mode={mode} reads " in said
    assert "layer 0 has no o_proj" in said
    assert loads(at=model)


def test_a_selector_of_a_grid_is_named(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", "jetmoe", kv_channels=16)
    with pytest.raises(ModelError, match=r"select\.mode=value_weighted_attention reads ValueNorm"):
        run_comparison("ablate_selector", tiny.config(model), {"select_modes": "random_span,value_weighted_attention"})


def test_a_replay_beyond_the_context(tmp_path: Path) -> None:
    """Demo and query fit the model, the demo twice does not."""
    config, tokenizer = tiny.config("x"), tiny.tokenizer()
    longest = max(len(sample.teacher_ids) for sample in load_samples(config, tokenizer, 1024, 500).on)
    model = folder(tmp_path / "m", "llama", max_position_embeddings=longest + 5)
    said = run("select.mode=replay", at=model)
    assert said.startswith("6 of 6 ON samples cannot be used")
    assert f"positions in the arm 'replay', the model has {longest + 5}" in said
    assert loads(at=model)
