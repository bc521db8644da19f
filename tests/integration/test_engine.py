"""The engine: units, and that batching, order and batch composition change no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import results_only
from cedkv.conditions import Condition
from cedkv.core.errors import DataError, ModelError
from cedkv.core.values import Record
from cedkv.eval_phase2 import run_units
from cedkv.inference.batch import silent
from cedkv.inference.student import Choice, Students
from cedkv.models.batching import PASS_TOKENS
from cedkv.runs.devices import largest_differences
from cedkv.runs.rehearsal import counting
from cedkv.selectors.base import selector_class
from cedkv.tasks.load import load_samples
from cedkv.units import evaluations, fixed_size, plan, plan_samples
from tests.support import patch_points as points
from tests.support import tiny


def records_of(folder: Path, *overrides: str, phase: str = "2") -> tuple[list[Record], list[tuple[str, int]], int]:
    """Records, the steps reported, and the number of steps announced."""
    steps: list[tuple[str, int]] = []
    found = tiny.grid_records(
        folder,
        {"run": ()},
        *overrides,
        phase=phase,
        steps=lambda arm, n: steps.append((arm, n)),  # type: ignore[arg-type]
    )
    config, lm = tiny.load(folder, *overrides)
    samples, grid = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary), [Condition("run", config)]
    units = plan_samples(grid, samples, phase)  # type: ignore[arg-type]
    return found["run"], steps, sum(evaluations(grid, unit, phase, samples.on) for unit in units)  # type: ignore[arg-type]


def by_id(records: list[Record], kind: str) -> dict[str, Record]:
    return {record["sample_id"]: record for record in records if record.get("kind") == kind}


def test_every_sample_is_in_exactly_one_unit() -> None:
    units = plan([Condition("run", tiny.config("x", "eval.on_samples=10"))], 10, 23, "2", 4)
    assert sorted(i for unit in units for i in unit.on) == list(range(10))
    assert sorted(j for unit in units for j in unit.off) == list(range(23))
    for unit in units:
        assert all(j % 10 in unit.on for j in unit.off)
    assert len({unit.key for unit in units}) == len(units)


@pytest.mark.parametrize(
    ("n_on", "n_off", "longest", "off_tokens", "largest"),
    [(64, 128, 100, 8, 32), (64, 1000, 100, 8, 8), (64, 0, 4096, 8, 8), (4, 4, 10**6, 8, 1), (64, 128, 100, 128, 4)],
)
def test_automatic_units_are_bounded(n_on: int, n_off: int, longest: int, off_tokens: int, largest: int) -> None:
    """Many OFF prompts a state, long answers to them, or long demos, must not make a unit that memory cannot hold."""
    config = tiny.config("x", "runtime.batch_size=auto", f"eval.off_tokens={off_tokens}")
    conditions = [Condition("run", config)]
    units = plan(conditions, n_on, n_off, "2", fixed_size(conditions, n_on, n_off, longest))
    assert max(len(unit.on) for unit in units) == largest
    assert sum(len(unit.on) for unit in units) == n_on


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()])
@pytest.mark.parametrize(
    ("own", "said"),
    [
        ((), "unit of 4 ON samples and 6 OFF prompts .* with runtime.batch_size=2;"),
        (("runtime.batch_size=1",), "unit of 1 ON sample and 2 OFF prompts .* with a lower prefix_len,"),
        (("select.mode=wrong_demo", "runtime.batch_size=2"), "unit of 2 ON samples .* with a lower prefix_len,"),
    ],
)
def test_memory_that_runs_out_outside_of_a_pass_names_what_needs_less(
    own: tuple[str, ...], said: str, error: Exception, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*_: object) -> None:
        raise error

    points.OFF_RECORDS.wrap(monkeypatch, runs_out)
    with pytest.raises(ModelError, match=rf"ran out on cpu outside of a pass, in unit/00000: .*{said}"):
        tiny.records(llama_folder, *own)


def test_repetitions_are_in_other_batches(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample once a repetition, in batches that are none of the run's: the same batches would prove nothing."""
    batches: list[tuple[str, ...]] = []

    def selected(real: Any, students: Students, choice: Choice) -> object:
        batches.append(tuple(students.batch.names))
        return real(students, choice)

    points.SELECTED.wrap(monkeypatch, selected)
    records, _, _ = records_of(llama_folder, "eval.on_samples=8", "eval.repro_runs=3", "runtime.batch_size=8")
    assert [len(batch) for batch in batches] == [8, 4, 4, 4, 4]
    assert len({frozenset(batch) for batch in batches}) == 5
    for repeat in (1, 2):
        ids = sorted(r["sample_id"] for r in records if r["type"] == "repro" and r["repeat"] == repeat)
        assert ids == sorted(by_id(records, "on"))


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("select.mode=wrong_demo", "prefix.kv_source=gather"),
        ("select.mode=transfer_span",),
        ("select.mode=lagkv", "prefix.kv_source=gather"),
        ("select.mode=replay", "select.keep_sink=2"),
        ("select.null_query=true",),
    ],
    ids=" ".join,
)
def test_repetitions_answer_as_the_run_does(llama_folder: Path, settings: tuple[str, ...]) -> None:
    """Guards against evidence, caches or partners of another row of the run's batch."""
    sizes = ("eval.on_samples=6", "runtime.batch_size=6", "eval.off_samples=1", "eval.gate_a_samples=1", "eval.repro_runs=3")
    records, _, _ = records_of(llama_folder, *sizes, *settings)
    of_run = {sample_id: record["answer_logprob_select"] for sample_id, record in by_id(records, "on").items()}
    assert len(set(of_run.values())) == 6
    repeated = [record for record in records if record["type"] == "repro"]
    assert len(repeated) == 12
    for record in repeated:
        assert record["answer_logprob_select"] == pytest.approx(of_run[record["sample_id"]], rel=1e-5)


