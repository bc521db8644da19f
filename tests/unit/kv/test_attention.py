"""Attention rows, and layers that do not see a prefix, against the eager implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cedkv.inference.forward import next_token_logprobs, prefill
from cedkv.inference.teacher import read_teacher
from cedkv.kv import attention
from cedkv.kv.attention import AttentionReader, HiddenPrefix, ScoreForm, attention_rows, capture_attention, hide_prefix
from tests.support import tiny

DEMOS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24], [30] * 6]
QUERIES = [[40, 41, 42], [50, 51], [60, 61, 62, 63]]


@pytest.mark.parametrize("window", [1, 2, 8])
def test_rows_equal_eager_attention(model_folder: Path, window: int) -> None:
    """One by one and unpadded under eager, in a padded batch here; the window stops at the query's first token."""
    _, lm = tiny.load(model_folder)
    layers = frozenset({1, 3})
    found = read_teacher(lm, DEMOS, QUERIES, list("abc"), AttentionReader(layers, window, layers))
    eager = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    for row, (demo, query) in enumerate(zip(DEMOS, QUERIES, strict=True)):
        maps = eager(torch.tensor([demo + query]), output_attentions=True).attentions
        rows = torch.stack([maps[layer][0] for layer in sorted(layers)])[:, :, -min(window, len(query)) :, : len(demo)]
        expected = rows.mean(dim=(0, 1, 2)).double().detach().numpy()
        assert abs(found.attention(row, layers, window) - expected).max() < 1e-5
        full = torch.stack([maps[layer][0] for layer in sorted(layers)]).mean(dim=(0, 1)).double().detach()
        received = (full.tril(-1).sum(dim=0) / (len(full) - 1 - torch.arange(len(full))))[: len(demo)].numpy()
        assert abs(found.accumulated(row, layers) - received).max() < 1e-5


def test_masks_of_every_kind_mean_the_same() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~causal, float("-inf"))
    rows = [attention_rows(query, key, mask, ScoreForm(0.3), 2, 5) for mask in (None, causal, additive)]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert torch.allclose(rows[0].sum(dim=-1), torch.ones(2, 4, 3))


def test_received_attention_in_chunks_is_the_same(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are summed a chunk at a time; the chunk's own offset must not matter."""
    _, lm = tiny.load(llama_folder)
    layers = frozenset({0, 3})
    found = []
    for chunk in (128, 3, 1):
        monkeypatch.setattr(attention, "ROW_CHUNK", chunk)
        capture_attention = read_teacher(lm, DEMOS, QUERIES, list("abc"), AttentionReader(layers, 1, layers))
        found.append([capture_attention.accumulated(row, layers) for row in range(3)])
    for other in found[1:]:
        assert all(abs(a - b).max() < 1e-6 for a, b in zip(found[0], other, strict=True))


def test_unread_layer_is_an_error(llama_folder: Path) -> None:
    """A model that does not call the registered function must not give zeros for scores."""
    _, lm = tiny.load(llama_folder)
    with capture_attention(AttentionReader(frozenset({2, 9}), 1)) as reader, torch.inference_mode():
        lm.model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(RuntimeError, match=r"\[9\]"):
        reader.require_complete()


def test_no_context_outlives_its_pass(llama_folder: Path) -> None:
    """A reader left behind would keep collecting, and a hidden prefix left behind would cut keys of the next pass."""
    with (
        pytest.raises(ZeroDivisionError),
        capture_attention(AttentionReader(frozenset({0}), 1)),
        hide_prefix(HiddenPrefix(3, frozenset())),
    ):
        raise ZeroDivisionError
    assert attention._reader.get() is None
    assert attention._hidden.get() is None


def test_prefix_hidden_from_all_layers_is_as_if_it_were_not_there(model_folder: Path) -> None:
    """With no layer in scope the student equals the query alone at the same positions; with all, the plain student."""
    _, lm = tiny.load(model_folder)
    from cedkv.core.values import Placement
    from cedkv.kv.cache import assemble

    keys, values = prefill(lm, DEMOS, [list(range(len(demo))) for demo in DEMOS], list("abc"))
    placements = [Placement(tuple(range(len(d))), tuple(range(len(d))), len(d), 12) for d in DEMOS]
    prefix = assemble(keys, values, placements)
    nothing = next_token_logprobs(lm, QUERIES, list("abc"), prefix, frozenset())
    plain = next_token_logprobs(lm, QUERIES, list("abc"), prefix)
    every = next_token_logprobs(lm, QUERIES, list("abc"), prefix, frozenset(range(4)))
    some = next_token_logprobs(lm, QUERIES, list("abc"), prefix, frozenset({0, 1}))
    alone = next_token_logprobs(lm, QUERIES, list("abc"))  # rotary attention depends on distances only
    assert torch.allclose(nothing, alone, atol=1e-4)
    assert torch.allclose(every, plain, atol=1e-6)
    assert not torch.allclose(some, plain, atol=1e-1)
    assert not torch.allclose(some, nothing, atol=1e-1)
