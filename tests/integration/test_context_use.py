"""The positions, and slots plus tokens, that every arm really uses are those that ``context_use`` says, and no limit is passed.

A rope whose angles depend on the length of the batch (``dynamic``, ``longrope``) gives other numbers to every row of a pass in
which one row is beyond the limit; other ropes extrapolate in silence; learned positions end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cedkv.conditions import Condition
from cedkv.config.extensions import POSITIONING
from cedkv.config.options import Phase
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import DataError, ModelError
from cedkv.core.values import Record
from cedkv.eval_phase2 import run_units
from cedkv.inference.context_window import arm_uses, check_context, exceeded, load_fitting
from cedkv.inference.evidence import head_weights_key
from cedkv.inference.head_weights import fitted_scores
from cedkv.models import loading
from cedkv.models.capabilities import ContextLimit
from cedkv.models.loading import LanguageModel
from cedkv.tasks.load import Samples, load_samples
from cedkv.tasks.symbol_lookup import SYMBOLS
from cedkv.units import plan_samples
from tests.support import patch_points as points
from tests.support import tiny
from tests.support.positions import Seen
from tests.support.runs import run_phase2

SMALL = ("eval.on_samples=3", "eval.off_samples=4", "eval.gate_a_samples=1", "eval.n_random_trials=1", "select.span_budget=2",
         "select.keep_sink=1", "data.pairs=3", "eval.lds_masks=null", "eval.off_tokens=3")  # fmt: skip
OTHERS = [
    ("prefix.kv_source=gather",),
    ("prefix.padding_mode=shrink_to_selected",),
    ("prefix.kv_source=gather", "prefix.boundary_replay=2"),
]
MEANS = {
    "compact": tiny.MODES,
    "absolute": ("attention_diversity_span", "full_demo", "wrong_demo", "greedy_teacher", "transfer_span", "replay"),
}
"""Positioning mode -> selectors: at ``absolute`` a query stands where its demo ends, whatever is kept."""


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A model that never ends an answer by itself."""
    folder = tiny.save(tmp_path_factory.mktemp("model"), bos=True, chat=False, eos_token_id=499, bos_token_id=0)
    return tiny.load(folder)[1]


def configured(lm: LanguageModel, *overrides: str) -> Phase2Config:
    return tiny.config(str(lm.meta["model_id"]), *SMALL, *overrides)


def run(lm: LanguageModel, config: Phase2Config, samples: Samples, phase: Phase = "2") -> tuple[Seen, list[Record]]:
    """Run a configuration's units; what the model was called with, and the records."""
    for score in fitted_scores([config]):
        lm.measured[head_weights_key(score.reading)] = torch.ones(4, 4)
    seen, conditions = Seen(), [Condition("run", config)]
    with seen.watch(lm):
        units = plan_samples(conditions, samples, phase)
        records = [
            record for _, found in run_units(lm, conditions, samples, units, phase, seen.step) for record in found["run"]
        ]
    return seen, records


def said(lm: LanguageModel, config: Phase2Config, samples: Samples) -> tuple[dict[str, int], dict[str, int]]:
    """Positions and length of every arm; the length padded, as in a pass of all its prompts."""
    positions, parts = dict[str, int](), dict[str, tuple[int, int, int]]()
    for use in arm_uses(config, samples, "2", lm.tokenizer):
        positions[use.arm] = max(positions.get(use.arm, 0), use.positions)
        own = (use.slots, use.tokens, use.given)
        parts[use.arm] = tuple(map(max, own, parts.get(use.arm, own)))  # type: ignore[assignment]
    return positions, {arm: sum(own) for arm, own in parts.items()}