@pytest.mark.parametrize("phase", ["1.5", "2"])
def test_progress_is_announced_as_it_is_reported(llama_folder: Path, phase: str) -> None:
    _, steps, total = records_of(llama_folder, phase=phase)
    assert sum(n for _, n in steps) == total


FIGURES_ONLY = ("eval.on_samples=4", "eval.off_samples=4", "eval.gate_a_samples=1")
"""A run as small as its samples can still be batched, without what Gate A measures besides."""


@pytest.mark.parametrize("mode", tiny.MODES)
def test_batches_of_one_give_the_same_figures(usual_folder: Path, mode: str) -> None:
    """Guards against one row's choice, mask or position used for a whole batch."""
    settings = (f"select.mode={mode}", "select.keep_sink=2", "prefix.kv_source=gather", "select.span_budget=5", *FIGURES_ONLY)
    together, _, _ = records_of(usual_folder, *settings)
    smallest = 2 if selector_class(mode).uses_partner else 1
    alone, _, _ = records_of(usual_folder, f"runtime.batch_size={smallest}", *settings)
    for kind in ("on", "off"):
        left, right = by_id(together, kind), by_id(alone, kind)
        assert left.keys() == right.keys()
        for sample_id, record in left.items():
            for name, value in record.items():
                if isinstance(value, float):
                    assert value == pytest.approx(right[sample_id][name], rel=1e-4, abs=1e-4), (sample_id, name)
    spans = [[r["spans"] for r in records if r["type"] == "selection"] for records in (together, alone)]
    for left_spans, right_spans in zip(*spans, strict=True):
        assert [(s["start"], s["end"]) for s in left_spans] == [(s["start"], s["end"]) for s in right_spans]


def test_a_sample_does_not_depend_on_how_many_there_are(llama_folder: Path) -> None:
    few, _, _ = records_of(llama_folder, "eval.on_samples=4", "eval.off_samples=4")
    many, _, _ = records_of(llama_folder, "eval.on_samples=9", "eval.off_samples=9")
    for sample_id, record in by_id(few, "on").items():
        other = by_id(many, "on")[sample_id]
        assert record["kl_random_teacher"] == pytest.approx(other["kl_random_teacher"], rel=1e-4)
        assert record["phase2_delta_on_select"] == pytest.approx(other["phase2_delta_on_select"], rel=1e-4)


