"""Attention calls: masks, observers, and layers that do not see a prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cedkv.inference.forward import next_token_logprobs, prefill
from cedkv.inference.teacher import read_teacher
from cedkv.kv import attention
from cedkv.kv.attention import AttentionCall, HiddenPrefix, ScoreForm, attention_rows, hide_prefix, observe_attention
from cedkv.kv.readers import AttentionReader, layer_readers
from cedkv.kv.readings import RowAttention
from tests.support import tiny

DEMOS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24], [30] * 6]
QUERIES = [[40, 41, 42], [50, 51], [60, 61, 62, 63]]


class Layers:
    """The layers whose attention calls were seen."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def observe(self, call: AttentionCall) -> None:
        self.seen.append(call.layer)


def test_every_layer_is_observed_once(model_folder: Path) -> None:
    _, lm = tiny.load(model_folder)
    layers = Layers()
    with observe_attention(layers), torch.inference_mode():
        lm.model(torch.tensor([[1, 2, 3]]))
    lm.model(torch.tensor([[1, 2, 3]]))
    assert layers.seen == [0, 1, 2, 3]


def test_masks_of_every_kind_mean_the_same() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~causal, float("-inf"))
    rows = [attention_rows(query, key, mask, ScoreForm(0.3), 2, 5) for mask in (None, causal, additive)]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert torch.allclose(rows[0].sum(dim=-1), torch.ones(2, 4, 3))


@pytest.mark.parametrize(("layers", "missing"), [({2, 9}, r"\[9\]"), ({8, 9}, r"\[8, 9\]")])
def test_unread_layer_is_an_error(llama_folder: Path, layers: set[int], missing: str) -> None:
    """A model that does not call the registered function must not give zeros for scores."""
    _, lm = tiny.load(llama_folder)
    reader = AttentionReader(frozenset(layers), layer_readers([RowAttention(1, "mean")], {}, None))
    with pytest.raises(RuntimeError, match=missing):
        read_teacher(lm, DEMOS, QUERIES, list("abc"), reader)


def test_no_context_outlives_its_pass(llama_folder: Path) -> None:
    """A reader left behind would keep collecting, and a hidden prefix left behind would cut keys of the next pass."""
    with (
        pytest.raises(ZeroDivisionError),
        observe_attention(Layers()),
        hide_prefix(HiddenPrefix(3, frozenset())),
    ):
        raise ZeroDivisionError
    assert attention._observer.get() is None
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
