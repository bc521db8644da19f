"""The benchmark's plain loop agrees with the engine, its count of tokens with tokens that were run, its table with its rows."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import BEGIN, END, MEASURES, measured, table, to_page
from benchmarks.against_kvpress import aware_jobs, evaluation_jobs
from benchmarks.common import engine, median_ratio, paired, part, results_only, row
from benchmarks.forward import bare, needed
from benchmarks.reference import Reference, largest_difference
from cedkv.conditions import Condition
from cedkv.eval_phase2 import run_units
from cedkv.tasks.load import load_samples
from cedkv.units import evaluations, plan_samples
from tests.support import tiny


@pytest.mark.parametrize(
    "settings", [(), ("injection.positioning_mode=absolute", "select.query_window=3")], ids=["", "absolute"]
)
@pytest.mark.parametrize("folder", ["llama_folder", "bos_folder"])
def test_the_reference_gets_what_the_engine_gets(
    folder: str, settings: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    config, lm = tiny.load(where := request.getfixturevalue(folder), *settings)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    config = results_only(config)
    found, plain = engine(lm, config, samples), Reference(where).evaluate(config, samples)
    assert len(plain) == len(samples.on) + len(samples.off)
    assert largest_difference(found, plain) < 1e-4


def test_a_difference_is_seen(llama_folder: Path) -> None:
    config, lm = tiny.load(llama_folder)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    config = results_only(config)
    found, plain = engine(lm, config, samples), Reference(llama_folder).evaluate(config, samples)
    moved = copy.deepcopy(plain)
    moved[2]["kl_random_teacher"][1] += 0.01
    assert largest_difference(found, moved) == pytest.approx(0.01, rel=0.01)
    for name, value in (("correct_select", None), ("kept_tokens", [0]), ("answer_logprob_base", -99.0)):
        changed = copy.deepcopy(plain)
        changed[1][name] = value
        with pytest.raises(AssertionError, match=rf"sample {plain[1]['sample_id']}: {name}"):
            largest_difference(found, changed)
    with pytest.raises(AssertionError, match="other samples"):
        largest_difference(found, plain[1:])


def test_the_engine_runs_the_tokens_that_must_be_run_and_no_others(llama_folder: Path) -> None:
    """The limit counts each token once; a pass that ran some again would make it too easy to keep."""
    config, lm = tiny.load(llama_folder, "runtime.batch_size=6")
    lm.tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("<user>", "<user>Answer in one sentence, please.")
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    counted: list[int] = []
    conditions = [Condition("run", results_only(config))]

    def count(_: object, given: object, options: dict[str, torch.Tensor]) -> None:
        mask = options["attention_mask"][:, -options["input_ids"].shape[1] :]
        counted.append(int(mask.sum()))

    handle = lm.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    units = plan_samples(conditions, samples, "2")
    records = [r for _, found in run_units(lm, conditions, samples, units, "2", lambda *_: None) for r in found["run"]]
    handle.remove()
    assert sum(counted) == sum(needed(samples, records))


def test_bare_calls_run_all_their_tokens(llama_folder: Path) -> None:
    _, lm = tiny.load(llama_folder)
    shapes: list[torch.Size] = []
    lm.model.base_model.register_forward_pre_hook(lambda *given: shapes.append(given[2]["input_ids"].shape), with_kwargs=True)
    bare(lm, [3, 5, 5, 7, 40], 16)
    assert [tuple(shape) for shape in shapes] == [(3, 4), (1, 7), (1, 40)]


def test_pairs_take_turns() -> None:
    order: list[str] = []
    times = paired([lambda: order.append("a")] * 3, [lambda: order.append("b")] * 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert len(times) == 3
    assert median_ratio([(6, 2), (1, 1), (100, 1)]) == 3


def test_a_part_has_its_own_off_prompts(llama_folder: Path) -> None:
    config, lm = tiny.load(llama_folder, "eval.off_samples=12")
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    some = part(samples, 2, 3)
    assert some.on == samples.on[2:5]
    assert some.off == samples.off[4:10]


def test_rows_hold_or_not_or_were_not_measured() -> None:
    assert row("a", 1.1501, "<= 1.15") == {"name": "a", "value": 1.15, "target": "<= 1.15", "holds": False}
    assert row("a", 2.5, ">= 2.5")["holds"] is True
    assert row("a", 0.4, "< 0.4")["holds"] is False
    assert row("a", None, ">= 5")["holds"] is None
    assert row("a", 3.0)["holds"] is None


def test_a_measure_that_breaks_off_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.naive.loaded", lambda: 1 / 0)
    assert measured("naive") == [
        {"name": "naive failed: division by zero", "value": None, "target": None, "holds": False}
    ]  # fmt: skip
    assert "NO" in capsys.readouterr().err


def test_figures_of_a_card_can_be_tried_without_one(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are those of the matrices: 2 for a weight and a token, the vocabulary for the last token alone."""
    config, lm = tiny.load(llama_folder, "eval.off_tokens=0")
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    product = gpu.large_product("cpu", size=64, repeats=1)
    assert product > 0
    assert gpu.share_row(lm, "tiny", product, rows_=3)["value"] > 0
    monkeypatch.setattr(gpu, "_best", lambda work, device: 1.0)
    monkeypatch.setattr(gpu, "row", lambda name, value: value)
    assert gpu.large_product("cpu", size=64, repeats=2) == 2 * 2 * 64**3
    flops = gpu.share_row(lm, "tiny", 1.0, rows_=3)
    inner = sum(
        p.numel() for name, p in lm.model.named_parameters() if p.dim() == 2 and "embed" not in name and "lm_head" not in name
    )
    least = 2 * 3 * (gpu.WIDTH * inner + lm.model.lm_head.weight.numel())
    assert least < flops <= 1.6 * least, "the rest is attention"
    monkeypatch.undo()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    other = gpu.random_model(lm, sizes)
    assert other.capabilities.n_layers == len(other.rope_layouts or ()) == 2
    kinds = Counter(record["kind"] for record in engine(other, results_only(config), part(samples, 0, 2)) if "kind" in record)
    assert kinds["on"] == 2
    found = gpu.limit_row(lm, results_only(config), part(samples, 0, 2), (64, 256))
    assert found["target"] == "<= 1.3"
    assert found["value"] > 0
    assert gpu.memory_row(lm, config, samples)["value"] is None