def test_causal_drop_of_a_span_is_the_teacher_with_that_span_hidden(model_folder: Path) -> None:
    """Advisory scores: every candidate has one, and a demo with the span hidden by a plain 4D mask gives the same."""
    import torch
    from transformers import AutoModelForCausalLM

    records, _, _ = records_of(model_folder, "select.causal_drop_advisory=true", "eval.on_samples=2")
    record = by_id(records, "on")["on-42-00000"]
    chosen = next(r for r in records if r["type"] == "selection" and r["sample_id"] == "on-42-00000")
    kinds = chosen["token_kinds"]
    starts = [i for i in range(len(kinds) - 3) if kinds[i] in ("input", "delimiter")]
    assert len(record["candidate_causal_drop"]) == len(record["candidate_attention"]) == len(starts)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    demo, query = chosen["demo_token_ids"], chosen["query_token_ids"]
    ids = torch.tensor([demo + query])
    for at in (0, 3, len(starts) - 1):
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1]).masked_fill(
            ~torch.ones(ids.shape[1], ids.shape[1]).tril().bool(), torch.finfo(torch.float32).min
        )
        mask[:, :, len(demo) :, starts[at] : starts[at] + 4] = torch.finfo(torch.float32).min
        with torch.inference_mode():
            full = model(ids).logits[0, -1].double().log_softmax(-1)
            without = model(ids, attention_mask=mask).logits[0, -1].double().log_softmax(-1)
        expected = float((full.exp() * (full - without)).sum())
        assert record["candidate_causal_drop"][at] == pytest.approx(expected, abs=1e-4, rel=1e-3)


def test_bos_is_once_in_front_of_every_arm(bos_folder: Path) -> None:
    records, _, _ = records_of(bos_folder)
    for record in records:
        if record["type"] == "selection":
            assert record["token_kinds"].count("bos") == 1
            assert record["kept_tokens"][0] == 0
            assert all(0 in state["kept_tokens"] and state["key_positions"][0] == 0 for state in record["random"])
            assert record["demo_token_ids"][0] not in record["query_token_ids"]
        elif record.get("kind") == "off":
            assert record["token_ids"].count(record["token_ids"][0]) == 1
    assert max(r["keep_all_absolute"] for r in records if "keep_all_absolute" in r) < 1e-6


def test_a_demo_without_candidates_names_the_sample(llama_folder: Path) -> None:
    with pytest.raises(DataError, match=r"on-42-00000.*select.span_len = 120"):
        records_of(llama_folder, "select.span_len=120", "prefix_len=120", "select.span_budget=1", "data.pairs=2")


GRID = {
    "plain": (),
    "gather": ("prefix.kv_source=gather", "select.keep_sink=2"),
    "layers": ("layer_scope.selection=all", "layer_scope.injection=[1,2]", "select.query_window=3"),
    "window": ("select.query_window=2",),
    "shrink": ("prefix.padding_mode=shrink_to_selected",),
    "one span": ("select.span_budget=1",),
    "one span, window": ("select.span_budget=1", "select.query_window=3"),
    "drop": ("select.mode=causal_drop_span", "injection.positioning_mode=absolute"),
    "received": ("select.mode=accumulated_attention",),
    "transfer": ("select.mode=transfer_span",),
    "wrong": ("select.mode=wrong_demo", "prefix.kv_source=gather"),
    "full": ("select.mode=full_demo", "injection.positioning_mode=absolute"),
}


def test_a_condition_is_the_same_alone_and_in_a_grid(usual_folder: Path) -> None:
    """What conditions share must not leak from one into another: scopes, windows, caches, selections, random trials' scores."""
    together = tiny.grid_records(usual_folder, GRID, *FIGURES_ONLY)
    for key, overrides in GRID.items():
        alone = tiny.records(usual_folder, *FIGURES_ONLY, *overrides)
        assert len(together[key]) == len(alone)
        for kind in ("sample", "selection", "repro"):
            in_grid, by_itself = (
                sorted((flat(r) for r in found if r["type"] == kind), key=lambda record: record["sample_id"])
                for found in (together[key], alone)
            )
            for left, right in zip(in_grid, by_itself, strict=True):
                assert left.keys() == right.keys()
                for name, value in left.items():
                    expected = pytest.approx(right[name], rel=1e-3, abs=1e-4) if isinstance(value, float) else right[name]
                    assert value == expected, (key, kind, left["sample_id"], name)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every number and text of a record by its path: ``spans/0/score``."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for at, inner in items for path, leaf in flat(inner, f"{name}/{at}" if name else str(at)).items()}


