"""Plant a fault into the real code, and hold that the check which is there for it fails; without a fault all checks pass.

A fault (``tests/mutation/planted``) changes one thing in an otherwise untouched run, or certificate, of a tiny model whose
weights are scaled up, so that positions and context matter. ``tests/mutation/table.py`` says which check it makes ``fail``;
every built-in check is in the table, or a test here fails. For nearly every check it also names a fault that no other one sees.

What no check can see, because both of its sides would be computed alike or no verdict changes, is caught by other means:

    KL the other way round, a wrong answer token, figures of     oracle/test_outside_recomputation.py: every figure of a run
      one arm in another's column, of few samples                computed again from its artifacts by plain transformers
    how what is read becomes a score: a null query that is not   the same; that it sees these faults is held here
      subtracted, rows and values pooled or weighed otherwise
    percentiles, means, comparisons                              unit/test_metrics_phase2.py, unit/analysis/test_paired.py
    random draws that depend on order or batch composition       integration/test_engine.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cedkv.checks.certificate import FOLDER
from cedkv.runs import pipeline
from cedkv.runs.resolved import resolve_run
from tests.mutation.measuring import (
    Overrides,
    Reference,
    builtin_keys,
    certificate_verdicts,
    reference,
    run_verdicts,
)
from tests.mutation.planted import Patch, Plant, arms
from tests.mutation.table import (
    ALONE,
    CERTIFICATE,
    FLOOR_BASED,
    GATE_A,
    GATE_B,
    NEVER_ALONE,
    OUTSIDE,
    PRECONDITIONS,
    TABLE,
    Row,
)
from tests.oracle.outside import Plain, Rules
from tests.oracle.outside_run import compare
from tests.support import patch_points as points
from tests.support import tiny

RUNS = GATE_A + GATE_B + PRECONDITIONS


def ids(rows: list[Row]) -> list[str]:
    return [f"{plant.__name__}-{key}" for plant, key, _ in rows]


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> tuple[Path, Reference]:
    """A model and what it says without a fault, measured before any is planted."""
    return llama_folder, reference(llama_folder)


@pytest.fixture(scope="module")
def each_model(model_folder: Path) -> tuple[Path, Reference]:
    """As ``llama``, of each architecture in turn."""
    return model_folder, reference(model_folder)


def assert_caught(verdicts: dict[str, str], plant: Plant, key: str) -> None:
    """Hold that a check fails, and that it alone does where the table says so."""
    assert verdicts[key] == "fail"
    if ALONE.get(key) is plant:
        failing = {other for other, verdict in verdicts.items() if verdict != "pass"}
        assert failing - (FLOOR_BASED - {key}) == {key}


def test_every_check_has_a_planted_fault() -> None:
    assert {key for _, key, _ in TABLE} == builtin_keys()


def test_every_check_sees_what_no_other_does_or_the_table_says_why_not() -> None:
    assert ALONE.keys().isdisjoint(NEVER_ALONE)
    assert ALONE.keys() | NEVER_ALONE.keys() == builtin_keys()
    assert {(plant, key) for key, plant in ALONE.items()} <= {(plant, key) for plant, key, _ in TABLE}


@pytest.mark.parametrize(("plant", "key", "overrides"), RUNS, ids=ids(RUNS))
def test_fault_is_caught_by_a_gate(
    llama: tuple[Path, Reference], monkeypatch: Patch, plant: Plant, key: str, overrides: Overrides
) -> None:
    folder, without_fault = llama
    plant(monkeypatch)
    assert_caught(run_verdicts(folder, overrides, without_fault), plant, key)


@pytest.mark.parametrize(("plant", "key"), [(plant, key) for plant, key, _ in CERTIFICATE], ids=ids(CERTIFICATE))
def test_fault_is_caught_by_the_certificate(
    llama_folder: Path, tmp_path: Path, monkeypatch: Patch, plant: Plant, key: str
) -> None:
    plant(monkeypatch)
    assert_caught(certificate_verdicts(llama_folder, tmp_path, monkeypatch), plant, key)


@pytest.mark.parametrize("overrides", sorted({overrides for _, _, overrides in RUNS}), ids=str)
def test_without_a_fault_all_checks_of_a_run_pass(each_model: tuple[Path, Reference], overrides: Overrides) -> None:
    folder, without_fault = each_model
    verdicts = run_verdicts(folder, overrides, without_fault)
    assert set(verdicts.values()) == {"pass"}
    assert verdicts.keys() >= {key for _, key, row_overrides in RUNS if row_overrides == overrides}


def test_without_a_fault_all_findings_of_the_certificate_pass(model_folder: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    verdicts = certificate_verdicts(model_folder, tmp_path, monkeypatch)
    assert verdicts == dict.fromkeys((key for _, key, _ in CERTIFICATE), "pass")


def test_random_spans_that_are_the_selected_ones_decide_nothing(llama: tuple[Path, Reference], monkeypatch: Patch) -> None:
    """Nothing tells a fault from a demo with one choice only; either way the comparison with random says nothing."""
    folder, without_fault = llama
    arms.random_spans_are_select_s(monkeypatch)
    assert run_verdicts(folder, (), without_fault)["gateA.random_is_another"] == "insufficient"


@pytest.mark.parametrize("plant", [None, *OUTSIDE], ids=lambda plant: plant.__name__ if plant else "without_a_fault")
def test_scores_with_a_fault_are_noticed_outside(
    llama_folder: Path, tmp_path: Path, monkeypatch: Patch, plant: Plant | None
) -> None:
    """A batch of one has the same fault as a batch of many, so only what computes the scores by other means sees it."""
    points.without_mlflow(monkeypatch)
    monkeypatch.setenv(FOLDER, str(tmp_path / "certificates"))
    monkeypatch.chdir(tmp_path)
    if plant is not None:
        plant(monkeypatch)
    select = ("query_window=2", "null_query=true", "value_weighting=output_norm")
    overrides = ("model.allow_uncertified=true", *(f"select.{setting}" for setting in select))
    resolved = resolve_run("phase2", tiny.config(llama_folder, *overrides))
    (finished,) = pipeline.run(resolved)
    assert finished.results.verdicts["gateA"]
    null: Any = tiny.tokenizer()("N/A").input_ids
    rules = Rules(4, 3, 4, query_window=2, value_weighted=True, null_query=null)
    worst = compare(Path("outputs") / resolved.manifest.run_id, Plain(llama_folder), rules).worst["score"]
    assert worst < 1e-5 if plant is None else worst > 1e-3
