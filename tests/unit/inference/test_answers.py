"""Answers of several tokens in one pass, against plain passes token by token; readings that must not see them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cedkv.inference.answers import AnswerReader, Answers
from cedkv.inference.forward import next_token_logprobs
from cedkv.inference.teacher import read_teacher
from cedkv.kv.cache import assemble
from cedkv.kv.positioning import place
from cedkv.kv.readers import AttentionReader, layer_readers
from cedkv.kv.readings import ExpectedAttention, ReceivedAttention, RowAttention, SpanDrop, ValueNorm
from cedkv.models.output_projection import grams
from tests.support import tiny

DEMOS = [[7, 8, 9, 30, 31], list(range(40, 52)), [20, 21, 22, 60, 61, 62, 63]]
QUERIES = [[50, 51], [60], [70, 71, 72]]
ANSWERS = [(80, 81, 82, 83), (90,), (100, 101)]
NAMES = ["a", "b", "c"]


def token_by_token(folder: Path, prompts: list[list[int]]) -> list[list[torch.Tensor]]:
    """Log-probabilities before each token of the answers, each from a call of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts, ANSWERS, strict=True):
            calls = [model(torch.tensor([[*prompt, *answer[:n]]])).logits[0, -1] for n in range(len(answer))]
            found.append([logits.double().log_softmax(dim=-1) for logits in calls])
    return found


def assert_answers(answered: Answers, expected: list[list[torch.Tensor]]) -> None:
    for row, (answer, before) in enumerate(zip(ANSWERS, expected, strict=True)):
        logprobs = torch.stack([one[token] for one, token in zip(before, answer, strict=True)])
        assert (answered.tokens[row, : len(answer)] - logprobs).abs().max() < 1e-4
        assert answered.tokens[row, len(answer) :].eq(0).all()
        assert float(answered.answer[row]) == pytest.approx(float(logprobs.sum()), abs=1e-4)
        assert (answered.logprobs[row] - before[0]).abs().max() < 1e-4


@pytest.mark.parametrize("rows_per_pass", [8, 2, 1])
def test_answers_of_any_length_in_one_batch(model_folder: Path, rows_per_pass: int) -> None:
    _, lm = tiny.load(model_folder, f"runtime.batch_size={rows_per_pass}")
    reader = AnswerReader(ANSWERS)
    answered = reader.read(next_token_logprobs(lm, QUERIES, NAMES, further=reader.further))
    assert_answers(answered, token_by_token(model_folder, QUERIES))


def test_behind_a_prefix_and_a_head_that_queries_share(model_folder: Path) -> None:
    """Everything kept in its place is the teacher, also for the tokens that follow; a query's head is run apart."""
    _, lm = tiny.load(model_folder)
    head = list(range(200, 212))
    queries = [[*head, *query] for query in QUERIES]
    demo = DEMOS[1]
    teacher = read_teacher(lm, [demo], [QUERIES[1]], ["b"], AttentionReader(frozenset(), ()), keep=[0])
    prefix = assemble(teacher.demo_kv().keys, teacher.demo_kv().values, [place(range(12), 12, "absolute", "null_pad", 16)])
    reader = AnswerReader(ANSWERS)
    answered = reader.read(next_token_logprobs(lm, queries, NAMES, prefix, None, [0, 0, 0], reader.further))
    assert_answers(answered, token_by_token(model_folder, [[*demo, *query] for query in queries]))


@pytest.mark.parametrize("demos", [DEMOS, [DEMOS[1], DEMOS[1], DEMOS[2]]], ids=["own", "shared"])
def test_teacher_answers_and_nothing_it_reads_sees_them(model_folder: Path, demos: list[list[int]]) -> None:
    """Rows, windows, received and expected attention, closed-form drops and the demo's K/V are what they are without."""
    _, lm = tiny.load(model_folder)
    shared = len({tuple(demo) for demo in demos}) < len(demos)
    weigh, readings = grams(lm), [RowAttention(2, "mean"), RowAttention(None, "max", over_input=True), ValueNorm()]
    readings += [SpanDrop(3, 1)] if shared else [ReceivedAttention(), ExpectedAttention(), SpanDrop(3, None)]
    reader = AttentionReader(frozenset({0, 3}), layer_readers(readings, weigh, lm.rope_layouts))
    answers = AnswerReader(ANSWERS)
    with_answers = read_teacher(lm, demos, QUERIES, NAMES, reader, range(3), answers.further)
    without = read_teacher(lm, demos, QUERIES, NAMES, reader, range(3))
    assert_answers(
        answers.read(with_answers.logprobs),
        token_by_token(model_folder, [[*demo, *query] for demo, query in zip(demos, QUERIES, strict=True)]),
    )
    for reading in readings:
        for row in range(3):
            seen, alone = with_answers.maps[reading][row], without.maps[reading][row]
            assert seen.shape == alone.shape
            assert (seen - alone).abs().max() < 1e-5 * max(1, float(alone.abs().max())), reading
    pairs = zip((*with_answers.demo_kv().keys,), (*without.demo_kv().keys,), strict=True)
    assert max(float((seen - alone).abs().max()) for seen, alone in pairs) < 1e-4
    assert torch.equal(with_answers.demo_kv().visible, without.demo_kv().visible)


def test_correct_means_every_token_is_the_greedy_one() -> None:
    greedy = torch.tensor([[0.1, 0.9], [0.1, 0.9], [0.9, 0.1]]).log()
    reader = AnswerReader([(1, 0), (1, 0), (1,)])
    visited = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log()
    reader.further.visit(1, [0, 1], visited)
    answered = reader.read(greedy)
    assert answered.correct.tolist() == [True, False, False]
    assert answered.answer.tolist() == pytest.approx(torch.tensor([0.9 * 0.8, 0.9 * 0.3, 0.1]).log().tolist())
    assert answered.rows([2, 0]).correct.tolist() == [False, True]