@pytest.mark.parametrize(
    ("positioning", "mode"), [(positioning, mode) for positioning, modes in MEANS.items() for mode in modes]
)
def test_arms_use_what_is_said(lm: LanguageModel, mode: str, positioning: str) -> None:
    """In every arm of every selector; where a choice may keep fewer tokens than it may, no more than is said."""
    fewer = positioning == "compact"
    assert MEANS.keys() == POSITIONING.builtin.keys()
    config = configured(lm, f"select.mode={mode}", f"injection.positioning_mode={positioning}")
    samples = load_samples(config, lm.tokenizer, 1024, lm.vocabulary)
    positions, length = said(lm, config, samples)
    limited = replace(lm, capabilities=replace(lm.capabilities, max_positions=max(positions.values())))
    seen, records = run(limited, config, samples)
    for arm in ("base", "teacher", "OFF base", "other query", "null query", "replay"):
        assert seen.positions.get(arm) == positions.get(arm), arm
    for arm in ("select", "OFF select", "random"):
        assert seen.positions[arm] <= positions[arm], arm
        assert seen.positions[arm] == positions[arm] or fewer, arm
    for arm in positions.keys() - {"gate A"}:
        assert seen.length[arm] <= length[arm], arm
    assert seen.length["gate A"] <= max(length.values())
    assert max(seen.positions.values()) <= max(positions.values())
    kept = {r["sample_id"]: r for r in records if r["type"] == "selection"}
    queries = {s.sample_id: len(s.query_token_ids) for s in samples.on}
    assert seen.positions["select"] == max(kept[name]["query_start"] + tokens for name, tokens in queries.items())
    off = [kept[r["state_of"]]["query_start"] + len(r["token_ids"]) - 1 + 3 for r in records if r.get("kind") == "off"]
    assert seen.positions["OFF select"] == max(off)
    assert all(exceeded(limited.capabilities, use) is None for use in arm_uses(config, samples, "2", lm.tokenizer))


@pytest.mark.parametrize("settings", OTHERS, ids=" ".join)
def test_other_settings_use_what_is_said(lm: LanguageModel, settings: Sequence[str]) -> None:
    config = configured(lm, "injection.positioning_mode=absolute", *settings)
    samples = load_samples(config, lm.tokenizer, 1024, lm.vocabulary)
    positions, length = said(lm, config, samples)
    limited = replace(lm, capabilities=replace(lm.capabilities, max_positions=max(positions.values())))
    seen, _ = run(limited, config, samples)
    for arm in ("base", "teacher", "OFF base", "select", "OFF select", "random"):
        assert seen.positions[arm] == positions[arm], arm
    for arm in positions.keys() - {"gate A"}:
        assert seen.length[arm] <= length[arm], arm
    assert seen.length["gate A"] <= max(length.values())
    assert seen.length["select"] == length["select"]
    assert seen.positions["gate A"] <= max(positions.values())


def test_no_row_is_decoded_beyond_its_own_answer(lm: LanguageModel) -> None:
    """Gate A decodes answers of different lengths in batches: the longest answer stands behind the shortest prompt."""
    config = configured(lm, "eval.gate_a_samples=3", "data.answer=whole")
    samples = load_samples(config, lm.tokenizer, 1024, lm.vocabulary)
    on = sorted(samples.on, key=lambda sample: len(sample.teacher_ids))
    assert len(on[0].teacher_ids) < len(on[2].teacher_ids) - 2
    on = [replace(s, answer_token_ids=s.demo_token_ids[1 : 5 - i]) for i, s in enumerate(on)]
    longest = max(len(s.teacher_ids) + len(s.answer_token_ids) - 1 for s in on)
    limited = replace(lm, capabilities=replace(lm.capabilities, max_positions=longest))
    seen, _ = run(limited, config, replace(samples, on=tuple(on)), "1.5")
    assert (seen.positions["teacher"], seen.positions["gate A"]) == (longest, longest)


# --- the cases that gave wrong numbers

LONG = 363
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "default": ("llama", {}),
    "longrope": ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                                              "long_factor": [4.0] * 8, "original_max_position_embeddings": LONG},
                          "original_max_position_embeddings": LONG, "max_position_embeddings": 4 * LONG}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
}  # fmt: skip
STATES = {
    "absolute": ("injection.positioning_mode=absolute",),
    "full_demo": ("select.mode=full_demo",),
    "wrong_demo": ("select.mode=wrong_demo", "injection.positioning_mode=absolute"),
}


def episode(number: int, demo_tokens: int) -> dict[str, Any]:
    """An episode whose demo has so many tokens."""
    tokenizer = tiny.tokenizer(chat=False)
    demo = "Word: dax\nSymbol: red\n\n"
    missing = demo_tokens - len(tokenizer(demo).input_ids)
    demo = demo + f" {SYMBOLS[number]}" + " blue" * (missing - 2) + "\n"  # no two samples are the same
    assert len(tokenizer(demo).input_ids) == demo_tokens
    other = "Word: lug, of which the demonstration says nothing at all\nSymbol:"
    return {"id": f"on-{number}", "demo_text": demo, "query_text": "Word: dax\nSymbol:", "answer_text": " red",
            "other_query_text": other}  # fmt: skip


