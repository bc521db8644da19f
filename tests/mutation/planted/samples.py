"""Faults that give a sample what is another's, or not what the rules say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cedkv.core.values import Placement
from cedkv.kv.cache import KVPrefix
from tests.mutation.planted import Patch
from tests.support import patch_points as points


def swapped_samples(patch: Patch) -> None:
    def swapped(real: Any, lm: Any, rows: Any, prefix: KVPrefix | None, *rest: Any) -> Any:
        n = len(rows)
        prefix = prefix.rows([(i + 1) % n for i in range(n)]) if prefix is not None and n > 1 else prefix
        return real(lm, rows, prefix, *rest)

    points.LAST_LOGITS.wrap(patch, swapped)


def states_swapped_for_the_whole_unit(patch: Patch) -> None:
    """Every query runs under the next sample's state, in whatever passes."""

    def swapped(real: Any, batch: Any, choice: Any, rows: Any, prefix: KVPrefix) -> Any:
        n = len(rows)
        return real(batch, choice, rows, prefix.rows([(i + 1) % n for i in range(n)]))

    points.ANSWER.wrap(patch, swapped)


def row_0_s_selection_for_all(patch: Patch) -> None:
    def first(real: Any, batch: Any, config: Any, evidences: Any, mode: str, purpose: str, trial: int) -> Any:
        made = real(batch, config, evidences, mode, purpose, trial)
        if purpose != "select":
            return made
        chosen, slots, selections, placements = made.selections[0], made.placements[0].slots, [], []
        for sample in batch.samples:
            kept = tuple(token for token in chosen.kept_tokens if token < len(sample.demo_token_ids))
            selections.append(replace(chosen, kept_tokens=kept))
            placements.append(Placement(kept, tuple(range(len(kept))), len(kept), slots))
        return replace(made, selections=selections, placements=placements)

    points.CHOOSE.wrap(patch, first)


def row_0_s_attention_for_all(patch: Patch) -> None:
    def first(real: Any, batch: Any, config: Any) -> Any:
        evidences = real(batch, config)
        rows = [np.resize(evidences[0].attention, len(evidence.attention)) for evidence in evidences]
        return [replace(evidence, attention=row, scores=row) for evidence, row in zip(evidences, rows, strict=True)]

    points.EVIDENCE.wrap(patch, first)


def attention_of_later_units_off_by_one(patch: Patch) -> None:
    """In units behind those on whose samples Gate A is measured; their repetitions take it over."""
    first: set[str] = set()

    def shifted(real: Any, batch: Any, config: Any) -> Any:
        evidences = real(batch, config)
        first.update(batch.names if not first else ())
        if first.issuperset(batch.names):
            return evidences
        moved = [np.roll(evidence.attention, 1) for evidence in evidences]
        return [replace(evidence, attention=row, scores=row) for evidence, row in zip(evidences, moved, strict=True)]

    points.EVIDENCE.wrap(patch, shifted)


def attention_off_by_one(patch: Patch) -> None:
    """In padded rows the demo is looked for one slot too early."""

    def early(real: Any, self: Any, lm: Any, indices: Any, query_rows: Any, demos: Any, after: int) -> Any:
        return real(self, lm, indices, query_rows, [(max(0, start - 1), end - (start > 0)) for start, end in demos], after)

    points.COLLECT_READINGS.wrap(patch, early)


def keep_sink_ignored(patch: Patch) -> None:
    def without_sinks(real: Any, selector: Any, task: Any) -> Any:
        return real(selector, replace(task, select=task.select.model_copy(update={"keep_sink": 0})))

    points.SELECT.wrap(patch, without_sinks)


def a_kept_token_lost(patch: Patch) -> None:
    def lost(real: Any, name: str, task: Any) -> Any:
        made = real(name, task)
        return replace(made, kept_tokens=made.kept_tokens[:-1])

    points.SELECT.wrap(patch, lost)
