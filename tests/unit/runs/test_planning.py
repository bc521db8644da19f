"""What a plan counts, against what goes through a model when the engine runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cedkv.conditions import Condition
from cedkv.core.errors import ConfigError
from cedkv.eval_phase2 import run_units
from cedkv.inference.distributions import log_softmax
from cedkv.inference.evidence import read_batch
from cedkv.models import loading
from cedkv.models.opening import open_spec
from cedkv.models.sizes import model_sizes
from cedkv.runs.manifest import RunManifest
from cedkv.runs.memory import UnitShape, kept_memory
from cedkv.runs.planning import Plan, TaskPlan, plan_run, plan_time
from cedkv.runs.rate import Rate, rate_of, timed_run
from cedkv.runs.resolved import resolve_inputs
from cedkv.tasks.load import load_samples
from cedkv.units import plan_samples
from tests.support import tiny


class Seen:
    """What goes through a model: tokens, and rows x (slots + tokens) of the longest row."""

    def __init__(self) -> None:
        self.tokens = self.longest = self.evaluations = 0

    def look(self, _: Any, __: Any, given: dict[str, Any]) -> None:
        width, mask = given["input_ids"].shape[1], given["attention_mask"]
        own = mask[:, -width:] if mask.dim() == 2 else mask[:, 0, :, -width:].any(dim=1)
        self.tokens += int(own.sum())
        self.longest = max(self.longest, mask.shape[-1])

    def step(self, _: str, count: int) -> None:
        self.evaluations += count


def run(folder: Path, overrides: tuple[str, ...], phase: Any = "2", command: str = "phase2", **lists: str) -> tuple[Plan, Seen]:
    """The plan of a run, and what the engine does in it."""
    config = tiny.config(folder, *overrides)
    inputs = resolve_inputs(command, config, phase, lists)
    plan, lm, seen = plan_run(inputs, lambda _: None), loading.load(config), Seen()
    samples = load_samples(inputs.config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    hook = lm.model.base_model.register_forward_pre_hook(seen.look, with_kwargs=True)
    try:
        for _ in run_units(lm, inputs.conditions, samples, plan_samples(inputs.conditions, samples, phase), phase, seen.step):
            pass
    finally:
        hook.remove()
    return plan, seen


@pytest.mark.parametrize(
    ("overrides", "phase"),
    [
        (["select.mode=random_span"], "2"),
        (["select.mode=attention_diversity_span"], "2"),  # as far apart as they are long, spans do not overlap
        (["select.mode=context_cite", "eval.on_samples=2"], "2"),
        (["select.mode=delimiter_span", "prefix.kv_source=gather", "prefix.boundary_replay=2"], "2"),
        (["select.mode=full_demo", "prefix.padding_mode=shrink_to_selected", "runtime.batch_size=auto"], "2"),
        (["select.mode=random_span", "layer_scope.injection=[1,2]", "injection.positioning_mode=absolute"], "2"),
        (["select.mode=oracle_span", "eval.lds_masks=4", "select.keep_sink=2", "eval.gate_a_samples=1"], "2"),
        (["select.mode=delimiter_span"], "1.5"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "bos"])
def test_tokens_are_those_that_go_through_the_model(
    overrides: list[str], phase: Any, kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    plan, seen = run(folder, (*overrides, "eval.off_tokens=0"), phase)
    assert plan.total("tokens") == seen.tokens > 0
    assert plan.total("evaluations") == seen.evaluations
    assert plan.tasks[0].longest == seen.longest
    assert plan.total("padded") >= plan.total("tokens")


@pytest.mark.parametrize("mode", ["attention_diversity_span", "causal_drop_span", "replay"])
def test_spans_that_may_overlap_change_tokens_by_a_percent(mode: str, llama_folder: Path) -> None:
    plan, seen = run(llama_folder, (f"select.mode={mode}", "select.min_span_distance=1", "eval.off_tokens=0"))
    assert plan.total("tokens") == pytest.approx(seen.tokens, rel=0.02)
    assert plan.total("evaluations") == seen.evaluations


def test_what_a_selector_tries_changes_tokens_by_a_few_percent(llama_folder: Path) -> None:
    small = ("eval.on_samples=2", "select.span_budget=2", "data.pairs=3", "eval.off_tokens=0")
    plan, seen = run(llama_folder, ("select.mode=greedy_teacher", *small))
    assert plan.total("tokens") == pytest.approx(seen.tokens, rel=0.05)


def test_answers_to_off_prompts_count_at_full_length(llama_folder: Path) -> None:
    plan, seen = run(llama_folder, ("select.mode=random_span", "eval.off_tokens=5"))
    assert seen.tokens <= plan.total("tokens") <= 1.3 * seen.tokens


def test_conditions_share_what_they_share(llama_folder: Path) -> None:
    lists = {"select_modes": "random_span,delimiter_span,full_demo", "span_budgets": "1,3"}
    plan, seen = run(llama_folder, ("eval.off_tokens=0", "eval.lds_masks=0"), command="ablate_selector", **lists)
    assert plan.tasks[0].conditions == 6
    assert plan.total("tokens") == seen.tokens


def test_a_large_run_counts_its_largest_unit_for_all(llama_folder: Path) -> None:
    sizes = ("runtime.batch_size=2", "eval.on_samples=12", "eval.gate_a_samples=3", "select.mode=random_span")
    inputs = resolve_inputs("phase2", tiny.config(llama_folder, *sizes))
    each, largest = plan_run(inputs, lambda _: None), plan_run(inputs, lambda _: None, most=1)
    assert each.total("rehearsed") == each.total("units") == 6
    assert largest.total("rehearsed") == 3
    assert each.total("tokens") <= largest.total("tokens") <= 1.2 * each.total("tokens")
    all_checked, some_checked, *others = largest.unit_stages
    assert others.count(others[0]) == 4
    assert all_checked["gate A"] > some_checked["gate A"] > others[0]["gate A"] > 0, "OFF prompts of every unit are checked"


def test_tasks_are_planned_apart(llama_folder: Path) -> None:
    config = tiny.config(llama_folder, "data.answer=whole")
    lists = {"tasks": "symbol_lookup,kv_retrieval", "select_modes": "random_span,fitted_heads"}
    plan = plan_run(resolve_inputs("ablate_selector", config, "2", lists), lambda _: None)
    assert [task.task for task in plan.tasks] == ["symbol_lookup", "kv_retrieval"]
    assert all(task.fit_tokens > 0 and task.conditions == 2 for task in plan.tasks)
    assert plan.total("units") == len(plan.unit_stages) == 4


def test_planning_needs_no_device(llama_folder: Path) -> None:
    """A grid for cards is planned where there are none; larger passes need more memory at once."""
    common = ("runtime.batch_size=auto", "select.mode=random_span")
    host, card = (
        plan_run(resolve_inputs("phase2", tiny.config(llama_folder, *common, f"runtime.device={device}")), lambda _: None)
        for device in ("cpu", "cuda:3")
    )
    assert (host.device, card.device) == ("cpu", "cuda:3")
    assert host.total("tokens") == card.total("tokens")
    assert host.tasks[0].passes >= card.tasks[0].passes
    assert "libraries" in host.memory
    assert "libraries" not in card.memory


def test_rejected_as_a_run_is(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="the model's last is 3"):
        plan_run(resolve_inputs("phase2", tiny.config(llama_folder, "layer_scope.selection=[9]")), lambda _: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_are_the_model_s(dtype: str, model_folder: Path) -> None:
    sizes = model_sizes(open_spec(tiny.config(model_folder)), dtype)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert 3 * sizes.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert sizes.distribution_bytes == log_softmax(torch.zeros(1, 3, dtype=getattr(torch, dtype))).itemsize


@pytest.mark.parametrize("modes", [("attention_diversity_span",), ("transfer_span", "calibrated_attention", "replay", "tova")])
def test_attention_that_a_unit_keeps_is_counted(modes: tuple[str, ...], llama_folder: Path) -> None:
    """Every reading of every pass, of demos as long as the longest one at most."""
    configs = [tiny.config(llama_folder, f"select.mode={mode}") for mode in modes]
    lm, sizes = loading.load(configs[0]), model_sizes(open_spec(configs[0]), "float32")
    on = load_samples(configs[0], lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary).on
    batch = read_batch(lm, configs, list(on), None, lambda *_: None)
    outputs = [output for output in (batch.teacher, batch.other_query, batch.null_query, batch.replay) if output is not None]
    maps = [per_head for output in outputs for of_samples in output.maps.values() for per_head in of_samples]
    shape = UnitShape(len(on), 0, 0, max(len(sample.demo_token_ids) for sample in on))
    conditions = [Condition(mode, config) for mode, config in zip(modes, configs, strict=True)]
    counted = kept_memory(sizes, conditions, shape, "2")["attention of a unit"]
    kept = sum(per_head.nbytes for per_head in maps)
    assert 0.8 * counted < kept <= counted


def plan_of(*unit_tokens: int) -> Plan:
    total = sum(unit_tokens)
    units = [{"select": tokens} for tokens in unit_tokens]
    task = TaskPlan("t", 1, 8, 8, len(unit_tokens), 8, 9, total, total, 1, len(unit_tokens), 5, 0, units)
    return Plan("phase2", "2", "m", "float32", "cpu", 1, "fixed", [task], {"weights": 4}, 1, 1)


@pytest.mark.parametrize(("workers", "seconds"), [(1, 16.0), (2, 8.0), (3, 7.0), (4, 7.0), (50, 7.0)])
def test_the_longest_unit_goes_first(workers: int, seconds: float) -> None:
    time = plan_time(plan_of(10, 20, 70, 40, 20), Rate(10.0, startup=3.0, end=2.0), workers)
    assert time.units == pytest.approx(seconds)
    assert time.longest_unit == pytest.approx(7.0)
    assert time.total == pytest.approx(seconds + 5.0)


def test_a_rate_is_of_the_stages_of_units(tmp_path: Path) -> None:
    folder = tmp_path / "a1"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "artifacts" / "hf_runtime_meta.json").write_text('{"device_name": "some card"}')
    manifest = RunManifest("phase2", "2", run_id="a1", seconds={"start": 1, "load": 2, "select": 6, "gate A": 4, "report": 3})
    manifest.home = tmp_path
    manifest.save()
    read, seconds = timed_run(folder)
    rate = rate_of(read, seconds, {"select": 480, "gate A": 20, "masked": 0}, "m", "float32")
    assert (rate.tokens_per_second, rate.startup, rate.end) == (50.0, 3.0, 3.0)
    assert (rate.source, rate.device) == ("a1", "some card")
    assert rate.seconds({"select": 480, "gate A": 20}) == pytest.approx(10.0)
    assert rate.seconds({"select": 480}) == pytest.approx(6.0)
    assert rate.seconds({"replay": 100}) == pytest.approx(2.0)  # the mean, where a stage was not measured


def test_runs_that_have_no_rate(tmp_path: Path) -> None:
    manifest = RunManifest("phase2", "2", run_id="a1")
    manifest.home = tmp_path
    manifest.folder.mkdir()
    manifest.save()
    with pytest.raises(ConfigError, match="run a1 has no times"):
        timed_run(tmp_path / "a1")
    manifest.seconds, manifest.earlier_units = {"select": 1.0}, 3
    manifest.save()
    with pytest.raises(ConfigError, match="the times of 3 units before that are lost"):
        timed_run(tmp_path / "a1")
    manifest.parent = "b2"
    manifest.save()
    with pytest.raises(ConfigError, match="--from b2"):
        timed_run(tmp_path / "a1")
