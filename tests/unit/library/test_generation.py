"""Sampling, streaming, and where a text ends."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cedkv.core.errors import ConfigError, NumericsError
from cedkv.inference.decoding import end_tokens
from cedkv.inference.generation import Sampling, pieces_of, stream_tokens
from cedkv.models.loading import LanguageModel
from cedkv.models.tokenizer import tokens_text
from tests.support import zoo
from tests.unit.library.conftest import QUERIES, select


def test_sampling_is_reproducible_by_seed_whatever_else_is_in_the_batch(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = select(lm, [*QUERIES, QUERIES[0]])
    options = {"do_sample": True, "seed": 3, "temperature": 0.9, "top_p": 0.95, "top_k": 40}
    texts = batch.generate(12, **options)
    assert texts == batch.generate(12, **options)
    assert texts[:3] == [prefix.generate(max_new_tokens=12, **options) for prefix in batch][:3]
    assert texts != batch.generate(12, **{**options, "seed": 4})
    assert texts[3] != texts[0], "the same query twice is drawn twice"
    monkeypatch.setattr(lm.batching, "max_rows", 1)
    assert batch.generate(12, **options) == texts
    assert "".join(batch[0].stream(max_new_tokens=12, **options)) == texts[0]


def test_without_a_seed_torch_s_own_decides(lm: LanguageModel) -> None:
    prefix = select(lm)
    torch.manual_seed(0)
    first = [prefix.generate(max_new_tokens=12, do_sample=True) for _ in range(2)]
    torch.manual_seed(0)
    assert [prefix.generate(max_new_tokens=12, do_sample=True) for _ in range(2)] == first
    assert first[0] != first[1]


def test_tokens_are_drawn_as_often_as_they_are_probable(lm: LanguageModel) -> None:
    prefix = select(lm)
    n, layers = 400, None
    rows = [prefix.query_ids()] * n
    (drawn,) = stream_tokens(lm, rows, ["q"] * n, prefix.kv, layers, [0] * n, 1, Sampling(seed=1, temperature=1.5))
    probable = (prefix.logprobs() / 1.5).softmax(dim=-1)
    counted = Counter(token for token in drawn if token is not None)
    for token in probable.topk(5).indices.tolist():
        share = float(probable[token])
        assert abs(counted[token] / n - share) < 4 * (share * (1 - share) / n) ** 0.5 + 1 / n
    (few,) = stream_tokens(lm, rows, ["q"] * n, prefix.kv, layers, [0] * n, 1, Sampling(seed=1, temperature=1.5, top_k=2))
    assert set(few) == set(probable.topk(2).indices.tolist())
    (sure,) = stream_tokens(lm, rows, ["q"] * n, prefix.kv, layers, [0] * n, 1, Sampling(seed=1, top_p=1e-6))
    assert set(sure) == {int(probable.argmax())}


def test_settings_of_a_draw_that_is_not_made_are_rejected(lm: LanguageModel) -> None:
    prefix = select(lm)
    with pytest.raises(ConfigError, match="temperature, seed would change nothing without do_sample=True"):
        prefix.generate(temperature=0.7, seed=1)
    with pytest.raises(ConfigError, match="temperature"):
        prefix.generate(do_sample=True, temperature=0.0)
    with pytest.raises(ConfigError, match="top_p"):
        prefix.stream(do_sample=True, top_p=1.5)
    with pytest.raises(ConfigError, match="generate takes no 'temprature'; did you mean 'temperature'"):
        prefix.generate(do_sample=True, temprature=1.0)
    with pytest.raises(ConfigError, match="streamer takes the text of one query"):
        prefix.generate(QUERIES, streamer=print)
    with pytest.raises(ConfigError, match="max_new_tokens = 0"):
        prefix.generate(max_new_tokens=0)


def test_streamed_pieces_are_the_text(lm: LanguageModel) -> None:
    prefix = select(lm)
    text = prefix.generate(max_new_tokens=40)
    assert len(text) > 10
    pieces = list(prefix.stream(max_new_tokens=40))
    seen: list[str] = []
    assert prefix.generate(max_new_tokens=40, streamer=seen.append) == text == "".join(pieces) == "".join(seen)
    assert len(pieces) > 5
    first = next(iter(prefix.stream(max_new_tokens=40)))
    assert text.startswith(first)


@pytest.mark.parametrize("kind", list(zoo.USABLE))
def test_pieces_of_any_tokenizer_join_to_the_text(kind: str) -> None:
    """Characters of several tokens too, and tokens that end in the middle of one."""
    tokenizer = zoo.made(kind)
    text = "Word: élan 猫 🙂\nSymbol: red"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    for ids in (tokens, tokens[:-1], list(range(len(tokenizer))), tokens[::-1]):
        pieces = list(pieces_of(ids, tokenizer))
        assert "".join(pieces) == tokens_text(tokenizer, ids, skip_special_tokens=True)
        assert all(pieces)


def test_a_text_ends_at_the_token_that_ends_texts(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """That token is no part of the text; other rows of the batch go on."""
    batch = select(lm, QUERIES)
    rows = [prefix.query_ids() for prefix in batch]
    steps = list(stream_tokens(lm, rows, QUERIES, batch.kv, None, [0, 1, 2], 6))
    assert len(steps) == 6
    first = steps[1][0]
    assert first is not None
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", [first])
    assert end_tokens(lm) == {first, lm.tokenizer.eos_token_id}
    ended = list(stream_tokens(lm, rows, QUERIES, batch.kv, None, [0, 1, 2], 6))
    assert ended[0][0] == steps[0][0]
    assert [step[0] for step in ended[1:]] == [None] * (len(ended) - 1)
    expected = [step[1] for step in steps]
    expected = expected[: expected.index(first)] if first in expected else expected
    assert [step[1] for step in ended if step[1] is not None] == expected
    assert batch[0].generate(max_new_tokens=6) == tokens_text(lm.tokenizer, [int(steps[0][0] or 0)], skip_special_tokens=True)


def test_logits_that_are_not_finite_end_the_generation(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = select(lm)
    weight = lm.model.lm_head.weight
    broken = weight.detach().clone()
    broken[3] = float("nan")
    monkeypatch.setattr(weight, "data", broken)
    with pytest.raises(NumericsError, match="logits of 1 of 1 samples are not finite"):
        prefix.generate()
