"""Selectors with units of their own, and those that fit or try: hand-made examples and straightforward second versions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cedkv.config.schema import SelectBlock
from cedkv.core.errors import DataError
from cedkv.core.values import Selection, Span
from cedkv.kv.readings import ExpectedAttention, KeyNorm, QueryAttention, ReplayAttention, RowAttention, TokenScore
from cedkv.selectors.base import selector_class
from cedkv.selectors.calibrated_attention import CalibratedAttention
from cedkv.selectors.context_cite import ContextCite
from cedkv.selectors.entropy_gated_chunks import EntropyGatedChunks
from cedkv.selectors.expected_attention import ExpectedAttentionSpan
from cedkv.selectors.fitted_heads import FittedHeads
from cedkv.selectors.replay import Replay
from cedkv.selectors.snapkv import SnapKV
from cedkv.selectors.tova import Tova
from cedkv.selectors.transfer_span import TransferSpan
from cedkv.selectors.value_weighted_attention import ValueWeightedAttention
from tests.support.making import select, task

CONFIGURED = TokenScore(QueryAttention(RowAttention(2, "max")), "max", "max", 3, (1, 2))

# what is asked for


def test_scores_asked_for_keep_the_configured_aggregation() -> None:
    """Or have their own, where the method does: SnapKV, TOVA; the replay's maximum over heads; all layers of fitted heads."""
    rows = RowAttention(2, "max")

    def configured(reading: object) -> TokenScore:
        return CONFIGURED.of(reading)  # type: ignore[arg-type]

    assert ValueWeightedAttention().token_score(CONFIGURED) == configured(QueryAttention(rows, value_weighted=True))
    assert CalibratedAttention().token_score(CONFIGURED) == configured(QueryAttention(rows, null_query=True))
    assert TransferSpan().token_score(CONFIGURED) == configured(QueryAttention(rows, query="other"))
    assert ExpectedAttentionSpan(future=3).token_score(CONFIGURED) == configured(ExpectedAttention(3, 0.01, 4))
    assert Replay(plus=True).token_score(CONFIGURED) == configured(ReplayAttention(True))
    mean_heads = TokenScore(CONFIGURED.reading, "mean")
    assert Replay().token_score(mean_heads) == TokenScore(ReplayAttention(), "max")
    assert FittedHeads().token_score(CONFIGURED) == TokenScore(CONFIGURED.reading, "fitted", "max", 3, "all")
    assert SnapKV(window=7, kernel=3).token_score(CONFIGURED) == TokenScore(
        QueryAttention(RowAttention(7, "mean")), "mean", "mean", 3, "all"
    )
    assert Tova().token_score(CONFIGURED) == TokenScore(QueryAttention(RowAttention(1, "mean")), "mean", "mean", 1, "all")


@pytest.mark.parametrize("name", ["value_weighted_attention", "calibrated_attention", "transfer_span"])
def test_what_concerns_a_query_needs_one(name: str) -> None:
    with pytest.raises(TypeError, match="KeyNorm"):
        selector_class(name)().token_score(TokenScore(KeyNorm()))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("context_cite", {"masks": 1}, "at least 2 masks"),
        ("context_cite", {"alpha": 0.0}, "alpha above 0"),
        ("entropy_gated_chunks", {"spiky_len": 10}, "below chunk_len = 10"),
        ("snapkv", {"kernel": 4}, "kernel = 4"),
        ("snapkv", {"window": 0}, "window = 0"),
        ("lagkv", {"lag": 1}, "lag = 1"),
        ("lagkv", {"sinks": -1}, "sinks = -1"),
        ("expected_attention", {"future": 0}, "future = 0"),
        ("expected_attention", {"epsilon": -0.1}, "epsilon = -0.1"),
        ("expected_attention", {"sinks": -1}, "sinks = -1"),
    ],
)
def test_parameters_that_mean_nothing_are_rejected(name: str, params: dict[str, float], message: str) -> None:
    """A kernel without a middle token, a partition whose spread is always 0, an average over no positions."""
    with pytest.raises(ValueError, match=message):
        selector_class(name)(**params)


# drops


def test_span_drop_decides_by_its_own_drops() -> None:
    block = SelectBlock(span_len=1, span_budget=2, min_span_distance=2)
    given_ = task("iiiii", block, [0, 9, 0, 9, 0], span_drop={0: 0.1, 1: 0.2, 2: 0.4, 3: 0.3, 4: 0.5})
    assert select("span_drop", given_).spans == (Span(2, 3, 0.4), Span(4, 5, 0.5))


