"""Faults in attention (how it is computed, read and hidden) and in the teacher's pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cedkv.kv.cache import KVPrefix
from tests.mutation.planted import Patch
from tests.support import patch_points as points

# attention


def read_one_key_late(patch: Patch) -> None:
    points.ATTENTION_ROWS.wrap(patch, lambda real, *arguments: real(*arguments).roll(1, dims=-1))


def read_in_another_layer(patch: Patch) -> None:
    points.READ_ATTENTION.wrap(patch, lambda real, self, call: real(self, replace(call, layer=(call.layer + 1) % 4)))


def read_of_one_head(patch: Patch) -> None:
    points.ATTENTION_ROWS.wrap(patch, lambda real, *arguments: real(*arguments)[:, :1])


def window_ignored(patch: Patch) -> None:
    """All rows of a query are pooled, however few are asked for."""
    points.ROWS_READ.wrap(patch, lambda real, window, rows, call: real(None, rows, call))


def null_query_not_subtracted(patch: Patch) -> None:
    """What it attends to is read as 0."""

    def nothing(real: Any, *arguments: Any) -> Any:
        output = real(*arguments)
        return replace(output, maps={reading: [0 * row for row in rows] for reading, rows in output.maps.items()})

    points.READ_QUERIES.wrap(patch, nothing)


def value_norms_of_another_head(patch: Patch) -> None:
    points.VALUE_NORMS.wrap(patch, lambda real, value, gram: real(value, gram).roll(1, dims=1))


def scaled_scores(patch: Patch) -> None:
    """Attention is not the model's, in every path of this suite alike."""
    points.SDPA_FORWARD.wrap(patch, lambda real, *q_k_v, scaling, **rest: real(*q_k_v, scaling=0.9 * scaling, **rest))
    points.SCALED_DOT_PRODUCT.wrap(patch, lambda real, *q_k_v, scale, **rest: real(*q_k_v, scale=0.9 * scale, **rest))


def seen_where_hidden(patch: Patch) -> None:
    def everywhere(real: Any, lm: Any, rows: Any, names: Any, prefix: KVPrefix | None = None, layers: Any = None) -> Any:
        return real(lm, rows, names, prefix)

    points.PROBE_LOGPROBS.wrap(patch, everywhere)


# the teacher's pass


def a_gap_in_the_teacher_s_positions(patch: Patch) -> None:
    """All tokens behind the first are one position too far, in a batch as well as alone."""

    def with_gap(real: Any, *arguments: Any) -> Any:
        ids, mask, positions = real(*arguments)
        return ids, mask, positions + (positions > 0)

    points.LEFT_PADDED_TEACHER.wrap(patch, with_gap)


def incremental_query_one_position_late(patch: Patch) -> None:
    """The query behind a demo in the model's own growing cache leaves a position out."""

    def late(real: Any, rows: Any, device: Any) -> Any:
        ids, mask, positions = real(rows, device)
        return ids, mask, positions + 1

    points.LEFT_PADDED_INCREMENTAL.wrap(patch, late)


def teacher_read_at_a_padded_slot(patch: Patch) -> None:
    """Short rows are aligned at their start, and read at the batch's last slot all the same."""

    def right(real: Any, *arguments: Any) -> Any:
        return tuple(
            torch.stack(
                [torch.roll(row, int(mask.sum()) - len(row)) for row, mask in zip(part, real(*arguments)[1], strict=True)]
            )
            for part in real(*arguments)
        )

    points.LEFT_PADDED_TEACHER.wrap(patch, right)
