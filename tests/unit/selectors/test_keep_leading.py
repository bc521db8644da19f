"""Spans that lead too little are left out, at any scale and sign of the scores."""

from __future__ import annotations

import numpy as np
import pytest

from cedkv.config.resolve import resolve
from cedkv.config.schema import SelectBlock
from cedkv.core.errors import ConfigError
from cedkv.core.values import Span
from cedkv.selectors.attention_diversity_span import AttentionDiversitySpan
from cedkv.selectors.base import keep_leading, select_tokens
from cedkv.selectors.whole_shots import WholeShots
from tests.support.making import task

SPANS = (Span(0, 2, 10.0), Span(2, 4, 6.0), Span(4, 6, 4.0), Span(6, 8, 2.0))
SCORES = [10.0, 6.0, 4.0, 2.0, 2.0, 0.0]  # mean 4: leads 1, 1/3, 0, -1/3


@pytest.mark.parametrize(("min_lead", "kept"), [(0.0, 4), (0.01, 2), (1 / 3, 2), (0.34, 1), (1.0, 1)])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.01, -5.0), (7.0, 100.0)])
def test_a_lead_is_over_the_mean_candidate(min_lead: float, kept: int, scale: float, shift: float) -> None:
    spans = tuple(Span(s.start, s.end, s.score * scale + shift) for s in SPANS)
    assert keep_leading(spans, [score * scale + shift for score in SCORES], min_lead - 1e-9) == spans[:kept]


def test_without_a_leader_all_are_kept() -> None:
    assert keep_leading(SPANS[:1], [10.0, 10.0], 1.0) == SPANS[:1]
    assert keep_leading((), [], 1.0) == ()


def test_fewer_spans_than_the_budget() -> None:
    scores = [0.0, 0.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    given = task("i" * 10, SelectBlock(span_len=2, span_budget=3, min_span_distance=2), scores)
    assert len(select_tokens(AttentionDiversitySpan(), given).spans) == 3
    assert [span.start for span in select_tokens(AttentionDiversitySpan(min_lead=0.8), given).spans] == [2]


def test_whole_shots_are_left_out_alike() -> None:
    scores = np.repeat([1.0, 5.0, 1.0, 4.5], 3).tolist()
    given = task("i" * 12, SelectBlock(span_len=3, span_budget=4), scores, shots=((0, 3), (3, 6), (6, 9), (9, 12)))
    assert select_tokens(WholeShots(), given).kept_tokens == tuple(range(12))
    assert [span.start for span in select_tokens(WholeShots(min_lead=0.5), given).spans] == [3, 9]
    assert [span.start for span in select_tokens(WholeShots(min_lead=0.9), given).spans] == [3]


def test_shots_that_fit_but_do_not_lead_are_kept() -> None:
    """The best shot is too long for the budget: what is left is below the mean, and dropping it would leave nothing."""
    given = task("i" * 12, SelectBlock(span_len=2, span_budget=1), [9.0] * 10 + [1.0] * 2, shots=((0, 10), (10, 12)))
    assert [span.start for span in select_tokens(WholeShots(min_lead=0.6), given).spans] == [10]


def test_a_lead_that_is_no_share_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"min_lead = 1\.5 is no share"):
        resolve(None, ["select.params={min_lead: 1.5}"])
