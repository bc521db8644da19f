"""How many ON samples a unit has on a card, and where units keep their fixed sizes whatever the card."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cedkv.conditions import Condition
from cedkv.models.devices import free_memory
from cedkv.models.opening import ModelSpec, open_spec
from cedkv.models.sizes import ModelSizes
from cedkv.runs.journal import NAME, UNITS, Journal
from cedkv.runs.memory import ALLOCATOR, UnitShape, kept_memory
from cedkv.runs.prepare import prepare
from cedkv.runs.resolved import resolve_inputs
from cedkv.runs.unit_sizes import MEMORY_SHARE, TOKENS, largest_size, settle_sizes, size_params, stored_sizes
from cedkv.units import plan_samples
from tests.support import tiny

SIZES = ModelSizes(
    1, 1, kv_bytes=1000, heads=10, hidden=8, intermediate=8, vocabulary=1000, number_bytes=2, distribution_bytes=8
)
PLENTY = 10**15
KEPT = 1_996_000, 128_000
"""Bytes that a unit keeps for Gate A (4 demos of 100 tokens, 4 times, and 24 slots of each; 3 demos of OFF prompts), and for an
ON sample with its OFF prompt (24 slots twice; attention to 100 tokens in two poolings; base, teacher, select, 2 trials and
twice an OFF prompt in float64; 8 further tokens in 2 bytes)."""


def free_for(kept: float) -> int:
    """The free memory that holds just so many bytes of a unit."""
    return math.ceil((1 + ALLOCATOR) * kept / MEMORY_SHARE) + 1


def size(
    *own: str, on: int = 5000, off: int = 5000, longest: int = 128, demo: int = 100, free: int = PLENTY, phase: Any = "2"
) -> int:
    conditions = [Condition("run", tiny.config("x", "runtime.batch_size=auto", *own))]
    return largest_size(SIZES, conditions, UnitShape(on, off if phase == "2" else 0, min(on, 4), demo), longest, phase, free)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: size(), TOKENS // 128),
        (lambda: size(longest=TOKENS // 3), 3),
        (lambda: size(longest=2 * TOKENS), 1),
        (lambda: size(on=40, off=5), 40),
        (lambda: size(on=64, off=6400), TOKENS // 128 // 100),  # a hundred OFF prompts for each
        (lambda: size(on=4, off=10**6), 1),
        (lambda: size(on=64, off=6400, phase="1.5"), 64),
        (lambda: size(free=free_for(KEPT[0] + 100 * KEPT[1])), 100),
        (lambda: size(free=free_for(KEPT[0] + 100 * KEPT[1] - 10)), 99),
        (lambda: size(free=0), 1),
        (lambda: size(free=-(10**9)), 1),  # the weights alone do not fit
        (lambda: size("select.mode=wrong_demo", free=0), 2),
        (lambda: size("select.mode=wrong_demo", on=3, off=3, free=0), 3),
        (lambda: size("select.mode=wrong_demo", longest=TOKENS // 7), 7),
    ],
)
def test_a_unit_is_as_large_as_tokens_and_memory_allow(found: Any, expected: int) -> None:
    assert found() == expected


def test_half_of_any_unit_is_a_batch_size() -> None:
    """It is what a run whose unit does not fit is told to use."""
    largest = size(on=2 * TOKENS, off=0, longest=1)
    assert tiny.config("x", f"runtime.batch_size={largest // 2}").rows_per_pass == TOKENS // 2


def test_conditions_of_a_grid_keep_what_they_may_have_in_common() -> None:
    config = tiny.config("x", "runtime.batch_size=auto")
    shape, free = UnitShape(5000, 5000, 4, 100), free_for(KEPT[0] + 100 * KEPT[1])
    one, two = ([Condition(str(i), config) for i in range(n)] for n in (1, 2))
    assert largest_size(SIZES, one, shape, 128, "2", free) == 100
    assert 2 * largest_size(SIZES, two, shape, 128, "2", free) < 150


def test_what_a_unit_keeps_more_of_makes_it_smaller() -> None:
    """Every demo, whole demos as prefixes, further tokens, trials; Gate A alone has neither trials nor OFF prompts."""
    free = free_for(KEPT[0] + 100 * KEPT[1])
    for own in ("prefix.kv_source=gather", "select.mode=full_demo", "eval.off_tokens=64", "eval.n_random_trials=9"):
        assert 1 < size(own, free=free) < 100
    assert size(free=free, phase="1.5") > 100
    sizes = [size(free=free * part // 8) for part in range(17)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] == size(free=2 * free) > 100


def test_random_trials_are_counted_in_units_without_off_prompts() -> None:
    conditions = [Condition("run", tiny.config("x"))]
    shape = UnitShape(on=10, off=0, checked=0, demo=100)
    kept = {phase: kept_memory(SIZES, conditions, shape, phase)["distributions of a unit"] for phase in ("1.5", "2")}  # type: ignore[arg-type]
    assert kept == {"1.5": 3 * 10 * 1000 * 8, "2": (3 + 2) * 10 * 1000 * 8}


@pytest.fixture(scope="module")
def spec(llama_folder: Path) -> ModelSpec:
    return open_spec(tiny.config(llama_folder))


@pytest.mark.parametrize(
    ("own", "free", "found"),
    [
        ((), PLENTY, True),
        ((), None, False),  # a CPU, mps
        (("runtime.batch_size=5",), PLENTY, False),
        (("runtime.shard=1/2",), PLENTY, False),
        (("runtime.workers=2",), PLENTY, False),
        (("runtime.device=auto", "runtime.device_map=auto"), PLENTY, False),
    ],
)
def test_units_are_fixed_where_no_process_knows_the_memory_of_all(
    own: tuple[str, ...], free: int | None, found: bool, spec: ModelSpec, llama_folder: Path, tmp_path: Path
) -> None:
    """Of 40 samples; every process of a run has to have the same units."""
    many = ("eval.on_samples=40", "eval.off_samples=50", "runtime.batch_size=auto")
    inputs = resolve_inputs("phase2", tiny.config(llama_folder, *many))
    config = tiny.config(llama_folder, *many, *own)
    conditions = tuple(replace(condition, config=config) for condition in inputs.conditions)
    work = prepare(replace(inputs, config=config, conditions=conditions), spec)
    settled = settle_sizes(work, spec, free, tmp_path)
    (group,) = settled.groups
    assert group.unit_size == (40 if found else config.rows_per_pass or 32)
    assert len(settled.plan) == {40: 1, 32: 2, 5: 8}[group.unit_size]
    assert found or settled.plan == work.plan
    assert found or [planned.unit for planned in settled.plan] == plan_samples(conditions, group.samples, "2")


def test_units_of_several_tasks_are_stored_by_task(spec: ModelSpec, llama_folder: Path, tmp_path: Path) -> None:
    lists = {"tasks": "symbol_lookup,kv_retrieval", "select_modes": "random_span,delimiter_span"}
    config = tiny.config(llama_folder, "data.answer=whole", "runtime.batch_size=auto")
    work = prepare(resolve_inputs("ablate_selector", config, "2", lists), spec)
    assert stored_sizes(work, tmp_path) is None
    header = {UNITS: [], "symbol_lookup/unit_size": 3, "kv_retrieval/unit_size": 5}
    Journal(tmp_path / NAME, header, []).close()
    settled = settle_sizes(work, spec, PLENTY, tmp_path)
    assert [group.unit_size for group in settled.groups] == [3, 5]
    assert [len(planned.unit.on) for planned in settled.plan] == [3, 3, 5, 1]
    params = {"symbol_lookup/unit_size": "3", "kv_retrieval/unit_size": "5"}
    assert size_params(header, ["symbol_lookup", "kv_retrieval"]) == params
    assert size_params({"unit_size": 32}, [""]) == {"unit_size": "32"}


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_no_device_but_a_card_is_asked_for_its_memory(device: str) -> None:
    assert free_memory(torch.device(device)) is None
