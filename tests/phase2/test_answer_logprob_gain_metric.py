"""What is written down about a sample, against an independent computation in numpy float64."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cedkv.core.values import Evidence, OffSample, OnEpisode, OnSample, Placement, Record, Selection, Span
from cedkv.inference.answers import AnswerReader, Answers
from cedkv.inference.off import OffAnswers, OffBase
from cedkv.inference.quality import Quality
from cedkv.metrics_phase2 import run_metrics
from cedkv.recording import answers, off_records, on_record, repro_records, selection_record
from tests.support import making

VOCABULARY = 50
ANSWER = 7
EPISODE = OnEpisode("on-1", "demo", "query", " a", ())
SAMPLE = OnSample(EPISODE, (3, 4, 5, 6, 8, 9), (10, 11), (ANSWER,), making.kinds("diadia"), label_token_ids=(5, ANSWER, 9))
SELECTION = Selection((Span(0, 2, 0.4), Span(3, 5, 0.2)), (0, 1, 3, 4))
ATTENTION = np.array([0.5, 0.4, 0.0, 0.1, 0.3, 0.2])


class Decoder:
    def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[0])

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool, skip_special_tokens: bool = False) -> str:
        return "".join(f"<{token}>" for token in ids)


def logprobs(seed: int, top: int) -> torch.Tensor:
    """Random log-probabilities whose greedy token is ``top``."""
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits[top] = 4.0
    return torch.log_softmax(logits, dim=-1)


BASE, TEACHER, SELECT = logprobs(0, 2), logprobs(1, ANSWER), logprobs(2, ANSWER)
RANDOMS = [logprobs(3, ANSWER), logprobs(4, 5), logprobs(5, 6)]


def kl(student: torch.Tensor, reference: torch.Tensor) -> float:
    """Sum of p log(p / q), written out; p and q are made from the logits again, in float64."""
    p, q = (_softmax(x.numpy().astype(np.float64)) for x in (student, reference))
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(x) / np.exp(x).sum()


def recorded(
    base: torch.Tensor,
    select: torch.Tensor,
    randoms: list[torch.Tensor],
    evidence: Evidence,
    selection: Selection = SELECTION,
    span_len: int = 2,
) -> Record:
    """The record of the second of three samples; its neighbours answer otherwise, so that a mix-up of rows would show."""
    other = logprobs(9, 1)
    samples = [replace(SAMPLE, answer_token_ids=(3,)), SAMPLE, replace(SAMPLE, answer_token_ids=(4,))]

    def read(its: torch.Tensor) -> Answers:
        return AnswerReader([sample.answer_token_ids for sample in samples]).read(torch.stack([other, its, other]))

    arms = {name: read(its) for name, its in (("base", base), ("teacher", TEACHER), ("select", select))}
    trials = [read(its) for its in randoms]
    measured = answers(arms, trials, samples, Decoder(), 3)
    return on_record(SAMPLE, measured[1], evidence, selection, [], span_len, Quality())


@pytest.fixture(scope="module")
def record() -> Record:
    return recorded(BASE, SELECT, RANDOMS, Evidence(ATTENTION))


def test_answer_logprob_gain(record: Record) -> None:
    """The gain is read at the answer's token, natural log, select minus base: not at either arm's own top token."""
    p_select, p_base = (np.exp(x.numpy().astype(np.float64))[ANSWER] for x in (SELECT, BASE))
    assert record["phase2_answer_logprob_gain"] == pytest.approx(np.log(p_select / p_base), abs=1e-5)
    assert record["phase2_answer_logprob_gain"] > 1
    assert record["answer_logprob_random"] == pytest.approx([float(r[ANSWER]) for r in RANDOMS])
    for arm, values in (("base", BASE), ("teacher", TEACHER), ("select", SELECT)):
        assert record[f"answer_logprob_{arm}"] == pytest.approx(float(values[ANSWER]))


def test_gain_is_zero_for_equal_arms_and_changes_sign() -> None:
    same = recorded(BASE, BASE, [], Evidence(ATTENTION))
    turned = recorded(SELECT, BASE, [], Evidence(ATTENTION))
    assert same["token_random"] == []
    assert same["phase2_answer_logprob_gain"] == same["phase2_delta_on_select"] == 0
    assert turned["phase2_answer_logprob_gain"] < -1


@pytest.mark.parametrize(
    ("name", "student", "reference"),
    [("kl_base_teacher", BASE, TEACHER), ("kl_select_teacher", SELECT, TEACHER), ("phase2_delta_on_select", SELECT, BASE)],
)
def test_divergences_have_the_stated_direction(
    record: Record, name: str, student: torch.Tensor, reference: torch.Tensor
) -> None:
    """KL(student || reference); the reverse is another number on the same pair."""
    assert record[name] == pytest.approx(kl(student, reference), rel=1e-4)
    assert record[name] != pytest.approx(kl(reference, student), rel=1e-2)


def test_divergences_of_random_trials(record: Record) -> None:
    assert record["kl_random_teacher"] == pytest.approx([kl(r, TEACHER) for r in RANDOMS], rel=1e-4)
    assert record["kl_random_base"] == pytest.approx([kl(r, BASE) for r in RANDOMS], rel=1e-4)


def test_relative_kl_of_the_sample(record: Record) -> None:
    assert record["rel_kl_to_teacher"] == pytest.approx(kl(SELECT, TEACHER) / (kl(BASE, TEACHER) + 1e-6), rel=1e-4)


def test_tokens_and_correctness(record: Record) -> None:
    assert (record["token_base"], record["token_teacher"], record["token_select"]) == (2, ANSWER, ANSWER)
    assert (record["correct_base"], record["correct_teacher"], record["correct_select"]) == (False, True, True)
    assert record["token_random"] == [ANSWER, 5, 6]
    assert record["correct_random"] == [True, False, False]


def test_answers_among_labels(record: Record) -> None:
    """Restricted to the labels and renormalised, written out in numpy; the random trials one by one."""
    labels = [5, ANSWER, 9]

    def among(x: torch.Tensor) -> NDArray[np.float64]:
        p = _softmax(x.numpy().astype(np.float64))[labels]
        return p / p.sum()

    def divergence(student: torch.Tensor) -> float:
        return float(sum(a * np.log(a / b) for a, b in zip(among(student), among(TEACHER), strict=True)))

    assert record["kl_base_teacher_labels"] == pytest.approx(divergence(BASE), rel=1e-4)
    assert record["kl_select_teacher_labels"] == pytest.approx(divergence(SELECT), rel=1e-4)
    assert record["kl_select_teacher_labels"] != pytest.approx(record["kl_select_teacher"], rel=1e-2)
    assert record["kl_random_teacher_labels"] == pytest.approx([divergence(r) for r in RANDOMS], rel=1e-4)
    for arm, values in (("base", BASE), ("teacher", TEACHER), ("select", SELECT)):
        assert record[f"correct_{arm}_labels"] == (labels[among(values).argmax()] == ANSWER)
    assert record["correct_random_labels"] == [labels[among(r).argmax()] == ANSWER for r in RANDOMS]
    assert record["correct_random_labels"][1] is False
    arms = {"base": BASE, "teacher": TEACHER, "select": SELECT}
    read = {name: AnswerReader([SAMPLE.answer_token_ids]).read(its[None]) for name, its in arms.items()}
    alone = answers(read, [], [replace(SAMPLE, label_token_ids=())], Decoder(), 3)
    assert not [name for name in alone[0] if name.endswith("_labels")]


def test_gold_is_recorded_where_the_sample_has_it() -> None:
    placed = Placement((0, 1, 3, 4), (0, 1, 2, 3), 4, 4)
    for gold, depth in (((3, 5), 0.5), (None, None)):
        sample = replace(SAMPLE, gold_tokens=gold)
        assert on_record(sample, {}, Evidence(ATTENTION), SELECTION, [], 2, Quality()).get("gold_depth") == depth
        selection = selection_record(sample, sample, Evidence(ATTENTION), SELECTION, placed, [], Quality())
        assert selection.get("gold_tokens") == (None if gold is None else list(gold))
        assert selection["label_token_ids"] == [5, ANSWER, 9]


def test_top_tokens(record: Record) -> None:
    for arm, values in (("base", BASE), ("teacher", TEACHER), ("select", SELECT)):
        order = np.argsort(-values.numpy())[:3].tolist()
        assert [entry["token_id"] for entry in record["topk"][arm]] == order
        assert [entry["text"] for entry in record["topk"][arm]] == [f"<{k}>" for k in order]
        assert [entry["logprob"] for entry in record["topk"][arm]] == pytest.approx(values[order].tolist())


def test_scores_leave_out_the_sink(record: Record) -> None:
    """The demo's first token, a sink with most of the attention, would raise the score of a span that starts there."""
    assert record["phase2_selection_score_attention"] == pytest.approx((0.4 + 0.2) / 2)
    assert record["selector_score"] == pytest.approx((0.4 + 0.2) / 2)


