"""Batched scoring against plain, unbatched, uncached transformers calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cedkv.core.errors import NumericsError
from cedkv.inference.distributions import kl
from cedkv.inference.forward import next_token_logprobs, prefill
from cedkv.inference.teacher import read_teacher
from cedkv.kv.cache import assemble
from cedkv.kv.positioning import place
from cedkv.kv.readers import AttentionReader, layer_readers
from cedkv.kv.readings import RowAttention
from tests.support import tiny

ROWS = [[5], [7, 8, 9], [10, 11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32, 33], [40, 41]]
NAMES = [f"s{i}" for i in range(len(ROWS))]
NOTHING = AttentionReader(frozenset(), ())


def plain(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([row])).logits[0, -1].double().log_softmax(dim=-1) for row in rows])


def test_batches_of_any_company_equal_single_rows(model_folder: Path) -> None:
    """Rows are sorted by length inside; they must come back in the order given."""
    _, lm = tiny.load(model_folder)
    found = next_token_logprobs(lm, ROWS, NAMES)
    assert (found - plain(model_folder, ROWS)).abs().max() < 1e-4
    backwards = next_token_logprobs(lm, ROWS[::-1], NAMES[::-1])
    assert (found - backwards.flip(0)).abs().max() < 1e-4


def test_student_with_everything_kept_is_the_teacher(model_folder: Path) -> None:
    _, lm = tiny.load(model_folder)
    demos, queries = ROWS[1:4], [[50, 51], [60], [70, 71, 72]]
    names = NAMES[:3]
    teacher = read_teacher(lm, demos, queries, names, NOTHING)
    assert teacher.demo is None
    assert (teacher.logprobs - plain(model_folder, [d + q for d, q in zip(demos, queries, strict=True)])).abs().max() < 1e-4
    keys, values = prefill(lm, demos, [range(len(d)) for d in demos], names)
    for positioning, padding in (("absolute", "null_pad"), ("compact", "shrink_to_selected")):
        placements = [place(range(len(d)), len(d), positioning, padding, 16) for d in demos]
        student = next_token_logprobs(lm, queries, names, assemble(keys, values, placements))
        assert kl(student, teacher.logprobs).max() < 1e-6


def test_demo_cache_of_the_teacher_serves_as_a_prefix(model_folder: Path) -> None:
    """The demo cache, its mask and its query start belong together."""
    _, lm = tiny.load(model_folder)
    demos, queries = ROWS[1:4], [[50, 51], [60], [70, 71, 72]]
    teacher = read_teacher(lm, demos, queries, NAMES[:3], NOTHING, keep=range(3))
    assert teacher.demo is not None
    assert kl(next_token_logprobs(lm, queries, NAMES[:3], teacher.demo), teacher.logprobs).max() < 1e-6


def test_masked_null_slots_change_nothing_and_unmasked_ones_would(model_folder: Path) -> None:
    """Zero keys that are not masked add exp(0) to every softmax denominator."""
    _, lm = tiny.load(model_folder)
    keys, values = prefill(lm, ROWS[1:3], [range(3), range(7)], NAMES[:2])
    queries = [[50, 51], [60]]
    placements = [place(range(len(d)), len(d), "compact", "null_pad", 64) for d in ROWS[1:3]]
    prefix = assemble(keys, values, placements)
    masked = next_token_logprobs(lm, queries, NAMES[:2], prefix)
    object.__setattr__(prefix, "visible", torch.ones_like(prefix.visible))
    unmasked = next_token_logprobs(lm, queries, NAMES[:2], prefix)
    shrunk = [place(range(len(d)), len(d), "compact", "shrink_to_selected", 64) for d in ROWS[1:3]]
    assert kl(next_token_logprobs(lm, queries, NAMES[:2], assemble(keys, values, shrunk)), masked).max() < 1e-6
    assert kl(unmasked, masked).max() > 1e-3


HEAD = list(range(100, 112))
TAILS = [[5], [7, 8, 9], [10, 11], [20, 21, 22, 23]]


def test_a_head_that_rows_share_is_run_once(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template's head: as if each row had been run whole."""
    _, lm = tiny.load(model_folder)
    rows = [HEAD + tail for tail in TAILS]
    through = count_tokens(lm, monkeypatch)
    found = next_token_logprobs(lm, rows, NAMES[:4])
    assert (found - plain(model_folder, rows)).abs().max() < 1e-4
    assert through() <= len(HEAD) + 4 * max(map(len, TAILS))


