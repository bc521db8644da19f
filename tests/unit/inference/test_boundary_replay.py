"""Boundary replay against the model's own uncached pass, and at its two ends: nothing replayed, everything replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cedkv.core.values import OnEpisode, OnSample, Placement
from cedkv.inference.boundary_replay import replayed_slots
from cedkv.inference.distributions import kl
from cedkv.inference.forward import full_demo_prefix, next_token_logprobs, prefill
from cedkv.inference.prefix import encode
from cedkv.kv.cache import KVPrefix
from cedkv.kv.positioning import place
from cedkv.models.loading import LanguageModel
from tests.support import tiny

DEMOS = [tuple(range(5, 25)), tuple(range(40, 53)), tuple(range(60, 70))]
KEPT = [(0, 1, 4, 5, 6, 10, 11, 12, 13), (2, 3, 7, 8), (0, 1, 2)]
QUERIES = [[90, 91, 92], [93], [94, 95]]


@pytest.mark.parametrize(
    ("kept", "k", "slots"),
    [
        ((0, 1, 4, 5, 6, 10), 2, [2, 3, 5]),
        ((0, 1, 4, 5, 6, 10), 0, []),
        ((2, 3, 4, 9), 1, [0, 3]),
        ((0, 1, 2), 8, []),
        ((3, 4), 8, [0, 1]),
    ],
)
def test_first_tokens_of_each_run_that_does_not_begin_with_the_demo(kept: tuple[int, ...], k: int, slots: list[int]) -> None:
    assert replayed_slots(kept, k) == slots


@pytest.mark.parametrize("positioning", ["compact", "absolute"])
def test_everything_replayed_is_prefill_and_nothing_replayed_is_gather(model_folder: Path, positioning: str) -> None:
    _, lm = tiny.load(model_folder)
    samples, placements = _samples(), _placements(positioning)
    demo = _demo(lm)
    answers = {
        k: _answer(lm, encode(lm, "gather", samples, placements, demo, range(3), boundary_replay=k)) for k in (0, 1, 3, 99)
    }
    prefilled = _answer(lm, encode(lm, "prefill", samples, placements, None, ()))
    gathered = _answer(lm, encode(lm, "gather", samples, placements, demo, range(3)))
    assert kl(answers[99], prefilled).max() < 1e-6
    assert torch.equal(answers[0], gathered)
    assert kl(answers[1], gathered)[:2].min() > 1e-5
    assert kl(answers[3], answers[1])[0] > 1e-5
    assert kl(answers[3], gathered)[2] < 1e-9, "a run that begins with the demo is left alone"


@pytest.mark.parametrize("k", [1, 2])
def test_replayed_tokens_are_those_of_a_pass_that_sees_the_kept_tokens_before_them(model_folder: Path, k: int) -> None:
    """One token at a time over a cache that grows, which needs no mask: K/V of every replayed token, in every layer."""
    _, lm = tiny.load(model_folder)
    samples, placements = _samples(), _placements("compact")
    demo = _demo(lm)
    gathered = encode(lm, "gather", samples, placements, demo, range(3))
    found = encode(lm, "gather", samples, placements, demo, range(3), boundary_replay=k)
    for row, placement in enumerate(placements):
        keys, values = (
            [t[row : row + 1, :, : len(placement.kept_tokens)].clone() for t in x] for x in (gathered.keys, gathered.values)
        )
        for slot in replayed_slots(placement.kept_tokens, k):
            before = KVPrefix(
                tuple(t[:, :, :slot] for t in keys), tuple(t[:, :, :slot] for t in values),
                torch.ones(1, slot, dtype=torch.bool), torch.tensor([slot]),
            )  # fmt: skip
            token, position = samples[row].demo_token_ids[placement.kept_tokens[slot]], placement.key_positions[slot]
            with torch.inference_mode():
                output = lm.model.base_model(
                    input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[position]]),
                    attention_mask=torch.ones(1, slot + 1, dtype=torch.long),
                    past_key_values=before.fresh_cache() if slot else None, use_cache=True,
                )  # fmt: skip
            for layer, cached in enumerate(output.past_key_values.layers):
                keys[layer][:, :, slot], values[layer][:, :, slot] = cached.keys[:, :, -1], cached.values[:, :, -1]
        for layer in range(len(keys)):
            n = len(placement.kept_tokens)
            assert torch.allclose(found.keys[layer][row, :, :n], keys[layer][0], atol=1e-4)
            assert torch.allclose(found.values[layer][row, :, :n], values[layer][0], atol=1e-4)


def _samples() -> list[OnSample]:
    return [
        OnSample(OnEpisode(f"s{i}", "", "", "", ()), demo, tuple(query), (1,), ("input",) * len(demo))
        for i, (demo, query) in enumerate(zip(DEMOS, QUERIES, strict=True))
    ]


def _placements(positioning: str) -> list[Placement]:
    return [place(kept, len(demo), positioning, "null_pad", 12) for kept, demo in zip(KEPT, DEMOS, strict=True)]


def _demo(lm: LanguageModel) -> KVPrefix:
    keys, values = prefill(lm, DEMOS, [range(len(demo)) for demo in DEMOS], ["a", "b", "c"])
    return full_demo_prefix(keys, values, [len(demo) for demo in DEMOS])


def _answer(lm: LanguageModel, prefix: KVPrefix) -> torch.Tensor:
    return next_token_logprobs(lm, QUERIES, ["a", "b", "c"], prefix)
