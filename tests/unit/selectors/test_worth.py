"""What a selector holds each token to be worth, which is judged: its shape, and the masks that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from cedkv.config.schema import SelectBlock
from cedkv.core.errors import ConfigError
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, Span
from cedkv.selectors.base import SelectionTask, Selector, cut_into_pieces, token_worth, visible_tokens
from cedkv.testing import check_selector
from tests.support.making import kinds


@dataclass(frozen=True)
class Worth(Selector):
    """The first token, and a worth of its own for each of them."""

    reads: ClassVar[list[object]] = []
    values: tuple[float, ...] = (1.0, 2.0, 3.0)

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        return (Span(1, 2, 0.0),)

    def worth(self, task: SelectionTask) -> NDArray[np.float64]:
        self.reads.append(task.evidence.gold)
        return np.array(self.values)


def task() -> SelectionTask:
    return SelectionTask(SelectBlock(), kinds("bii"), Evidence(np.zeros(3), gold=(1, 2)), rng_for(0, "test", 0, "s"))


def test_worth_is_of_the_evidence_that_is_declared() -> None:
    assert token_worth(Worth(), task()) == pytest.approx([1, 2, 3])
    assert Worth.reads[-1] is None


@pytest.mark.parametrize("values", [(1.0, 2.0), (1.0, 2.0, 3.0, 4.0), (1.0, float("nan"), 3.0), (1.0, 2.0, float("inf"))])
def test_worth_that_is_not_a_number_per_token_is_rejected(values: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"Worth\.worth returned .*demo of 3 tokens.*one finite number for each"):
        token_worth(Worth(values), task())


def test_worth_is_part_of_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    from cedkv import testing

    monkeypatch.setattr(testing, "selector_class", lambda name: Worth)
    monkeypatch.setattr(testing, "build", lambda cls, params, key: Worth())
    with pytest.raises(ConfigError, match="for a demo of 8 tokens"):
        check_selector("worth")


def test_pieces_start_after_bos_and_the_last_is_what_is_left() -> None:
    assert cut_into_pieces(kinds("biiiii"), 2).tolist() == [0, 0, 1, 1, 2]
    assert cut_into_pieces(kinds("iiiii"), 2).tolist() == [0, 0, 1, 1, 2]
    visible = np.array([[False, True, False], [True, False, True]])
    assert visible_tokens(visible, kinds("biiiii"), 2).astype(int).tolist() == [[1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1]]
    assert visible_tokens(visible, kinds("iiiii"), 2).astype(int).tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 1]]