@pytest.mark.parametrize("name", ["span_drop", "causal_drop_span"])
def test_a_token_is_worth_the_mean_of_the_spans_that_hold_it(name: str) -> None:
    given_ = task("aiiaa", SelectBlock(span_len=2), drops={1: 0.5, 2: 0.25})
    worth = selector_class(name)().worth(given_)
    assert worth is not None
    assert worth.tolist() == [0.0, 0.5, 0.375, 0.25, 0.0]


# whole shots


def test_whole_shots_by_score_as_long_as_they_fit() -> None:
    """Means 0.5, 0.8, 0.1, 0.3: the second, then the first does not fit, the fourth does, the third no more."""
    scores = [9.0, 0.5, 0.5, 0.5, 0.5, 0.8, 0.8, 0.1, 0.1, 0.3, 0.3]
    shots = ((0, 5), (5, 7), (7, 9), (9, 11))
    given_ = task("i" * 11, SelectBlock(span_len=2, span_budget=2), scores, shots=shots)
    assert select("whole_shots", given_).spans == (Span(5, 7, 0.8), Span(9, 11, 0.3))


def test_whole_shots_does_not_count_the_sink() -> None:
    given_ = task("i" * 6, SelectBlock(span_len=3, span_budget=1), [9.0, 0.1, 0.1, 0.2, 0.2, 0.2], shots=((0, 3), (3, 6)))
    assert [span.start for span in select("whole_shots", given_).spans] == [3]


@pytest.mark.parametrize(("scores", "span"), [([0.25] * 7 + [0.5] * 5, (8, 12)), ([0.25] * 12, (3, 7))])
def test_the_best_shot_is_cut_at_its_start_where_none_fits(scores: list[float], span: tuple[int, int]) -> None:
    """Shots of 7 and 5 tokens, a budget of 4; of two equal scores the earlier shot goes first. Its score stays the shot's."""
    given_ = task("i" * 12, SelectBlock(span_len=2, span_budget=2), scores, shots=((0, 7), (7, 12)))
    (chosen,) = select("whole_shots", given_).spans
    assert ((chosen.start, chosen.end), chosen.score) == (span, max(scores))


def test_whole_shots_without_shots_says_what_to_write() -> None:
    with pytest.raises(
        DataError, match=r'whole_shots needs "shots": \[\[start, end\], \.\.\.\] in every line of data\.on_path'
    ):
        select("whole_shots", task("i" * 12, SelectBlock(span_len=2, span_budget=2), shots=None))


# entropy-gated chunks


def chunked(scores: list[float], first: int, budget: int, chunk_len: int, spiky_len: int) -> set[int]:
    """The docstring, token by token."""
    chunks = [list(range(at, min(at + chunk_len, len(scores)))) for at in range(first, len(scores), chunk_len)]

    def entropy(chunk: list[int]) -> float:
        lowest = min(0.0, *(scores[token] for token in chunk))
        raised = [scores[token] - lowest for token in chunk]
        if len(chunk) == 1 or sum(raised) == 0:
            return 0.0
        return -sum(v / sum(raised) * math.log(v / sum(raised)) for v in raised if v > 0) / math.log(len(chunk))

    def best(tokens: list[int], n: int) -> list[int]:
        return sorted(tokens, key=lambda token: (-scores[token], token))[:n]

    means = [sum(scores[token] for token in chunk) / len(chunk) for chunk in chunks]
    entropies = [entropy(chunk) for chunk in chunks]
    kept: list[int] = []
    for i in sorted(range(len(chunks)), key=lambda i: (-means[i], i)):
        spiky = means[i] >= np.median(means) and entropies[i] < np.median(entropies) - 1e-9
        kept += best(chunks[i], min(budget - len(kept), spiky_len if spiky else len(chunks[i])))
    rest = [token for token in range(first, len(scores)) if token not in kept]
    return {*kept, *best(rest, budget - len(kept))}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    scores=st.lists(st.integers(-4, 1000).map(lambda n: n / 1000), min_size=2, max_size=45),
    bos=st.booleans(),
    sizes=st.sampled_from([(10, 4), (3, 2), (5, 1)]),
    budget=st.integers(1, 12),
)
def test_chunks_are_those_of_the_docstring(scores: list[float], bos: bool, sizes: tuple[int, int], budget: int) -> None:
    """Exactly the budget, or the whole demo."""
    block = SelectBlock(span_len=2, span_budget=budget)
    given_ = task("b" * bos + "i" * (len(scores) - bos), block, scores)
    spans = EntropyGatedChunks(*sizes).choose(given_)
    kept = {token for span in spans for token in range(span.start, span.end)}
    assert kept == chunked(scores, int(bos), 2 * budget, *sizes)
    assert len(kept) == min(2 * budget, len(scores) - bos)
    assert all(after.start > before.end for before, after in itertools.pairwise(spans)), "each run is one span"