def test_advisory_causal_drop() -> None:
    """Candidates stand in the order of their starts, in both lists; a candidate that is only the sink scores 0, not NaN."""
    drops = {3: 0.3, 0: 0.1, 4: 0.2}
    found = recorded(BASE, SELECT, [], Evidence(ATTENTION, causal_drop=drops))
    assert found["candidate_causal_drop"] == [0.1, 0.3, 0.2]
    assert found["candidate_attention"] == pytest.approx([0.4, 0.2, 0.25])
    assert found["phase2_selection_score_causal_drop"] == pytest.approx((0.1 + 0.3) / 2)
    single = replace(SELECTION, spans=(Span(0, 1, 0.0), Span(3, 4, 0.1)))
    found = recorded(BASE, SELECT, [], Evidence(ATTENTION, causal_drop=drops), single, 1)
    assert found["candidate_attention"] == pytest.approx([0.0, 0.1, 0.3])


def test_off_and_repeated_records() -> None:
    sample = OffSample("off-9", "Why?", (1, 2, 3), has_bos=False)
    base = OffBase(torch.stack([BASE, BASE]), [(2, 6), ()], torch.zeros(2, 2, VOCABULARY))
    select = OffAnswers(
        torch.stack([SELECT, BASE]), torch.tensor([[0.5, 0.25], [0.0, 0.0]]), torch.tensor([[False, True], [True, True]])
    )
    moved, kept = off_records([sample, sample], ["on-1", "on-1"], base, select, [0.25, 0.0])
    assert (moved["token_base"], moved["token_select"], moved["same_token"]) == (2, ANSWER, False)
    assert (moved["phase2_delta_off_select"], moved["state_of"], moved["token_ids"]) == (0.25, "on-1", [1, 2, 3])
    assert (moved["further_token_ids"], moved["further_kl"], moved["further_same"]) == ([2, 6], [0.5, 0.25], [False, True])
    assert kept["further_token_ids"] == kept["further_kl"] == kept["further_same"] == []
    p = _softmax(BASE.numpy().astype(np.float64))
    assert moved["base_entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    assert kept["same_token"] is True
    assert run_metrics([], [moved, kept])["phase2_off_delta_mean_select"] == 0.125
    assert run_metrics([], [moved, kept])["phase2_off_same_token_share"] == 0.5
    _, again = repro_records(2, [SAMPLE, SAMPLE], AnswerReader([(3,), (ANSWER,)]).read(torch.stack([BASE, RANDOMS[1]])))
    assert (again["repeat"], again["token_select"], again["correct_select"]) == (2, 5, False)
    assert again["answer_logprob_select"] == pytest.approx(float(RANDOMS[1][ANSWER]))


def test_mean_gain_over_samples(record: Record) -> None:
    other = making.on(phase2_answer_logprob_gain=-1.0, correct_random=[False] * 3)
    mean = run_metrics([record, other], [])["phase2_answer_logprob_gain_mean"]
    assert mean == pytest.approx((record["phase2_answer_logprob_gain"] - 1) / 2)
