"""Prefix tensors: null slots, rotation, gathering, and that use leaves them as they were."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import generic

from cedkv.core.values import Placement
from cedkv.inference.forward import next_token_logprobs, prefill
from cedkv.inference.teacher import read_teacher
from cedkv.kv.cache import assemble, cache_argument, gather, output_cache
from cedkv.kv.positioning import place
from cedkv.kv.readers import AttentionReader
from cedkv.kv.rope import rerotate_keys
from cedkv.library.selecting import select_kv
from tests.support import tiny

DEMOS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24]]
QUERIES = [[40, 41, 42], [50]]


def test_rotated_keys_are_the_models_own(model_folder: Path) -> None:
    """Two ways to the same tensor: run at the new positions, or run at the old ones and rotate."""
    _, lm = tiny.load(model_folder)
    here, values = prefill(lm, DEMOS, [range(8), range(5)], list("ab"))
    there, same_values = prefill(lm, DEMOS, [range(100, 108), range(100, 105)], list("ab"))
    for key, expected, value, same, turn in zip(here, there, values, same_values, lm.rope_layouts, strict=True):
        moved = rerotate_keys(key, torch.full((2, 8), 100), turn)
        for row, demo in enumerate(DEMOS):
            assert (moved - expected)[row, :, : len(demo)].abs().max() < 1e-3 * expected.abs().max()
            assert (value - same)[row, :, : len(demo)].abs().max() < 1e-3 * same.abs().max()
    assert not torch.allclose(here[0], there[0], atol=0.1)


def test_null_slots_are_zero_and_hidden() -> None:
    keys = (torch.ones(2, 1, 4, 2),)
    placements = [Placement((0, 1, 2, 3), (0, 1, 2, 3), 4, 6), Placement((0, 2), (0, 1), 2, 6)]
    prefix = assemble(keys, keys, placements)
    assert prefix.visible.tolist() == [[True] * 4 + [False] * 2, [True] * 2 + [False] * 4]
    assert prefix.keys[0][:, 0, :, 0].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert prefix.query_start.tolist() == [4, 2]


def test_gather_takes_each_row_its_own_tokens(model_folder: Path) -> None:
    """Guards against row 0's choice for the whole batch, and against the left padding of the pass left in the cache."""
    _, lm = tiny.load(model_folder)
    reading = read_teacher(lm, DEMOS, QUERIES, list("ab"), AttentionReader(frozenset(), ()), keep=[0, 1])
    assert reading.demo is not None
    assert reading.demo.visible.sum(dim=1).tolist() == [8, 5]
    kept = [(0, 3, 4), (1, 2, 4)]
    placements = [place(k, len(d), "absolute", "shrink_to_selected", 8) for k, d in zip(kept, DEMOS, strict=True)]
    prefix = assemble(*gather(reading.demo, [0, 1], placements, lm.rope_layouts), placements)
    for row, demo in enumerate(DEMOS):
        keys, values = prefill(lm, [demo], [range(len(demo))], ["x"])
        for layer in range(4):
            assert torch.allclose(prefix.keys[layer][row], keys[layer][0][:, list(kept[row])], atol=1e-3)
            assert torch.allclose(prefix.values[layer][row], values[layer][0][:, list(kept[row])], atol=1e-3)


def test_rows_repeat_and_hide_is_per_row(model_folder: Path) -> None:
    _, lm = tiny.load(model_folder)
    keys, values = prefill(lm, DEMOS, [range(8), range(5)], list("ab"))
    prefix = assemble(keys, values, [place(range(len(d)), len(d), "compact", "null_pad", 10) for d in DEMOS])
    three = prefix.rows([1, 0, 1])
    assert three.query_start.tolist() == [5, 8, 5]
    hidden = three.hide([[(0, 2)], [], [(3, 4), (4, 5)]])
    assert hidden.visible.sum(dim=1).tolist() == [3, 8, 3]
    assert three.visible.sum(dim=1).tolist() == [5, 8, 5]


def test_use_leaves_a_prefix_as_it_was(model_folder: Path) -> None:
    """Caches grow in place: injecting the same prefix twice must give the same answer."""
    _, lm = tiny.load(model_folder)
    keys, values = prefill(lm, DEMOS, [range(8), range(5)], list("ab"))
    prefix = assemble(keys, values, [place(range(len(d)), len(d), "compact", "null_pad", 10) for d in DEMOS])
    copies = [tensor.clone() for tensor in prefix.keys + prefix.values]
    first = next_token_logprobs(lm, QUERIES, list("ab"), prefix)
    second = next_token_logprobs(lm, QUERIES, list("ab"), prefix)
    assert torch.equal(first, second)
    assert all(torch.equal(now, then) for now, then in zip(prefix.keys + prefix.values, copies, strict=True))


class OldModel:
    """A forward pass by the name that transformers had before 5.24, as code of a checkpoint still may."""

    def forward(self, input_ids: torch.Tensor, past_key_values: object = None) -> None: ...


def test_a_cache_goes_by_the_name_that_a_model_knows(model_folder: Path) -> None:
    _, lm = tiny.load(model_folder)
    cache = DynamicCache()
    assert cache_argument(OldModel(), cache) == {"past_key_values": cache}
    for model in (lm.model, lm.model.base_model):
        (name,) = cache_argument(model, cache)
        assert name in inspect.signature(type(model).forward).parameters
    assert output_cache(SimpleNamespace(cache=cache)) is output_cache(SimpleNamespace(past_key_values=cache)) is cache


def test_no_pass_uses_a_name_that_transformers_gave_up(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so once per process, by a warning and in the log: whichever pass comes first."""
    said: list[str] = []
    monkeypatch.setattr(generic.logger, "warning_once", said.append)
    _, lm = tiny.load(llama_folder)
    demo = "Word: dax\nSymbol: red\n\nWord: wug\nSymbol: blue\n\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        small = {"span_len": 4, "span_budget": 2, "kv_source": "gather", "boundary_replay": 2}
        prefix = select_kv(lm, demo, ["Word: wug\nSymbol:", "Word: dax\nSymbol:"], "replay", **small)
        prefix.generate(max_new_tokens=3)
        lm.model(**prefix.inputs())
        lm.model.generate(**prefix.inputs(), max_new_tokens=2, do_sample=False)
    assert [line for line in said if "past_key_values" in line] == []