def files(folder: Path, demos: Sequence[int], off: Sequence[int]) -> tuple[str, ...]:
    """A file of episodes and one of OFF prompts, all of the given numbers of tokens, and the settings that name them."""
    tokenizer, texts = tiny.tokenizer(chat=False), [f"blue {SYMBOLS[j]}" + " blue" * (n - 2) for j, n in enumerate(off)]
    assert [len(tokenizer(text).input_ids) for text in texts] == [n + 1 for n in off]  # blue alone is two tokens
    prompts = [{"id": f"off-{j}", "prompt_text": text} for j, text in enumerate(texts)]
    for name, lines in (("on", [episode(i, n) for i, n in enumerate(demos)]), ("off", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (f"data.on_path={folder}/on.jsonl", f"data.off_path={folder}/off.jsonl", f"eval.on_samples={len(demos)}",
            f"eval.off_samples={len(off)}", "eval.off_tokens=0")  # fmt: skip


def saved(folder: Path, rope: str) -> Path:
    architecture, settings = ROPES[rope]
    return tiny.save(folder, architecture, chat=False, **{"max_position_embeddings": LONG} | settings)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rope", ROPES)
def test_a_prompt_beyond_the_positions_is_named_before_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rope: str, state: str
) -> None:
    """Of eight OFF prompts behind demos of 349 tokens the sixth is too long; with it left out, the run gives the numbers that
    each prompt has alone, or goes on to the weights."""
    points.without_mlflow(monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = saved(tmp_path / "model", rope)
    given = files(tmp_path, [349] * 6, [4, 4, 4, 4, 4, 64, 4, 4])
    config = tiny.config(model, *given, *STATES[state])
    (model / "model.safetensors").unlink()
    with pytest.raises(DataError) as caught:
        run_phase2(config)
    message = str(caught.value)
    assert message.startswith("1 of 8 OFF prompts cannot be used: 1 x longer than the model's context ('off-5')")
    assert f"sample off-5 needs 414 positions in the arm 'OFF select', the model has {LONG} " in message
    assert "349 positions in front (the prefix of on-" in message
    assert "data.unusable=skip" in message
    with pytest.raises(ModelError, match="holds no weights"):
        run_phase2(tiny.config(model, *given, *STATES[state], "data.unusable=skip"))


def test_skipped_prompts_leave_the_others_what_they_are(tmp_path: Path) -> None:
    """Each prompt has the figure of a pass of its own, whatever else is in the file; a later one takes the place."""
    model = saved(tmp_path / "model", "dynamic")
    given = files(tmp_path, [349] * 6, [4, 4, 4, 4, 4, 64, 4, 4, 4])
    config, lm = tiny.load(model, *given, *STATES["absolute"], "data.unusable=skip", "eval.off_samples=8")
    samples = load_fitting(lm, [config], "2")
    assert [prompt.sample_id for prompt in samples.off] == [f"off-{j}" for j in (0, 1, 2, 3, 4, 6, 7, 8)]
    assert [(each.kind, each.count, each.examples) for each in samples.unusable] == [("OFF", 1, ("off-5",))]
    _, records = run(lm, config, samples)
    one_config, one = tiny.load(model, *given, *STATES["absolute"], "data.unusable=skip", "runtime.batch_size=1")
    _, by_itself = run(one, one_config, samples)
    deltas, alone = (
        {r["sample_id"]: r["phase2_delta_off_select"] for r in of if r.get("kind") == "off"} for of in (records, by_itself)
    )
    assert deltas == pytest.approx(alone, rel=1e-6)
    assert max(r["off_alone"] for r in records if "off_alone" in r) < 1e-9


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_gate_a_sees_a_prompt_that_changes_those_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rope: str) -> None:
    """If the rejection failed: the prompt is in a unit without a sample of Gate A, and the gate looks at every unit."""
    model = saved(tmp_path / "model", rope)
    given = files(tmp_path, [349] * 6, [4, 4, 4, 4, 4, 64, 4, 4])
    config, lm = tiny.load(model, *given, *STATES["absolute"])
    points.REQUIRE_FITS.replace(lambda *_: None, monkeypatch)
    samples = load_samples(config, lm.tokenizer, LONG, lm.vocabulary)
    _, records = run(lm, config, samples)
    alone = {r["sample_id"]: r["off_alone"] for r in records if "off_alone" in r}
    assert alone.keys() > {"on-4", "on-5"}
    assert alone["on-4"] > 1e-2
    assert config.kl_limit("batch_kl_max") < 1e-2


@pytest.mark.parametrize(("demos", "named"), [((349, 100), "on-1"), ((100, 349), "on-0")])
def test_a_partner_s_prefix_is_counted_where_it_stands(tmp_path: Path, demos: tuple[int, int], named: str) -> None:
    """Both queries fit behind their own demos; one does not behind its partner's."""
    given = files(tmp_path, demos, [4])
    lines = [json.loads(line) for line in (tmp_path / "on.jsonl").read_text().splitlines()]
    lines[int(named[-1])]["query_text"] = "Word: dax" + " blue" * 20 + "\nSymbol:"
    (tmp_path / "on.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config, lm = tiny.load(saved(tmp_path / "model", "default"), *given)
    assert len(load_fitting(lm, [config], "2").on) == 2
    wrong = tiny.config(config.model.id, *given, *STATES["wrong_demo"])
    with pytest.raises(DataError, match=f"sample {named} needs 37\\d positions in the arm 'select', the model has {LONG} "):
        load_fitting(lm, [config, wrong], "2")


def test_another_query_is_counted(tmp_path: Path) -> None:
    given = files(tmp_path, [345], [4])
    config, lm = tiny.load(saved(tmp_path / "model", "default"), *given)
    assert len(load_fitting(lm, [config], "2").on) == 1
    transfer = tiny.config(config.model.id, *given, "select.mode=transfer_span")
    with pytest.raises(DataError, match=r"sample on-0 needs \d+ positions in the arm 'other query'"):
        load_fitting(lm, [transfer], "2")


def test_a_demo_is_not_added_to_an_off_prompt_that_never_meets_it(tmp_path: Path) -> None:
    """A window that holds demo and query, and a prefix with an OFF prompt, and not a demo with an OFF prompt."""
    given = files(tmp_path, [100, 90], [60, 4])
    config, lm = tiny.load(saved(tmp_path / "model", "default"), *given)
    samples = load_fitting(lm, [config], "2")
    longest = max(use.length for use in arm_uses(config, samples, "2", lm.tokenizer))
    assert longest < 100 + 61
    windowed = replace(lm, capabilities=replace(lm.capabilities, context_limits=(ContextLimit(longest, "a window"),)))
    assert load_fitting(windowed, [config], "2") == samples
    check_context(windowed, [config], samples, "2")  # type: ignore[arg-type]  # a loaded model says all that is asked
    full = tiny.config(config.model.id, *given, "select.mode=full_demo")
    with pytest.raises(DataError, match=r"sample off-0 needs 161 slots and tokens in the arm 'OFF select', .* \(a window\)"):
        load_fitting(windowed, [full], "2")


def test_prompts_that_fit_a_window_each_by_itself_are_not_padded_beyond_it(tmp_path: Path) -> None:
    """A batch is as long as the longest prefix and the longest prompt in it; a layer would not see the first slots."""
    given = files(tmp_path, [100, 40], [4, 64])
    full = (*given, "select.mode=full_demo", "prefix.padding_mode=shrink_to_selected", "eval.gate_a_samples=1")
    config, lm = tiny.load(saved(tmp_path / "model", "default"), *full)
    samples = load_fitting(lm, [config], "2")
    longest = max(use.length for use in arm_uses(config, samples, "2", lm.tokenizer))
    windowed = replace(lm, capabilities=replace(lm.capabilities, context_limits=(ContextLimit(longest, "a window"),)))
    samples = load_fitting(windowed, [config], "2")
    with pytest.raises(
        ModelError, match=r"'OFF select' has up to 100 slots \(of sample off-0\) and 65 \+ 0 tokens \(of .* off-1"
    ):
        check_context(windowed, [config], samples, "2")  # type: ignore[arg-type]
    alone = tiny.config(config.model.id, *full, "runtime.batch_size=1")
    check_context(windowed, [alone], samples, "2")  # type: ignore[arg-type]
    seen, _ = run(replace(lm, batching=loading.Batching(1, lm.device)), alone, samples)
    assert seen.length["OFF select"] <= longest


def test_a_positioning_mode_of_another_package_is_held_to_the_limit(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a mode does with fewer tokens than may be kept cannot be known before they are chosen."""

    def spread(kept: Sequence[int], demo_length: int) -> tuple[tuple[int, ...], int]:
        together = kept[-1] - kept[0] == len(kept) - 1
        return tuple(kept), demo_length if together else 2 * demo_length

    monkeypatch.setitem(points.POSITIONING, "spread", spread)
    config, lm = tiny.load(llama_folder)
    samples = load_samples(config, lm.tokenizer, 1024, lm.vocabulary)
    longest = max(len(sample.teacher_ids) for sample in samples.on)
    spread_out = config.model_copy(update={"injection": config.injection.model_copy(update={"positioning_mode": "spread"})})
    limited = replace(lm, capabilities=replace(lm.capabilities, max_positions=longest))
    with pytest.raises(ModelError, match=rf"needs \d+ positions in the arm 'select', the model has {longest} "):
        run(limited, spread_out, samples)