def test_every_measure_has_a_file() -> None:
    there = {path.stem for path in Path(__file__).parents[2].glob("benchmarks/*.py") if "\ndef rows(" in path.read_text()}
    assert there == set(MEASURES)


def test_figures_go_into_the_page(tmp_path: Path) -> None:
    rows = [row("a figure", 2.0, "<= 3"), row("another", None, "< 5")]
    assert table(rows).splitlines()[1:] == ["2      <= 3    yes    a figure", "-      < 5     -      another"]
    about = {
        "date": "2026-11-24", "threads": 2, "versions": {"torch": "2", "transformers": "5"},
        "machine": {"cores": 2, "architecture": "x86_64", "processor": "P", "torch_capability": "AVX2", "load_before": [0.1]},
    }  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows, **about}))
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}| stale |\n{END}after\n")
    to_page(tmp_path / "bench.json", page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}| figure ")
    assert text.endswith(f"{END}after\n")
    assert "| a figure | 2 | <= 3 | yes |" in text
    assert "| another | - | < 5 | - |" in text
    assert "stale" not in text
    assert "2026-11-24, 2 cores of an x86-64 machine (P, AVX2), 2 torch threads" in text
    once = text
    to_page(tmp_path / "bench.json", page)
    assert page.read_text() == once


def test_kvpress_is_asked_for_what_the_engine_evaluates(llama_folder: Path) -> None:
    config, lm = tiny.load(llama_folder, "eval.off_tokens=0", "eval.n_random_trials=3")
    samples, config = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary), results_only(config)
    jobs = evaluation_jobs(config, samples)
    conditions = [Condition("run", config)]
    units = plan_samples(conditions, samples, "2")
    engine_s = sum(evaluations(conditions, unit, "2", samples.on) for unit in units)
    assert sum(len(job["questions"]) for job in jobs) == engine_s
    for query, job in zip(samples.on, aware_jobs(config, lm, samples), strict=True):
        assert job["context"] + job["questions"][0] == query.episode.demo_text + query.episode.query_text
        assert lm.tokenizer(job["questions"][0], add_special_tokens=False).input_ids == list(query.query_token_ids[-1:])
