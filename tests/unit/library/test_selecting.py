"""What can be asked of ``select_kv``, and what an answer to a wrong question says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from cedkv.config.extensions import SELECTORS
from cedkv.config.resolve import resolve
from cedkv.core.errors import ConfigError, DataError, ModelError
from cedkv.core.values import Span
from cedkv.library.models import load_model
from cedkv.library.selecting import select_kv
from cedkv.models.loading import LanguageModel
from cedkv.selectors.base import SelectionTask, Selector, selector_class, span_at
from cedkv.selectors.replay import Replay
from cedkv.selectors.whole_shots import WholeShots
from tests.support import patch_points as points
from tests.unit.library.conftest import ANSWERS, DEMO, QUERIES, SHOTS, SMALL, select

GIVEN: dict[str, Any] = {"gold": (0, len("Word: dax\nSymbol: red")), "answers": ANSWERS, "other_query": QUERIES[1]}


@dataclass(frozen=True)
class FirstTokens(Selector):
    """The first tokens of the demo."""

    query_aware: ClassVar[bool] = False

    n: int = 4

    def choose(self, task: SelectionTask) -> tuple[Span, ...]:
        return (span_at(0, self.n, task.evidence),)


@pytest.mark.parametrize("name", [name for name in SELECTORS.builtin if not selector_class(name).uses_partner])
def test_every_selector_selects(lm: LanguageModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it needs given; head weights are stand-ins."""
    points.FIT_HEADS.replace(_stand_in_weights, monkeypatch)
    prefix = select(lm, selector=name, **GIVEN)
    assert prefix.spans
    assert set(prefix.kept_tokens) >= {token for span in prefix.selection.spans for token in range(span.start, span.end)}
    assert prefix.scores.shape == (len(prefix.sample.demo_token_ids),)
    assert np.isfinite(prefix.scores).all()
    assert isinstance(prefix.generate(max_new_tokens=2), str)
    assert prefix.query == QUERIES[0]


def _stand_in_weights(lm: LanguageModel, configs: Any, samples: Any, source: str, score: Any) -> Any:
    from cedkv.inference.head_weights import HeadWeights

    return HeadWeights(repr(score.reading), source, len(samples), 1, 1.0, 0.0, torch.ones(4, 4).tolist())


def test_spans_are_told_in_tokens_and_text(lm: LanguageModel) -> None:
    prefix = select(lm)
    ids = prefix.sample.demo_token_ids
    assert [span.start for span in prefix.spans] == sorted(span.start for span in prefix.spans)
    for span in prefix.spans:
        assert span.text == lm.tokenizer.decode(ids[span.start : span.end])
        assert span.text in DEMO
    assert repr(prefix) == f"<prefix of 12 of {len(ids)} demo tokens, 3 spans, for {QUERIES[0]!r}>"


def test_answers_start_no_span_and_end_a_shot(lm: LanguageModel) -> None:
    for query in QUERIES:
        kinds = select(lm, query, answers=ANSWERS).sample.token_kinds
        assert "answer" in kinds
        assert all(kinds[span.start] != "answer" for span in select(lm, query, answers=ANSWERS).spans)
    shots = [span.text for span in select(lm, selector="whole_shots", span_budget=6, prefix_len=40, answers=ANSWERS).spans]
    wanted = [f"Word: {word}\nSymbol: {symbol}\n\n" for word, symbol in SHOTS]
    assert shots
    assert set(shots) <= set(wanted)
    ranges = [(DEMO.index(text), DEMO.index(text) + len(text)) for text in wanted]
    given = select(lm, selector="whole_shots", span_budget=6, prefix_len=40, shots=ranges)
    assert [span.text for span in given.spans] == shots
    assert set(select(lm).sample.token_kinds) == {"input", "delimiter"}


def test_a_selector_by_name_by_object_and_from_a_configuration(lm: LanguageModel, tmp_path: Path) -> None:
    wanted = select(lm, selector="whole_shots", params={"min_lead": 0.9}, answers=ANSWERS)
    loose = select(lm, selector="whole_shots", answers=ANSWERS, span_budget=6, prefix_len=40)
    assert select(lm, selector=WholeShots(min_lead=0.9), answers=ANSWERS).kept_tokens == wanted.kept_tokens
    assert loose.kept_tokens != wanted.kept_tokens
    path = tmp_path / "mine.yaml"
    path.write_text("phase2: {select: {mode: whole_shots, params: {min_lead: 0.9}}}\n")
    for config in (path, str(path), resolve(path)):
        assert select(lm, config=config, answers=ANSWERS).kept_tokens == wanted.kept_tokens
    assert select(lm, config=path, selector="sink_recent").kept_tokens == select(lm, selector="sink_recent").kept_tokens
    assert select(lm, selector=FirstTokens(6)).kept_tokens == tuple(range(6))
    assert select(lm, selector=f"{__name__}:FirstTokens").kept_tokens == tuple(range(4))
    assert select(lm, selector=Replay()).kept_tokens == select(lm, selector="replay").kept_tokens


