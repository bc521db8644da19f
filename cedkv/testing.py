"""Contract tests that every registered selector must pass; packages that add one call them from their own tests."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from cedkv.config.schema import SelectBlock
from cedkv.core.errors import CedkvError
from cedkv.core.registry import build
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, TokenKind
from cedkv.selectors.base import ALWAYS, SelectionTask, candidates, select_tokens, selector_class, token_worth

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
