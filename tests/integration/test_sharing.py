"""What a grid costs: prefixes that conditions have in common are encoded and answered once, and what it takes is said first."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cedkv.conditions import Condition
from cedkv.core.values import Record
from cedkv.tasks.load import load_samples
from cedkv.units import evaluations, plan_samples
from tests.support import patch_points as points
from tests.support import tiny

GRID = {
    "plain": (),
    "window": ("select.query_window=3",),
    "drop": ("select.mode=causal_drop_span",),
    "delimiter": ("select.mode=delimiter_span",),
    "shrink": ("prefix.padding_mode=shrink_to_selected",),
    "gather": ("prefix.kv_source=gather",),
    "layers": ("layer_scope.injection=[1,2]",),
    "transfer": ("select.mode=transfer_span",),
    "wrong": ("select.mode=wrong_demo",),
    "full": ("select.mode=full_demo", "injection.positioning_mode=absolute"),
}
"""Conditions with the same span for some samples only; with the same random trials, or not; and with a partner's prefix."""
SMALL = ("select.span_budget=1", "eval.repro_runs=3")
OWN_TRIALS = 5
"""Ways of running random trials in the grid: the usual one, and those of shrink, gather, layers and full."""
Key = tuple[Any, ...]


class Counted:
    """Rows that students were encoded and answered for, and the evaluations that were reported."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.encoded: Counter[Key] = Counter()
        self.answered: Counter[str] = Counter()
        self.dropped = 0
        self.steps: Counter[str] = Counter()
        self.students: list[Any] = []
        points.ENCODE.wrap(patch, self._encode)
        points.STUDENT_LOGPROBS.wrap(patch, self._answer)
        points.ABLATION_LOGPROBS.wrap(patch, self._drop)
        points.SELECTED.wrap(patch, self._select)

    def step(self, arm: str, n: int) -> None:
        self.steps[arm.split(" 1")[0].split(" 2")[0]] += n

    def _encode(self, real: Any, batch: Any, choice: Any, rows: Any) -> Any:
        for row in rows:
            placed, owner = choice.placements[row], batch.samples[choice.owners[row]]
            self.encoded[choice.kv_source, owner.sample_id, placed.kept_tokens, placed.key_positions] += 1
        return real(batch, choice, rows)

    def _answer(self, real: Any, lm: Any, rows: Any, names: Any, *prefix: Any) -> torch.Tensor:
        self.answered.update(names)
        return real(lm, rows, names, *prefix)

    def _drop(self, real: Any, lm: Any, rows: Any, names: Any, *prefix: Any) -> torch.Tensor:
        self.dropped += len(names)
        return real(lm, rows, names, *prefix)

    def _select(self, real: Any, students: Any, choice: Any) -> Any:
        self.students.append(students)
        return real(students, choice)


def prefix_key(folder: Path, condition: str, owner: str, placed: Record) -> Key:
    """What an answer under a recorded prefix depends on; its first four are what the K/V depend on."""
    config = tiny.config(folder, *SMALL, *GRID[condition])
    kept, positions = tuple(placed["kept_tokens"]), tuple(placed["key_positions"])
    run = (placed["query_start"], placed["prefix_slots"], str(config.layer_scope.injection))
    return (config.prefix.kv_source, owner, kept, positions, *run)


@pytest.fixture(scope="module")
def run(llama_folder: Path) -> tuple[dict[str, list[Record]], Counted]:
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        return tiny.grid_records(llama_folder, GRID, *SMALL, steps=counted.step), counted


def keys_by_arm(folder: Path, records: dict[str, list[Record]]) -> tuple[dict[str, set[Key]], dict[str, set[Key]]]:
    """ON sample -> keys of the select arm's prefixes over all conditions, and of all random trials'."""
    select: dict[str, set[Key]] = {}
    random: dict[str, set[Key]] = {}
    for condition, own in records.items():
        for record in (record for record in own if record["type"] == "selection"):
            sample = record["sample_id"]
            select.setdefault(sample, set()).add(prefix_key(folder, condition, record["prefix_of"], record))
            random.setdefault(sample, set()).update(prefix_key(folder, condition, sample, trial) for trial in record["random"])
    return select, random


def test_each_distinct_prefix_is_encoded_and_answered_once(
    llama_folder: Path, run: tuple[dict[str, list[Record]], Counted]
) -> None:
    """Counted from the records; each of two repetitions runs the select arm's prefixes once more, in batches of its own."""
    records, counted = run
    select, random = keys_by_arm(llama_folder, records)
    encoded = [{key[:4] for keys in arm.values() for key in keys} for arm in (select, random)]
    expected = Counter(encoded[0] | encoded[1])
    for _ in range(2):
        expected.update(encoded[0])
    assert counted.encoded == expected
    answered = Counter({sample: len(select[sample] | random[sample]) + 2 * len(select[sample]) for sample in select})
    for off in (record for record in records["plain"] if record.get("kind") == "off"):
        answered[off["sample_id"]] = len(select[off["state_of"]])
    assert counted.answered == answered


def test_the_grid_has_something_of_everything_to_share(
    llama_folder: Path, run: tuple[dict[str, list[Record]], Counted]
) -> None:
    """Selections shared by some samples of a batch and not by others, and a partner's prefix that is another row's own."""
    records, _ = run
    kept = {name: {r["sample_id"]: r["kept_tokens"] for r in own if r["type"] == "selection"} for name, own in records.items()}
    same = {sample for sample in kept["plain"] if kept["plain"][sample] == kept["window"][sample]}
    assert set() < same < kept["plain"].keys()
    select, random = keys_by_arm(llama_folder, records)
    assert sum(map(len, select.values())) < len(GRID) * len(select)
    owners = {sample: {key[1] for key in keys} for sample, keys in select.items()}
    assert all(len(names) == 2 and sample in names for sample, names in owners.items())
    assert all(2 <= len(keys) <= 2 * OWN_TRIALS for keys in random.values()), "two trials each"


def test_nothing_is_kept_when_the_last_condition_is_done(run: tuple[dict[str, list[Record]], Counted]) -> None:
    _, counted = run
    assert len(counted.students) == len(GRID) * (2 + 2 * 3), "two units; in either repetition, two batches and one"
    for students in counted.students:
        assert [len(rows) for rows in (students._encoded, students._answered, students._off_answered)] == [0, 0, 0]


def test_what_a_grid_costs_at_most_is_said_beforehand(llama_folder: Path, run: tuple[dict[str, list[Record]], Counted]) -> None:
    """Evidence that takes rows of its own counts by row, random trials once for all conditions that draw them alike."""
    _, counted = run
    config, lm = tiny.load(llama_folder, *SMALL)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    grid = [Condition(key, tiny.config(llama_folder, *SMALL, *own)) for key, own in GRID.items()]
    said = sum(evaluations(grid, unit, "2", samples.on) for unit in plan_samples(grid, samples, "2"))
    assert said == counted.steps.total()
    n_on, n_off = len(samples.on), len(samples.off)
    assert counted.steps["causal drop"] == counted.dropped > n_on
    assert counted.steps["random"] == n_on * config.eval.n_random_trials * OWN_TRIALS
    on, off = (sum(n for name, n in counted.answered.items() if name.startswith(kind)) for kind in ("on", "off"))
    assert on < counted.steps["select"] + counted.steps["random"] + counted.steps["repeat"]
    assert off < counted.steps["OFF select"] == n_off * len(GRID)