def test_a_class_that_is_defined_anew_replaces_the_old_one(lm: LanguageModel) -> None:
    """As running a notebook's cell again does."""

    def cell(end: int) -> Selector:
        @dataclass(frozen=True)
        class OfACell(FirstTokens):
            def choose(self, task: SelectionTask) -> tuple[Span, ...]:
                return (span_at(0, end, task.evidence),)

        OfACell.__qualname__ = "OfACell"
        return OfACell()

    assert [select(lm, selector=cell(end)).kept_tokens for end in (3, 5)] == [(0, 1, 2), (0, 1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"selector": "tovaa"}, "did you mean 'tova'"),
        ({"selector": WholeShots}, "a class needs its brackets"),
        ({"selector": WholeShots(), "params": {}}, "a selector object has its own"),
        ({"selector": "tova", "params": {"decay": 1}}, "no parameter 'decay'"),
        ({"selector": "oracle_span"}, r"needs gold=\(start, end\)"),
        ({"selector": "whole_shots"}, "needs shots=.* or answers="),
        ({"selector": "transfer_span"}, "needs other_query="),
        ({"selector": "wrong_demo"}, "all queries here share one"),
        ({"span_lenn": 4}, "no setting is named 'span_lenn'; did you mean 'span_len'"),
        ({"dtype": "float32"}, r"select_kv does not use dtype \(runtime.torch_dtype\), so it would change nothing"),
        ({"select.span_len": 4}, "select.span_len is given twice"),
        ({"span_len": "four"}, "phase2.select.span_len: value 'four' rejected"),
        ({"span_budget": 10}, "raise prefix_len to 40"),
        ({"selection_layers": [9]}, "layer 9"),
        ({"query": []}, "query is an empty list"),
        ({"query": QUERIES, "gold": [(0, 3), (4, 6)]}, "gold has 2 entries for 3 queries"),
        ({"gold": (4, 4000)}, r"gold range \[4, 4000\)"),
        ({"shots": [(0, 9), (5, 12)]}, "ranges ascend without overlap"),
        ({"demo_kinds": [(3, 2, "input")]}, "demo_kinds range"),
        ({"config": "nowhere.yaml"}, "cannot read configuration"),
    ],
)
def test_a_wrong_question_is_answered(lm: LanguageModel, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        select(lm, **wrong)


def test_a_class_inside_a_function_cannot_be_named(lm: LanguageModel) -> None:
    @dataclass(frozen=True)
    class Local(FirstTokens):
        pass

    with pytest.raises(ConfigError, match="defined inside a function"):
        select(lm, selector=Local())


def test_texts_that_cannot_be_told_apart_are_rejected(lm: LanguageModel) -> None:
    with pytest.raises(DataError, match=r"'ld' .*the boundary between demo_text and query_text falls inside the token"):
        select_kv(lm, DEMO + "Symbol: go", "ld", **SMALL)
    prefix = select(lm)
    with pytest.raises(DataError, match="must have at least one token each"):
        prefix.generate("")
    with pytest.raises(DataError, match="sample"):
        select_kv(lm, "too short", QUERIES[0], span_len=64, span_budget=1)
    with pytest.raises(DataError, match="1024"):
        select_kv(lm, DEMO * 40, QUERIES[0], **SMALL)


def test_control_tokens_are_text_unless_a_template_wrote_them(lm: LanguageModel) -> None:
    """Of the query that was selected for, and of another one."""
    user = lm.tokenizer.convert_tokens_to_ids("<user>")
    demo, query = DEMO + "<user>\n", "Word: wug<end>\nSymbol:"
    for control_tokens in (False, True):
        prefix = select_kv(lm, demo, query, **SMALL, control_tokens=control_tokens)
        end = lm.tokenizer.convert_tokens_to_ids("<end>")
        assert (user in prefix.sample.demo_token_ids) is control_tokens
        assert (end in prefix.query_ids()) is control_tokens
        assert (end in prefix.query_ids("Word: fep, say<end>\nSymbol:")) is control_tokens


def test_a_model_is_loaded_by_the_same_names(llama_folder: Path) -> None:
    loaded = load_model(llama_folder, device="cpu", dtype="bfloat16", **{"model.chat_template": False})
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.tokenizer.chat_template is None
    with pytest.raises(ConfigError, match="load_model does not use span_len"):
        load_model(llama_folder, span_len=4)
    with pytest.raises(ConfigError, match=r"runtime\.device"):
        load_model(llama_folder, device="gpu")
    with pytest.raises(ModelError, match="there is no such folder"):
        load_model("/nowhere/at/all")


def test_one_and_many(lm: LanguageModel) -> None:
    batch = select(lm, QUERIES)
    assert len(batch) == 3
    assert [prefix.query for prefix in batch] == QUERIES
    assert [prefix.query for prefix in batch[1:]] == QUERIES[1:]
    assert batch[-1] in batch
    assert repr(batch).startswith("<3 prefixes of a demo of ")
    assert len(select(lm, [QUERIES[0]])) == 1


def test_the_demo_is_prefilled_once_for_all_its_queries(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = lm.model.base_model.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        rows.append(named["input_ids"].numel())
        return original(*arguments, **named)

    monkeypatch.setattr(lm.model.base_model, "forward", counted)
    batch = select(lm, QUERIES)
    demo = len(batch[0].sample.demo_token_ids)
    assert sum(count >= demo for count in rows) == 1
