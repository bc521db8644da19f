"""What hiding spans and trying selections gives, against full passes of plain transformers under explicit masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from cedkv.core.seeding import rng_for
from cedkv.core.values import Candidate, Span
from cedkv.inference.evidence import read_evidence
from cedkv.selectors.base import SelectionTask, candidates, create, kept_tokens
from tests.support import eager
from tests.support.evidence import Case


def divergence_of(one: np.ndarray, reference: np.ndarray) -> float:
    return float(np.sum(np.exp(one) * (one - reference)))


def test_causal_drops_are_full_passes_under_a_mask(case: Case) -> None:
    """The query's rows alone do not see the span; the demo's own rows had seen it."""
    config = case.config("select.mode=causal_drop_span")
    for sample, found in zip(case.samples, read_evidence(case.batch(config), config), strict=True):
        demo, whole = len(sample.demo_token_ids), case.plain.logprobs(sample.teacher_ids)
        spans = candidates(sample.token_kinds, config.select)
        by_mask = {
            span.start: divergence_of(whole, case.plain.logprobs(sample.teacher_ids, range(span.start, span.end), demo))
            for span in spans
        }
        assert found.causal_drop == pytest.approx(by_mask, rel=1e-3, abs=1e-5)


def test_span_drops_are_summed_over_the_layers_in_scope(case: Case) -> None:
    config = case.config("select.mode=span_drop", "layer_scope.selection=[1,3]", "select.query_window=2")
    sample, found = case.samples[1], read_evidence(case.batch(config), config)[1].span_drop
    assert found is not None
    layers, demo = case.plain.read(sample.teacher_ids), range(len(sample.demo_token_ids))
    query = range(len(demo), len(sample.teacher_ids))
    with torch.inference_mode():
        by_start = np.sum([eager.span_drops(layers[n], demo, query, 4, 2) for n in (1, 3)], axis=0)
    assert set(found) == {span.start for span in candidates(sample.token_kinds, config.select)}
    assert [found[start] for start in found] == pytest.approx([by_start[start] for start in found], rel=1e-3)


def test_context_cite_is_a_lasso_over_full_passes_under_masks(case: Case) -> None:
    """Pieces of 5 tokens, drawn anew; the log-odds of the teacher's own answer; columns standardised by hand."""
    config = case.config("select.mode=context_cite", "select.params={masks: 24, alpha: 0.05, piece_len: 5}")
    evidences = read_evidence(case.batch(config), config)
    for sample, evidence in zip(case.samples, evidences, strict=True):
        first, demo = int(sample.has_bos), len(sample.demo_token_ids)
        answer = int(case.plain.logprobs(sample.teacher_ids).argmax())
        pieces = [range(start, min(start + 5, demo)) for start in range(first, demo, 5)]
        shown = rng_for(7, "cite", 0, sample.sample_id).random((24, len(pieces))) < 0.5
        odds = []
        for mask in shown:
            hidden = [token for piece, visible in zip(pieces, mask, strict=True) if not visible for token in piece]
            p = np.exp(case.plain.logprobs(sample.teacher_ids, hidden, demo))
            odds.append(np.log(p[answer] / np.delete(p, answer).sum()))
        columns = shown.astype(float)
        spread = columns.std(axis=0)
        weights = Lasso(alpha=0.05).fit((columns - columns.mean(axis=0)) / spread, np.array(odds)).coef_ / spread
        by_token = np.zeros(demo)
        for piece, weight in zip(pieces, weights, strict=True):
            by_token[list(piece)] = weight
        task = SelectionTask(config.select, sample.token_kinds, evidence, rng_for(7, "cite", 0, sample.sample_id))
        assert create(config.select).worth(task) == pytest.approx(by_token, abs=1e-3)
        assert np.count_nonzero(by_token) > 4


@pytest.mark.parametrize("positioning", ["compact", "absolute"])
def test_greedy_teacher_tries_every_span_at_every_step(case: Case, positioning: str) -> None:
    """Prefill: kept tokens and query are one pass of them alone, at their positions."""
    config = case.config("select.mode=greedy_teacher", f"injection.positioning_mode={positioning}", "select.span_budget=2")
    sample, evidence = case.samples[0], read_evidence(case.batch(config), config)[0]
    teacher = case.plain.logprobs(sample.teacher_ids)
    demo = len(sample.demo_token_ids)

    def student(kept: Sequence[int]) -> float:
        tokens = [sample.demo_token_ids[token] for token in kept] + list(sample.query_token_ids)
        compact = positioning == "compact"
        start = len(kept) if compact else demo
        places = [*(range(len(kept)) if compact else kept), *range(start, start + len(sample.query_token_ids))]
        return divergence_of(case.plain.logprobs(tokens, positions=places), teacher)

    chosen: list[Candidate] = []
    reached = []
    for _ in range(2):
        tried = {}
        for span in candidates(sample.token_kinds, config.select):
            if all(abs(span.start - other.start) >= config.select.min_span_distance for other in chosen):
                spans = [Span(one.start, one.end, 0.0) for one in (*chosen, span)]
                tried[span.start] = student(kept_tokens(spans, sample.token_kinds, config.select))
        best = min(tried, key=lambda start: (tried[start], start))
        chosen.append(Candidate(best, best + 4))
        reached.append(-tried[best])
    task = SelectionTask(config.select, sample.token_kinds, evidence, rng_for(0, "x", 0, "y"))
    found = create(config.select).choose(task)
    assert [span.start for span in found] == [span.start for span in chosen]
    assert [span.score for span in found] == pytest.approx(reached, rel=1e-3, abs=1e-5)