def test_what_conditions_share_is_computed_once(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher, base and OFF base once a sample, random trials once a setting, however many conditions there are."""
    counted = {"teacher": 0, "base": 0}

    def teacher(real: Any, lm: object, demos: list[object], *rest: object, **named: object) -> object:
        counted["teacher"] += len(demos)
        return real(lm, demos, *rest, **named)

    def base(real: Any, lm: object, rows: list[object], *rest: object, **named: object) -> object:
        counted["base"] += len(rows)
        return real(lm, rows, *rest, **named)

    points.READ_TEACHER.wrap(monkeypatch, teacher)
    points.BASE_LOGPROBS.wrap(monkeypatch, base)
    points.OFF_BASE.wrap(monkeypatch, base)
    steps: list[tuple[str, int]] = []
    modes = {mode: (f"select.mode={mode}",) for mode in ("attention_diversity_span", "delimiter_span", "random_span")}
    tiny.grid_records(llama_folder, modes, "eval.repro_runs=2", steps=lambda *step: steps.append(step))
    assert counted == {"teacher": 6 + 4 + 1, "base": 6 + 8}  # in the run, alone for Gate A and in the later unit; ON and OFF
    assert sum(n for arm, n in steps if arm.startswith("random")) == 6 * 2


@pytest.mark.parametrize("own", [(), ("prefix.kv_source=gather", "select.keep_sink=2")], ids=["prefill", "gather"])
def test_random_trials_share_passes_as_far_as_they_fit(
    llama_folder: Path, own: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one pass, or each by itself: the same spans and answers."""
    settings = ("runtime.batch_size=auto", "eval.n_random_trials=5", "eval.on_samples=4", *own)
    found: list[list[Record]] = []
    passes = []
    monkeypatch.setitem(PASS_TOKENS, "cpu", 10_000)
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(Students, "trials_together", lambda self, choices: ([choice] for choice in choices))
        config, lm = tiny.load(llama_folder, *settings)
        samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
        conditions = [Condition("run", results_only(config))]
        with counting(lm.model) as count:
            units = plan_samples(conditions, samples, "2", size=4)
            found.append([r for _, records in run_units(lm, conditions, samples, units, "2", silent) for r in records["run"]])
        passes.append(count.passes)
    differences = largest_differences({"run": found[0]}, {"run": found[1]})
    assert differences["tokens"] == differences["selections"] == 0
    assert max(differences["kl"], differences["logprob"]) < 1e-5
    assert passes[1] - passes[0] == 4 * (1 if own else 2), "of each further trial, the query's pass, and that of kept tokens"


def test_full_demo_at_absolute_is_the_teacher(model_folder: Path) -> None:
    records = by_id(tiny.records(model_folder, "select.mode=full_demo", "injection.positioning_mode=absolute"), "on")
    assert max(record["kl_select_teacher"] for record in records.values()) < 1e-6


@pytest.mark.parametrize("n_on", [2, 5, 6])
def test_wrong_demo_is_the_partners_prefix(model_folder: Path, n_on: int) -> None:
    """Sample 2i gets the state 2i + 1 has in its own right, and the other way round; an odd last one the one before it."""
    found = tiny.grid_records(
        model_folder, {"own": (), "wrong": ("select.mode=wrong_demo",)}, f"eval.on_samples={n_on}", "runtime.batch_size=2"
    )
    own, wrong = ({r["sample_id"]: r for r in found[key] if r["type"] == "selection"} for key in ("own", "wrong"))
    ids = list(own)
    assert len(ids) == n_on
    for i, sample_id in enumerate(sorted(ids)):
        partner = sorted(ids)[i ^ 1 if (i ^ 1) < n_on else i - 1]
        assert wrong[sample_id]["prefix_of"] == partner
        assert own[sample_id]["prefix_of"] == sample_id
        for name in ("kept_tokens", "spans", "key_positions", "query_start"):
            assert wrong[sample_id][name] == own[partner][name]
        assert wrong[sample_id]["query_text"] == own[sample_id]["query_text"]
