"""What a prefix answers: the engine's select arm, and full re-encoding by plain transformers, one token and many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cedkv.core.errors import ConfigError, ModelError
from cedkv.library.models import load_model
from cedkv.library.prefixes import SelectedPrefix
from cedkv.library.selecting import select_kv
from cedkv.models.loading import LanguageModel
from cedkv.tasks.load import load_samples
from tests.families.models import FAMILIES
from tests.families.models import save as save_family
from tests.support import tiny
from tests.support.eager import Eager
from tests.unit.library.conftest import QUERIES, SMALL, select

MODES = [("prefill", "compact"), ("prefill", "absolute"), ("gather", "absolute")]
PADDING = ["null_pad", "shrink_to_selected"]


def encoded_anew(plain: Eager, prefix: SelectedPrefix, kv_source: str) -> Callable[[Sequence[int]], np.ndarray]:
    """Plain transformers without any cache: the distribution after these tokens behind the prefix.

    Of prefill, the kept tokens at their positions; of gather, the whole demo, of which the tokens behind it see what is kept.
    """
    demo, kept, placed = prefix.sample.demo_token_ids, prefix.kept_tokens, prefix.placement

    def logprobs(tokens: Sequence[int]) -> np.ndarray:
        if kv_source == "gather":
            hidden = sorted(set(range(len(demo))) - set(kept))
            return plain.logprobs([*demo, *tokens], hidden, from_row=len(demo))
        behind = range(placed.query_start, placed.query_start + len(tokens))
        return plain.logprobs([*(demo[t] for t in kept), *tokens], positions=[*placed.key_positions, *behind])

    return logprobs


def greedy(after: Callable[[Sequence[int]], np.ndarray], query: Sequence[int], n: int) -> list[int]:
    """The most probable tokens one after the other, everything encoded anew for each."""
    tokens = list(query)
    for _ in range(n):
        tokens.append(int(after(tokens).argmax()))
    return tokens[len(query) :]


def check_against_plain(lm: LanguageModel, plain: Eager, n: int = 6, **settings: Any) -> None:
    prefix = select(lm, QUERIES[2], **settings)
    after = encoded_anew(plain, prefix, settings["kv_source"])
    query = prefix.query_ids()
    assert np.abs(prefix.logprobs().double().numpy() - after(query)).max() < 1e-3
    ends = {lm.tokenizer.eos_token_id}
    expected = greedy(after, query, n)
    expected = expected[: next((i for i, token in enumerate(expected) if token in ends), n)]
    assert expected, "the model ends at once: nothing is compared"
    text = lm.tokenizer.decode([*query, *expected], skip_special_tokens=True)
    assert prefix.generate(max_new_tokens=n) == text.removeprefix(lm.tokenizer.decode(query, skip_special_tokens=True))


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(("kv_source", "positioning"), MODES)
def test_generated_text_is_that_of_full_encoding(model_folder: Path, kv_source: str, positioning: str, padding: str) -> None:
    lm = load_model(model_folder, device="cpu")
    plain = Eager(model_folder)
    check_against_plain(lm, plain, kv_source=kv_source, positioning_mode=positioning, padding_mode=padding)


@pytest.mark.parametrize("name", ["Gemma 3 (text)", "Mistral, with windows"])
@pytest.mark.parametrize("positioning", ["compact", "absolute"])
def test_layers_with_windows_generate_the_same(tmp_path: Path, name: str, positioning: str) -> None:
    folder = save_family(next(family for family in FAMILIES if family.name == name), tmp_path / "model")
    lm = load_model(folder, device="cpu")
    check_against_plain(lm, Eager(folder), n=4, kv_source="prefill", positioning_mode=positioning)


def test_bos_is_kept_and_added_once(bos_folder: Path) -> None:
    lm = load_model(bos_folder, device="cpu")
    prefix = select(lm)
    assert prefix.kept_tokens[0] == 0
    assert prefix.sample.demo_token_ids[0] == lm.tokenizer.bos_token_id
    assert lm.tokenizer.bos_token_id not in prefix.query_ids()
    check_against_plain(lm, Eager(bos_folder), kv_source="prefill", positioning_mode="compact")


@pytest.mark.parametrize("kv_source", ["prefill", "gather"])
@pytest.mark.parametrize("positioning", ["compact", "absolute"])
@pytest.mark.parametrize("padding", PADDING)
def test_the_first_token_is_the_select_arm_s(llama_folder: Path, kv_source: str, positioning: str, padding: str) -> None:
    """The engine's records of its own samples, and the library on the same texts."""
    settings = {"kv_source": kv_source, "positioning_mode": positioning, "padding_mode": padding, "seed": 7}
    overrides = [f"prefix.kv_source={kv_source}", f"injection.positioning_mode={positioning}", f"prefix.padding_mode={padding}",
                 "seed=7", "eval.on_samples=3"]  # fmt: skip
    config, lm = tiny.load(llama_folder, *overrides)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary).on
    records = engine_records(llama_folder, overrides)
    assert len(records) == len(samples) == 3
    for sample, (on, selected) in zip(samples, records, strict=True):
        episode = sample.episode
        prefix = select_kv(lm, episode.demo_text, episode.query_text, **SMALL, demo_kinds=episode.char_kinds, **settings)
        logprobs = prefix.logprobs()
        assert list(prefix.kept_tokens) == selected["kept_tokens"]
        assert list(prefix.placement.key_positions) == selected["key_positions"]
        assert (prefix.scores_of, prefix.scores.tolist()) == (
            selected["scores_of"],
            pytest.approx(selected["scores"], abs=1e-5),
        )
        assert int(logprobs.argmax()) == on["token_select"]
        assert float(logprobs[sample.answer_token_id]) == pytest.approx(on["answer_logprob_select"], abs=1e-4)
        first = prefix.generate(max_new_tokens=1)
        assert first == on["topk"]["select"][0]["text"] or on["token_select"] == lm.tokenizer.eos_token_id


