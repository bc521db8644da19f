"""Passes of rows of like length, and what happens when memory runs out."""

from __future__ import annotations

import logging

import pytest
import torch

from cedkv.core.errors import ModelError
from cedkv.models.batching import PASS_TOKENS, Batching

CPU = torch.device("cpu")


def passes(batching: Batching, lengths: list[int], fits: int = 10**9) -> list[list[int]]:
    """The rows of each pass; a pass of more than ``fits`` padded tokens runs out of memory."""

    def compute(part: list[int]) -> None:
        if len(part) * max(lengths[i] for i in part) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    return [part for part, _ in batching.passes(lengths, compute)]


def test_every_row_once_and_like_lengths_together() -> None:
    found = passes(Batching(2, CPU), [9, 1, 8, 2, 3])
    assert found == [[1, 3], [2, 4], [0]]


def test_an_automatic_pass_is_bounded_in_tokens_and_has_a_row_at_least() -> None:
    limit = PASS_TOKENS["cpu"]
    each = limit // 100
    found = passes(Batching(None, CPU), [100] * (2 * each + 1) + [limit // 2] * 3 + [3 * limit])
    assert sorted(i for part in found for i in part) == list(range(2 * each + 5))
    assert [len(part) for part in found] == [each, each, 2, 2, 1]


def test_the_last_pass_is_a_quarter_larger_where_that_takes_the_rest() -> None:
    each = PASS_TOKENS["cpu"] // 100
    assert [len(part) for part in passes(Batching(None, CPU), [100] * (2 * each + 1))] == [each, each + 1]
    assert [len(part) for part in passes(Batching(None, CPU), [100] * (2 * each + 3))] == [each, each, 3]


def test_after_memory_ran_out_no_pass_is_larger_than_what_fits(caplog: pytest.LogCaptureFixture) -> None:
    assert [len(part) for part in passes(Batching(None, CPU), [10] * 9, fits=45)] == [4, 4, 1]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("rows", [None, 16])
def test_out_of_memory_halves_the_pass_for_good_and_says_so(rows: int | None, caplog: pytest.LogCaptureFixture) -> None:
    batching = Batching(rows, CPU)
    with caplog.at_level(logging.WARNING):
        found = passes(batching, [10] * 16, fits=45)
    assert [len(part) for part in found] == [4, 4, 4, 4]
    assert sorted(i for part in found for i in part) == list(range(16))
    assert [record.args for record in caplog.records] == [(16, 10, 8), (8, 10, 4)]
    assert [len(part) for part in passes(batching, [10] * 8)] == [4, 4], "the next arm must not run out again"


def test_a_single_row_that_does_not_fit_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"a single row of 50 tokens: CUDA out of memory.*shorten"):
        passes(Batching(None, CPU), [50], fits=45)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def compute(part: list[int]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(Batching(None, CPU).passes([1, 2], compute))


def test_memory_that_the_processor_rejects_counts_too() -> None:
    """Torch's CPU allocator raises a plain RuntimeError; this is its own text."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)

    def compute(part: list[int]) -> None:
        if len(part) > 1:
            raise RuntimeError(str(caught.value))

    assert [part for part, _ in Batching(None, CPU).passes([5, 5], compute)] == [[0], [1]]