def test_a_spiky_chunk_keeps_its_best_tokens_alone() -> None:
    """Chunks of 3: [0.9, 0, 0] is spiky, [0.2] * 3 is flat: 0.9 alone, all of the second, and the best of what is left."""
    scores = [0.9, 0.0, 0.01, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1]
    given_ = task("i" * 9, SelectBlock(span_len=1, span_budget=4), scores)
    spans = EntropyGatedChunks(3, 1).choose(given_)
    assert [(span.start, span.end) for span in spans] == [(0, 1), (3, 6)]


# context_cite


def test_context_cite_finds_the_piece_that_the_answer_hangs_on() -> None:
    """Odds are 5 more where tokens 4 to 7 are visible, and 1 less where 8 to 11 are; the rest weighs nothing."""
    given_ = task(
        "b" + "i" * 16,
        SelectBlock(span_len=4, span_budget=1),
        answer_odds=lambda masks: 5.0 * masks[:, 5:9].all(axis=1) - 1.0 * masks[:, 9:13].all(axis=1),
    )
    worth = ContextCite(masks=64).worth(given_)
    assert worth[0] == 0
    assert worth[5:9] == pytest.approx([5.0] * 4, abs=0.05)
    assert worth[9:13] == pytest.approx([-1.0] * 4, abs=0.05)
    assert abs(worth[1:5]).max() < 0.02
    given_.rng.bit_generator.state = task("b" + "i" * 16, given_.select).rng.bit_generator.state
    assert [span.start for span in ContextCite(masks=64).choose(given_)] == [5]


def test_context_cite_masks_whole_pieces_and_never_bos() -> None:
    seen: list[np.ndarray] = []

    def odds(masks: np.ndarray) -> np.ndarray:
        seen.append(masks)
        return np.zeros(len(masks))

    ContextCite(masks=200, piece_len=3).worth(task("b" + "i" * 7, SelectBlock(span_len=2), answer_odds=odds))
    (masks,) = seen
    assert masks.shape == (200, 8)
    assert masks[:, 0].all()
    for start in (1, 4, 7):
        piece = masks[:, start : start + 3]
        assert (piece == piece[:, :1]).all()
        assert 70 < piece[:, 0].sum() < 130  # p = 0.5, more than four standard deviations


# greedy towards the teacher


@pytest.mark.parametrize("seed", range(5))
def test_greedy_teacher_by_brute_force(seed: int) -> None:
    """A divergence between tokens that depend on each other: each step's best, by trying everything."""
    rng = np.random.default_rng(seed)
    pairs = rng.normal(size=(12, 12))

    def divergence_of(kept: tuple[int, ...]) -> float:
        return float(10 + sum(pairs[i, j] for i in kept for j in kept))

    def divergence(selections: list[Selection]) -> list[float]:
        return [divergence_of(selection.kept_tokens) for selection in selections]

    block = SelectBlock(span_len=2, span_budget=3, min_span_distance=3, keep_sink=1)
    given_ = task("b" + "i" * 11, block, divergence=divergence)
    chosen: list[int] = []
    scores = {}
    for _ in range(3):
        tried = {
            start: divergence_of(tuple(sorted({0, 1, *(t for s in (*chosen, start) for t in (s, s + 1))})))
            for start in range(1, 11)
            if all(abs(start - other) >= 3 for other in chosen)
        }
        best = min(tried, key=lambda start: tried[start])
        chosen.append(best)
        scores[best] = -tried[best]
    assert select("greedy_teacher", given_).spans == tuple(Span(s, s + 2, scores[s]) for s in sorted(chosen))


def test_greedy_teacher_ends_where_no_span_is_left() -> None:
    block = SelectBlock(span_len=2, span_budget=4, min_span_distance=4)
    assert [span.start for span in select("greedy_teacher", task("iiiiii", block)).spans] == [0, 4]