def engine_records(folder: Path, overrides: Sequence[str]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each ON sample's record and its selection."""
    records = tiny.records(folder, *overrides)
    on = {record["sample_id"]: record for record in records if record.get("kind") == "on"}
    selected = {record["sample_id"]: record for record in records if record["type"] == "selection"}
    return [(on[name], selected[name]) for name in on]


def test_some_layers_alone_see_the_prefix_while_text_is_generated(lm: LanguageModel) -> None:
    """Hidden from all but the last layer, a prefix changes the text otherwise than seen by all; a batch changes nothing."""
    hidden = select(lm, QUERIES, injection_layers=[3])
    assert hidden.generate(6) == [prefix.generate(max_new_tokens=6) for prefix in hidden]
    by_token = [hidden[0].logprobs(QUERIES[0] + text) for text in ("", hidden[0].generate(max_new_tokens=1))]
    assert lm.tokenizer.decode([int(logprobs.argmax()) for logprobs in by_token]) == hidden[0].generate(max_new_tokens=2)
    assert (hidden.logprobs() - select(lm, QUERIES).logprobs()).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="hides the prefix from some layers"):
        hidden[0].cache()


def test_many_queries_over_one_demo_are_one_by_one(lm: LanguageModel) -> None:
    for selector in ("attention_diversity_span", "random_span", "causal_drop_span", "value_weighted_attention"):
        together = select(lm, [*QUERIES, QUERIES[0]], selector=selector)
        alone = [select(lm, query, selector=selector) for query in QUERIES]
        for one, other in zip(together, alone, strict=False):
            assert one.kept_tokens == other.kept_tokens, selector
            assert one.kv.slots == other.kv.slots
            assert torch.allclose(one.logprobs(), other.logprobs(), atol=1e-4)
            assert one.generate() == other.generate()
        assert together.generate() == [prefix.generate() for prefix in together]
        assert torch.allclose(together.logprobs(), torch.stack([prefix.logprobs() for prefix in together]), atol=1e-4)


def test_several_queries_under_one_prefix(lm: LanguageModel) -> None:
    prefix = select(lm)
    assert prefix.generate(QUERIES, max_new_tokens=8) == [prefix.generate(query, max_new_tokens=8) for query in QUERIES]
    expected = torch.stack([prefix.logprobs(query) for query in QUERIES])
    assert torch.allclose(prefix.logprobs(QUERIES), expected, atol=1e-4)
    assert torch.equal(prefix.logprobs(), prefix.logprobs(QUERIES[0]))


def test_a_pass_of_one_s_own(lm: LanguageModel) -> None:
    """The documented calls: a pass of the model, its own ``generate``, and a loop over the cache."""
    for settings in ({}, {"positioning_mode": "absolute"}, {"padding_mode": "shrink_to_selected"}):
        batch = select(lm, QUERIES, **settings)
        logits = lm.model(**batch.inputs()).logits[:, -1]
        assert torch.allclose(logits.double().log_softmax(dim=-1), batch.logprobs(), atol=1e-4)
        given = batch.inputs()
        generated = lm.model.generate(**given, max_new_tokens=6, do_sample=False)[:, given["input_ids"].shape[1] :]
        assert lm.tokenizer.batch_decode(generated, skip_special_tokens=True) == batch.generate(6)
        cache, mask, start = batch[0].cache()
        assert cache.get_seq_length() == mask.shape[1] == batch[0].placement.slots
        assert int(mask.sum()) == len(batch[0].kept_tokens)
        for i, token in enumerate(batch[0].query_ids()):
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
            output = lm.model(torch.tensor([[token]]), attention_mask=mask, position_ids=start[None] + i, past_key_values=cache)
        assert torch.allclose(output.logits[0, -1].double().log_softmax(dim=-1), batch[0].logprobs(), atol=1e-4)
        assert torch.equal(batch[0].kv.visible, batch[0].cache().attention_mask.bool())


def test_a_prefix_is_not_changed_by_use(lm: LanguageModel) -> None:
    prefix = select(lm)
    before = [tensor.clone() for tensor in (*prefix.kv.keys, *prefix.kv.values)]
    first = prefix.generate()
    lm.model(**prefix.inputs())
    assert prefix.generate() == first
    assert all(torch.equal(one, other) for one, other in zip(before, (*prefix.kv.keys, *prefix.kv.values), strict=True))


def test_text_longer_than_the_model_can_attend_to_is_rejected(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"^query 1 needs 2019 positions in the arm 'select', the model has 1024 .* lower max_new_tokens"
    ):
        select(lm).generate(max_new_tokens=2000)
    folder = save_family(next(family for family in FAMILIES if family.name == "Mistral, with windows"), tmp_path / "model")
    windowed = select(load_model(folder, device="cpu"))
    with pytest.raises(ModelError, match=r"^query 1 needs \d+ slots and tokens .* the model has 599 .*window"):
        windowed.generate(max_new_tokens=900)