@pytest.mark.parametrize("layers", [None, frozenset({0, 2}), frozenset()])
def test_under_prefixes_too_and_in_the_layers_that_see_them(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, layers: frozenset[int] | None
) -> None:
    """Layers that do not see the prefix see the head: it is no part of the prefix. Run apart, row by row, it is the same."""
    _, lm = tiny.load(model_folder)
    keys, values = prefill(lm, ROWS[1:3], [range(3), range(7)], NAMES[:2])
    prefix = assemble(keys, values, [place(range(len(d)), len(d), "compact", "null_pad", 16) for d in ROWS[1:3]])
    rows, owners = [HEAD + tail for tail in TAILS], [1, 0, 1, 1]
    apart = [
        next_token_logprobs(lm, [row], ["x"], prefix.rows([owner]), layers)[0] for row, owner in zip(rows, owners, strict=True)
    ]
    through = count_tokens(lm, monkeypatch)
    found = next_token_logprobs(lm, rows, NAMES[:4], prefix, layers, owners)
    assert kl(found, torch.stack(apart)).max() < 1e-6
    assert through() <= 2 * len(HEAD) + 4 * max(map(len, TAILS))


def test_a_demo_that_queries_share_is_run_once(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distribution, attention and cache are those of each sample by itself, in any order of demos."""
    _, lm = tiny.load(model_folder)
    long = list(range(200, 220))
    demos, queries = [long, ROWS[2], long, long], [[50, 51], [60], [70, 71, 72], [80]]
    rows = RowAttention(2, "mean")
    reader = AttentionReader(frozenset({1, 3}), layer_readers([rows], {}, None))
    apart = [read_teacher(lm, [d], [q], ["x"], reader, keep=[0]) for d, q in zip(demos, queries, strict=True)]
    through = count_tokens(lm, monkeypatch)
    found = read_teacher(lm, demos, queries, NAMES[:4], reader, keep=range(4))
    assert through() <= 2 * len(long) + 4 * 3
    assert kl(found.logprobs, torch.cat([one.logprobs for one in apart])).max() < 1e-6
    for row, one in enumerate(apart):
        assert (found.map(rows, row, frozenset({3})) - one.map(rows, 0, frozenset({3}))).abs().max() < 1e-5
        mine, its, length = found.demo_prefixes([row]).keys[2], one.demo_prefixes([0]).keys[2], len(demos[row])
        assert torch.allclose(mine[:, :, :length], its[:, :, :length], atol=1e-4)
    assert read_teacher(lm, demos, queries, NAMES[:4], reader).demo is None


def count_tokens(lm: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many tokens went through the model since, padding included."""
    real, seen = lm.model.base_model.forward, []

    def counted(*args: Any, **named: Any) -> Any:
        seen.append(named["input_ids"].numel())
        return real(*args, **named)

    monkeypatch.setattr(lm.model.base_model, "forward", counted)
    return lambda: sum(seen)


def test_positions_reach_the_model(model_folder: Path) -> None:
    """The same kept tokens elsewhere, or the query one further away, must give another answer."""
    _, lm = tiny.load(model_folder)
    demo, query = ROWS[2], [[50, 51]]
    keys, values = prefill(lm, [demo], [range(7)], ["a"])
    right = place(range(7), 7, "compact", "null_pad", 8)
    answers = []
    for start in (7, 8, 20):
        prefix = assemble(keys, values, [type(right)(right.kept_tokens, right.key_positions, start, right.slots)])
        answers.append(next_token_logprobs(lm, query, ["a"], prefix))
    assert kl(answers[1], answers[0]).item() > 1e-4
    assert kl(answers[2], answers[0]).item() > 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_their_sample(llama_folder: Path, value: float) -> None:
    """Only the row that holds the damaged token is named."""
    _, lm = tiny.load(llama_folder)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[31] = value
    with pytest.raises(NumericsError, match=r"1 of 4 samples .*first: s4"):
        next_token_logprobs(lm, ROWS[2:], NAMES[2:])
    with pytest.raises(NumericsError, match="s4"):
        prefill(lm, ROWS[2:5], [range(len(row)) for row in ROWS[2:5]], NAMES[2:5])


def test_kl_is_the_definition() -> None:
    student, reference = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.25 * torch.log(torch.tensor(0.5))
    assert kl(student, reference).item() == pytest.approx(float(expected))
    assert kl(student, student).item() == 0
