"""Base's own answers to OFF prompts against ``generate``, and the effect of a prefix along them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cedkv.inference.decoding import end_tokens
from cedkv.inference.distributions import kl
from cedkv.inference.forward import next_token_logprobs, prefill
from cedkv.inference.off import OffBase, OffReader, read_off_base
from cedkv.kv.cache import assemble
from cedkv.kv.positioning import place
from tests.support import tiny

HEAD = list(range(200, 212))
PROMPTS = [[5], [7, 8, 9], [10, 11, 12, 13, 14], [20, 21]]
NAMES = ["a", "b", "c", "d"]
TOKENS = 5


@pytest.mark.parametrize("head", [[], HEAD], ids=["", "head"])
@pytest.mark.parametrize("rows_per_pass", [8, 2])
def test_base_answers_what_generate_gives(model_folder: Path, head: list[int], rows_per_pass: int) -> None:
    _, lm = tiny.load(model_folder, f"runtime.batch_size={rows_per_pass}")
    prompts = [head + prompt for prompt in PROMPTS]
    base = read_off_base(lm, prompts, NAMES, TOKENS)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        assert base.tokens[row] == tuple(made[0, len(prompt) :].tolist())
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *base.tokens[row]]])).logits[0, len(prompt) - 1 :]
        assert (base.further[row] - logits[1:]).abs().max() < 1e-3
        assert (base.logprobs[row] - logits[0].double().log_softmax(dim=-1)).abs().max() < 1e-4
    entropy = torch.distributions.Categorical(logits=base.logprobs).entropy()
    assert (base.entropy() - entropy).abs().max() < 1e-6


def test_an_answer_stops_where_the_model_ends_it(llama_folder: Path) -> None:
    """Ends of the generation configuration and of the model's own; the token that ends an answer is no part of it."""
    _, lm = tiny.load(llama_folder)
    whole = read_off_base(lm, PROMPTS, NAMES, TOKENS).tokens
    lm.model.generation_config.eos_token_id = [whole[1][2], whole[2][0]]
    cut = read_off_base(lm, PROMPTS, NAMES, TOKENS).tokens
    for long, short in zip(whole, cut, strict=True):
        ends = [at for at, token in enumerate(long) if token in (whole[1][2], whole[2][0])]
        assert short == long[: ends[0] if ends else TOKENS]
    assert cut[2] == ()
    assert read_off_base(lm, PROMPTS, NAMES, 0).tokens == [()] * 4


def test_end_tokens_of_configurations_and_tokenizer() -> None:
    def lm(of_generation: object, own: object, of_tokenizer: object) -> Any:
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=own))
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=of_generation), config=config)
        return SimpleNamespace(model=model, tokenizer=SimpleNamespace(eos_token_id=of_tokenizer))

    assert end_tokens(lm([1, 2], 3, 4)) == {1, 2, 3, 4}
    assert end_tokens(lm(None, None, None)) == frozenset()


def test_the_first_distribution_does_not_depend_on_what_follows(model_folder: Path) -> None:
    """The plan's OFF effect is read in the same pass as the others, and is the one of a pass without them."""
    _, lm = tiny.load(model_folder)
    keys, values = prefill(lm, PROMPTS[1:3], [range(3), range(5)], NAMES[:2])
    prefix = assemble(keys, values, [place(range(len(d)), len(d), "compact", "null_pad", 8) for d in PROMPTS[1:3]])
    base, owners = read_off_base(lm, PROMPTS, NAMES, TOKENS), [0, 1, 1, 0]
    reader = OffReader(base, range(4))
    under = reader.read(next_token_logprobs(lm, PROMPTS, NAMES, prefix, None, owners, reader.further))
    alone = next_token_logprobs(lm, PROMPTS, NAMES, prefix, None, owners)
    assert kl(under.logprobs, alone).max() < 1e-9
    for position in range(1, TOKENS + 1):
        rows = [prompt + list(tokens[:position]) for prompt, tokens in zip(PROMPTS, base.tokens, strict=True)]
        expected = next_token_logprobs(lm, rows, NAMES, prefix, None, owners)
        moved = kl(expected, next_token_logprobs(lm, rows, NAMES))
        assert under.kl[:, position - 1].tolist() == pytest.approx(moved.tolist(), rel=1e-3, abs=1e-5)
        assert under.kl[:, position - 1].min() > 1e-3


def test_prompts_of_a_part_are_compared_with_their_own_answers() -> None:
    """Conditions that share some prompts run the others alone: indices of the pass are not those of the unit."""
    further = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0))
    base = OffBase(torch.zeros(3, 7), [(1, 2), (), (3,)], further)
    reader = OffReader(base, [2, 0])
    assert [*reader.further.given] == [(3,), (1, 2)]
    reader.further.visit(1, [0, 1], further[[2, 0], 0].double().log_softmax(dim=-1))
    reader.further.visit(2, [1], further[[1], 1].double().log_softmax(dim=-1))
    read = reader.read(torch.zeros(2, 7))
    assert read.kl[:, 0].max() < 1e-12
    assert read.kl[1, 1] > 1e-2
    assert read.same[:, 0].all()


def test_conditions_that_share_prefixes_share_what_is_found_along_answers(llama_folder: Path) -> None:
    """The same in a grid as alone, and once less to compute."""
    grid = {"plain": (), "drop": ("select.mode=causal_drop_span",), "window": ("select.query_window=3",)}
    together = tiny.grid_records(llama_folder, grid, "select.span_budget=1")
    for name, own in grid.items():
        alone = {r["sample_id"]: r for r in tiny.records(llama_folder, "select.span_budget=1", *own) if r.get("kind") == "off"}
        for record in (r for r in together[name] if r.get("kind") == "off"):
            assert record["further_token_ids"] == alone[record["sample_id"]]["further_token_ids"]
            assert record["further_kl"] == pytest.approx(alone[record["sample_id"]]["further_kl"], rel=1e-3, abs=1e-5)
            assert record["further_same"] == alone[record["sample_id"]]["further_same"]
