"""Rows by key: computed once, in the order asked for, kept until their last use and no longer."""

from __future__ import annotations

import torch

from cedkv.inference.sharing import Rows, SharedRows, neighbours_first


class Computing:
    """Gives each key a row of its own length, and remembers the keys it was asked for."""

    def __init__(self, keys: str) -> None:
        self.keys, self.asked = keys, ""

    def __call__(self, indices: list[int]) -> Rows:
        asked = [self.keys[i] for i in indices]
        self.asked += "".join(asked)
        longest = max(ord(key) - ord("a") + 1 for key in asked)
        rows = torch.zeros(len(asked), longest)
        for row, key in enumerate(asked):
            rows[row, : ord(key) - ord("a") + 1] = ord(key)
        return rows, -rows


def taken(shared: SharedRows, keys: str) -> tuple[str, str]:
    """The keys that were computed, and those of the rows that came, which must be whole and otherwise zero."""
    compute = Computing(keys)
    rows, negated = shared.take(list(keys), compute)
    assert torch.equal(negated, -rows)
    lengths = (rows != 0).sum(dim=1).tolist()
    return compute.asked, "".join(
        chr(int(row[0])) * (ord(chr(int(row[0]))) - 96 == n) for row, n in zip(rows, lengths, strict=True)
    )


def test_a_row_is_computed_once_and_dropped_after_its_last_use() -> None:
    shared = SharedRows()
    assert [shared.expect(keys) for keys in ("abc", "bde", "eb", "c")] == [[0, 1, 2], [1, 2], [], []]
    assert taken(shared, "abc") == ("abc", "abc")
    assert len(shared) == 2, "b and c are needed again, a is not"
    assert taken(shared, "bde") == ("de", "bde")
    assert len(shared) == 3
    assert taken(shared, "eb") == ("", "eb")
    assert len(shared) == 1
    assert taken(shared, "c") == ("", "c")
    assert len(shared) == 0


def test_a_key_that_comes_twice_in_one_request_is_computed_once() -> None:
    shared = SharedRows()
    shared.expect("aba")
    assert taken(shared, "aba") == ("ab", "aba")
    assert len(shared) == 0


def test_rows_that_nobody_announced_are_computed_and_not_kept() -> None:
    shared = SharedRows()
    shared.expect("a")
    assert taken(shared, "b") == ("b", "b")
    assert len(shared) == 0
    assert taken(shared, "a") == ("a", "a")


def test_what_is_kept_does_not_hold_the_batch_it_came_from() -> None:
    shared = SharedRows()
    shared.expect("ab")
    shared.expect("a")
    batch = torch.ones(2, 1000)
    shared.take("ab", lambda _: (batch,))
    batch.zero_()
    (kept,) = shared.take("a", lambda _: ())
    assert kept.sum() == 1000
    assert kept.untyped_storage().nbytes() == 1000 * 4


def test_conditions_that_share_follow_each_other() -> None:
    assert neighbours_first(["ab", "xy", "bc", "yz", "q"]) == [0, 2, 1, 3, 4]
    assert neighbours_first(["ab"]) == [0]
