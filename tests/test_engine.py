"""The engine: units, and that batching, order and company change no figure."""

from __future__ import annotations

from pathlib import Path

import pytest

from cedkv.errors import DataError
from cedkv.eval_phase2 import evaluations, plan, run
from cedkv.samples.load import load_samples
from cedkv.selectors import NAMES
from cedkv.types import Record
from tests import tiny


def records_of(folder: Path, *overrides: str, phase: str = "2") -> tuple[list[Record], list[tuple[str, int]], int]:
    """Records, the steps reported, and the number of steps announced."""
    config, lm = tiny.load(folder, *overrides)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions)
    units = plan(config, len(samples.on), len(samples.off), phase)  # type: ignore[arg-type]
    steps: list[tuple[str, int]] = []
    done = run(lm, config, samples, units, phase, lambda arm, n: steps.append((arm, n)))  # type: ignore[arg-type]
    records = [record for _, found in done for record in found]
    return records, steps, sum(evaluations(config, unit, phase) for unit in units)  # type: ignore[arg-type]


def by_id(records: list[Record], kind: str) -> dict[str, Record]:
    return {record["sample_id"]: record for record in records if record.get("kind") == kind}


def test_every_sample_is_in_exactly_one_unit_of_each_repeat() -> None:
    config = tiny.config("x", "eval.on_samples=10", "eval.repro_runs=3")
    units = plan(config, 10, 23, "2")
    for repeat in range(3):
        assert sorted(i for unit in units if unit.repeat == repeat for i in unit.on) == list(range(10))
    assert sorted(j for unit in units for j in unit.off) == list(range(23))
    for unit in units:
        assert all(j % 10 in unit.on for j in unit.off)
    assert len({unit.key for unit in units}) == len(units)
    main, repeats = ([set(u.on) for u in units if bool(u.repeat) is kind] for kind in (False, True))
    assert not any(batch in main for batch in repeats), "a repetition in the same batches would prove nothing"


@pytest.mark.parametrize("phase", ["1.5", "2"])
def test_progress_is_announced_as_it_is_reported(llama_folder: Path, phase: str) -> None:
    _, steps, total = records_of(llama_folder, phase=phase)
    assert sum(n for _, n in steps) == total


@pytest.mark.parametrize("mode", NAMES)
def test_batches_of_one_give_the_same_figures(model_folder: Path, mode: str) -> None:
    """Guards against one row's choice, mask or position used for a whole batch."""
    settings = (f"select.mode={mode}", "select.keep_sink=2", "prefix.kv_source=gather")
    together, _, _ = records_of(model_folder, *settings)
    alone, _, _ = records_of(model_folder, "runtime.batch_size=1", *settings)
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
    assert max(r["keep_all_absolute"] for r in records if r["type"] == "plumbing") < 1e-6


def test_a_demo_without_candidates_names_the_sample(llama_folder: Path) -> None:
    with pytest.raises(DataError, match=r"on-42-00000.*select.span_len = 120"):
        records_of(llama_folder, "select.span_len=120", "prefix_len=120", "select.span_budget=1", "data.pairs=2")
