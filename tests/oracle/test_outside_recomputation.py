"""Runs on tiny models, computed again from their files by plain transformers (``outside.py``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cedkv.runs import pipeline
from cedkv.runs.resolved import resolve_run
from tests.oracle.outside import Plain, Rules
from tests.oracle.outside_run import Comparison, compare
from tests.support import patch_points as points
from tests.support import tiny

RULES = Rules(span_len=4, span_budget=3, min_span_distance=4)
SIZES = ("eval.on_samples=3", "eval.off_samples=4", "eval.gate_a_samples=1")
RUN = Path("outputs/run")
FORMS = [(kv, place, pad) for kv in ("prefill", "gather") for place in ("compact", "absolute")
         for pad in ("null_pad", "shrink_to_selected")]  # fmt: skip

plain = cache(Plain)


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The whole of a run but MLflow; its files are in ``RUN``."""
    points.without_mlflow(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def run(folder: Path, *overrides: str) -> None:
        resolved = resolve_run("phase2", tiny.config(folder, *SIZES, *overrides))
        resolved.manifest.origin = RUN.name
        pipeline.run(resolved)

    return run


def agrees(found: Comparison) -> bool:
    assert found.problems == []
    assert found.compared > 200
    assert found.worst.keys() - {"score", "gold_coverage"} == {"logprob", "answer", "kl", "metric"}
    assert found.worst.pop("score", 0.0) < 1e-5
    assert max(found.worst.values()) < 1e-4, found.worst
    return True


@pytest.mark.parametrize(("kv_source", "positioning", "padding"), FORMS)
def test_every_form_of_prefix(
    usual_folder: Path, evaluate: Callable[..., None], kv_source: str, positioning: str, padding: str
) -> None:
    evaluate(usual_folder, f"prefix.kv_source={kv_source}", f"injection.positioning_mode={positioning}",
             f"prefix.padding_mode={padding}")  # fmt: skip
    assert agrees(compare(RUN, plain(usual_folder), RULES))


@pytest.mark.parametrize(("kv_source", "positioning", "padding"), FORMS)
def test_every_form_of_prefix_with_bos(
    bos_folder: Path, evaluate: Callable[..., None], kv_source: str, positioning: str, padding: str
) -> None:
    """BOS once in every arm: in front of base and OFF prompts, in the prefix and not in front of a student's query."""
    evaluate(bos_folder, f"prefix.kv_source={kv_source}", f"injection.positioning_mode={positioning}",
             f"prefix.padding_mode={padding}")  # fmt: skip
    assert agrees(compare(RUN, plain(bos_folder), RULES))


@pytest.mark.parametrize("layers", ["[1,2]", "[0]", "top30"])
@pytest.mark.parametrize("kv_source", ["prefill", "gather"])
def test_prefix_in_some_layers_only(usual_folder: Path, evaluate: Callable[..., None], layers: str, kv_source: str) -> None:
    """Here by hooks that mask the prefix in the other layers; ON and OFF alike."""
    evaluate(usual_folder, f"layer_scope.injection={layers}", f"prefix.kv_source={kv_source}")
    assert agrees(compare(RUN, plain(usual_folder), RULES))


@pytest.mark.parametrize(
    ("overrides", "rules"),
    [
        (("select.center_policy=center", "select.keep_sink=2"), Rules(4, 3, 4, center=True, keep_sink=2)),
        (("select.query_window=3", "layer_scope.selection=all"), Rules(4, 3, 4, query_window=3, selection_layers="all")),
        (("select.query_window=1", "select.row_pooling=max"), Rules(4, 3, 4, query_window=1, row_pooling="max")),
        (
            ("select.query_window=500", "layer_scope.selection=top60"),
            Rules(4, 3, 4, query_window=500, selection_layers="top60"),
        ),
        (("select.min_span_distance=2", "select.span_budget=5", "runtime.batch_size=2"), Rules(4, 5, 2)),
        (("select.mode=delimiter_span", "prefix.kv_source=gather"), RULES),
        (("select.mode=random_span", "select.keep_sink=1"), Rules(4, 3, 4, keep_sink=1)),
        (("select.mode=causal_drop_span", "select.span_len=6", "select.min_span_distance=9"), Rules(6, 3, 9)),
    ],
)
def test_every_way_to_choose_spans(
    usual_folder: Path, evaluate: Callable[..., None], overrides: tuple[str, ...], rules: Rules
) -> None:
    """Also with spans that overlap, whose kept tokens must not repeat, and a window longer than any query."""
    evaluate(usual_folder, *overrides)
    assert agrees(compare(RUN, plain(usual_folder), rules))


@pytest.mark.parametrize("folder", ["llama_folder", "bos_folder"])
@pytest.mark.parametrize(
    "overrides", [(), ("prefix.kv_source=gather", "layer_scope.injection=[1,2]", "eval.off_tokens=3"), ("eval.off_tokens=0",)],
    ids=["", "gather", "off_tokens=0"],
)  # fmt: skip
def test_answers_of_several_tokens(
    folder: str,
    overrides: tuple[str, ...],
    evaluate: Callable[..., None],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One to four tokens in a batch: what the teacher generates, with a wrong last token in every other sample."""
    where = request.getfixturevalue(folder)

    def longer(real: Any, *arguments: Any) -> Any:
        samples = real(*arguments)
        return replace(samples, on=[with_answer(plain(where), s, i + 1, i % 2 == 0) for i, s in enumerate(samples.on)])

    points.LOAD_SAMPLES.wrap(monkeypatch, longer)
    evaluate(where, "eval.on_samples=4", "data.answer=whole", *overrides)
    tokens = int(dict(setting.split("=") for setting in overrides).get("eval.off_tokens", 8))
    found = compare(RUN, plain(where), replace(RULES, off_tokens=tokens))
    assert found.worst["answer"] < 2e-5  # a token
    assert agrees(found)
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert [line["correct_teacher"] for line in lines if line.get("kind") == "on"] == [True, False, True, False]
    assert all(len(line["further_kl"]) == tokens for line in lines if line.get("kind") == "off")


def with_answer(model: Plain, sample: Any, n: int, right: bool) -> Any:
    answer = model.generate(sample.teacher_ids, n)
    answer[-1] = answer[-1] if right else (answer[-1] + 1) % 300
    labels = tuple(sorted({*sample.label_token_ids, answer[0]}))
    return replace(sample, answer_token_ids=tuple(answer), label_token_ids=labels)


POOLINGS = {
    "row_pooling": ("max", "max"),
    "head_pooling": ("max", "max"),
    "layer_pooling": ("max", "max"),
    "pooling_kernel": ("5", 5),
    "value_weighting": ("output_norm", True),
    "null_query": ("true", ()),
}
"""Key of ``select`` -> its value as an override, and as a rule."""


@pytest.mark.parametrize("keys", [*((key,) for key in POOLINGS), tuple(POOLINGS), ("head_pooling", "layer_pooling")])
def test_every_aggregation(usual_folder: Path, evaluate: Callable[..., None], keys: tuple[str, ...]) -> None:
    """Each by itself, all together, and the largest over all heads."""
    rules: dict[str, Any] = {key: POOLINGS[key][1] for key in keys}
    if "value_weighting" in rules:
        rules["value_weighted"] = rules.pop("value_weighting")
    if "null_query" in rules:
        rules["null_query"] = tiny.tokenizer()("N/A").input_ids
    evaluate(usual_folder, "layer_scope.selection=top60", *(f"select.{key}={POOLINGS[key][0]}" for key in keys))
    assert agrees(compare(RUN, plain(usual_folder), replace(RULES, selection_layers="top60", **rules)))


@pytest.mark.parametrize("mode", tiny.MODES)
@pytest.mark.parametrize("kv_source", ["prefill", "gather"])
def test_every_selector(bos_folder: Path, evaluate: Callable[..., None], mode: str, kv_source: str) -> None:
    """Whatever was chosen, and of whose demo: the prefix is what the files say."""
    evaluate(bos_folder, f"select.mode={mode}", f"prefix.kv_source={kv_source}", "prefix_len=100", "select.span_budget=5")
    assert agrees(compare(RUN, plain(bos_folder), replace(RULES, free=True, span_budget=5)))


def _shift_queries(run: dict[str, Any]) -> None:
    for chosen in run["on"]:
        chosen["query_start"] += 1


def _other_layers(run: dict[str, Any]) -> None:
    run["injection_layers"] = [0, 1, 2]


def _other_source(run: dict[str, Any]) -> None:
    run["kv_source"] = "prefill"


def _other_state(run: dict[str, Any]) -> None:
    run["off"][0]["state_of"] = run["on"][1]["sample_id"]


def _other_token(run: dict[str, Any]) -> None:
    run["on"][2]["random"][1]["kept_tokens"][-1] -= 1


DAMAGES = (_shift_queries, _other_layers, _other_source, _other_state, _other_token)


def test_a_run_that_did_something_else_is_noticed(usual_folder: Path, evaluate: Callable[..., None]) -> None:
    """A comparison that agrees with everything would prove nothing: the files are changed, and it must disagree."""
    evaluate(usual_folder, "prefix.kv_source=gather")
    path = RUN / "artifacts" / "phase2_selection.json"
    untouched = path.read_text()
    for damage in DAMAGES:
        run = json.loads(untouched)
        damage(run)
        path.write_text(json.dumps(run))
        worst = compare(RUN, plain(usual_folder), RULES).worst
        assert max(worst["logprob"], worst["kl"]) > 1e-2, damage.__name__


def test_labels_that_are_others_are_noticed(usual_folder: Path, evaluate: Callable[..., None]) -> None:
    """By the list of labels, and by the figures, where another token of the demo counts as an answer."""
    evaluate(usual_folder)
    path = RUN / "artifacts" / "phase2_selection.json"
    run = json.loads(path.read_text())
    del run["on"][0]["label_token_ids"][0]
    kinds = run["on"][1]["token_kinds"]
    kinds[kinds.index("input")] = "answer"
    path.write_text(json.dumps(run))
    found = compare(RUN, plain(usual_folder), RULES)
    assert sum("labels" in problem for problem in found.problems) >= 2
    assert found.worst["kl"] > 1e-2


def test_keys_that_were_not_moved_are_noticed(
    usual_folder: Path, evaluate: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gather in compact positions without the rotation."""
    points.ROTATE_KEYS.replace(lambda keys, *_: keys, monkeypatch)
    evaluate(usual_folder, "prefix.kv_source=gather")
    assert compare(RUN, plain(usual_folder), RULES).worst["logprob"] > 1e-2
