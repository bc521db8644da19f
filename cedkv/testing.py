"""Contract tests that every registered selector and task must pass; packages that add one call them from their own tests."""

from __future__ import annotations

import re
from dataclasses import fields
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np

from cedkv.config.data import DataBlock
from cedkv.config.extensions import TASKS
from cedkv.config.schema import SelectBlock
from cedkv.core.errors import CedkvError
from cedkv.core.registry import build
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, OnEpisode, TokenKind
from cedkv.selectors.base import ALWAYS, SelectionTask, candidates, select_tokens, selector_class, token_worth
from cedkv.tasks.base import GIVEN, TaskRequest

_EVIDENCE = frozenset(field.name for field in fields(Evidence)) - ALWAYS
_KINDS: tuple[TokenKind, ...] = ("input", "delimiter", "answer", "input", "delimiter")


def check_selector(name: str, **params: Any) -> None:
    """Check a registered selector on demos of many lengths, with BOS and without.

    It must choose the same for the same task, whatever was chosen before; choose at least one span, inside the demo and after
    BOS; keep no more than its budget where it is bounded; read no evidence that it does not declare; and hold each demo
    token to be worth one finite number, where it ranks tokens.

    Args:
        name: registered name, or ``package.module:Class``.
        params: its parameters.

    Raises:
        AssertionError: one of these does not hold; says which.
        ConfigError: no such selector, it does not take these parameters, or its ``worth`` is not a finite number per token.
    """
    cls = selector_class(name)
    selector = build(cls, params, "select.params")
    select = SelectBlock(span_len=2, span_budget=3, min_span_distance=2)
    for length in (8, 13, 30, 61):
        for bos in (False, True):
            case = f"{name} on a demo of {length} tokens{' with BOS' if bos else ''}"
            try:
                first, again = (select_tokens(selector, _task(cls.needs, select, length, bos)) for _ in range(2))
            except CedkvError:
                raise
            except Exception as error:
                declared = ", ".join(sorted(cls.needs)) or "attention alone"
                raise AssertionError(f"{case}: {type(error).__name__}: {error}; its needs declare {declared}") from error
            assert first == again, f"{case}: another choice for the same task"
            assert first.spans, f"{case}: no span"
            inside = all(int(bos) <= span.start < span.end <= length for span in first.spans)
            assert inside, f"{case}: a span outside the demo, or over BOS: {first.spans}"
            most = select.span_budget * select.span_len + bos
            assert not cls.bounded or len(first.kept_tokens) <= most, f"{case}: more than {most} tokens kept"
            token_worth(selector, _task(cls.needs, select, length, bos))


def _task(needs: frozenset[str], select: SelectBlock, length: int, bos: bool) -> SelectionTask:
    kinds: list[TokenKind] = [_KINDS[i % len(_KINDS)] for i in range(length)]
    if bos:
        kinds[0] = "bos"
    rng = rng_for(0, "check_selector", 0, f"{length}-{bos}")
    starts = [span.start for span in candidates(tuple(kinds), select)]
    drawn = dict(zip(starts, rng.random(len(starts)).tolist(), strict=True))
    worth = rng.random(length)
    drawn_evidence: dict[str, Any] = {
        "causal_drop": drawn,
        "span_drop": drawn,
        "gold": (3, 6),
        "shots": tuple((at, min(at + 5, length)) for at in range(bos, length, 5)),
        "answer_odds": lambda masks: masks @ worth,
        "divergence": lambda selections: [float(-worth[list(s.kept_tokens)].sum()) for s in selections],
    }
    assert drawn_evidence.keys() == _EVIDENCE
    evidence = Evidence(np.asarray(rng.random(length)), **{name: drawn_evidence[name] for name in needs})
    return SelectionTask(select, tuple(kinds), evidence, rng_for(0, "check_selector choice", 0, "sample"))


class WordTokenizer:
    """A stand-in for a tokenizer: a word with the space before it, or any other character, is a token."""

    unk_token_id = chat_template = None

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        pieces = re.findall(r" ?\w+|\W", text)
        return SimpleNamespace(input_ids=[self._ids.setdefault(piece, len(self._ids)) for piece in pieces])


def check_task(name: str, **params: Any) -> None:
    """Check the episodes of a registered task, as text, at several lengths of the demo.

    They must be the same for the same seed, however many are asked for, and others for another seed; have ids of their own;
    have kinds and shots that ascend inside the demo; have a gold that holds the answer, and another query that is another
    one; and have everything that the task says they have (``Task.gives``).

    Args:
        name: registered name, or ``package.module:Class``.
        params: its parameters.

    Raises:
        AssertionError: one of these does not hold; says which.
        ConfigError: no such task, or it does not take these parameters.
        DataError: the task cannot give such episodes.
    """
    task = build(TASKS.get(name), params, "data.params")
    for data in (DataBlock(pairs=2), DataBlock(pairs=9), DataBlock(demo_tokens=60)):
        few, many, other = (
            list(islice(task.episodes(TaskRequest(n, seed, data, WordTokenizer(), frozenset(), {})), n))
            for n, seed in ((4, 1), (12, 1), (12, 2))
        )
        case = f"{name} at pairs = {data.pairs}, demo_tokens = {data.demo_tokens}"
        assert (len(few), len(many)) == (4, 12), f"{case}: fewer episodes than asked for"
        assert few == many[:4], f"{case}: an episode depends on how many there are"
        assert [e.demo_text for e in many] != [e.demo_text for e in other], f"{case}: another seed gives the same demos"
        assert len({e.sample_id for e in (*many, *other)}) == 24, f"{case}: episodes share an id"
        for episode in many:
            _check_episode(episode, task.gives, f"{case}, {episode.sample_id}")


def _check_episode(episode: OnEpisode, gives: frozenset[str], case: str) -> None:
    demo, answer = episode.demo_text, episode.answer_text
    assert demo, f"{case}: an empty demo"
    assert episode.query_text, f"{case}: an empty query"
    assert answer, f"{case}: an empty answer"
    for field, ranges in (("char_kinds", [kind[:2] for kind in episode.char_kinds]), ("shots", episode.shots or ())):
        previous = 0
        for start, end in ranges:
            assert previous <= start < end <= len(demo), f"{case}: {field} do not ascend inside the demo at [{start}, {end})"
            previous = end
    for field in GIVEN & gives:
        assert getattr(episode, field) is not None, f"{case}: no {field}, which the task says it gives"
    if episode.gold is not None:
        assert 0 <= episode.gold[0] < episode.gold[1] <= len(demo), f"{case}: gold is outside the demo"
        assert answer in demo[slice(*episode.gold)], f"{case}: gold does not hold the answer"
    assert episode.other_query_text != episode.query_text, f"{case}: the other query is the same one"
    if episode.labels is not None:
        assert answer in episode.labels, f"{case}: the answer is not among the labels"
        assert len(set(episode.labels)) == len(episode.labels) > 1, f"{case}: labels repeat, or there is one only"
