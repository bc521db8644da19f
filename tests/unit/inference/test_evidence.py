"""Evidence of a batch, aggregated, against loops over plain transformers (``tests.support.eager``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cedkv.core.errors import DataError, ModelError
from cedkv.core.values import OnSample, Selection
from cedkv.inference.context_window import require_fits, selection_uses
from cedkv.inference.evidence import pool, read_evidence, token_score
from cedkv.inference.passes import REPEAT, plan_passes, token_scores
from cedkv.kv.readings import KeyNorm, LagRelative, TokenScore
from cedkv.models.capabilities import ContextLimit
from tests.support import eager, tiny
from tests.support.eager import Layer
from tests.support.evidence import Case

PLUS = "select.params={plus: true}"
FUTURE = "select.params={future: 9}"


# aggregation


def loop_pool(per_head: torch.Tensor, score: TokenScore, weights: torch.Tensor | None = None) -> np.ndarray:
    """Heads, then layers, then neighbours, number by number."""
    layers, heads, length = per_head.shape
    scores = np.zeros(length)
    for j in range(length):
        values = [[float(per_head[n, h, j]) for h in range(heads)] for n in range(layers)]
        if score.heads == "fitted":
            assert weights is not None
            scores[j] = sum(float(weights[n, h]) * values[n][h] for n in range(layers) for h in range(heads))
            continue
        by_layer = [max(row) if score.heads == "max" else sum(row) / heads for row in values]
        scores[j] = max(by_layer) if score.layers == "max" else sum(by_layer) / layers
    half = score.kernel // 2
    near = [[scores[k] for k in range(j - half, j + half + 1) if 0 <= k < length] for j in range(length)]
    return np.array([sum(values) / score.kernel for values in near])


@pytest.mark.parametrize("heads", ["mean", "max", "fitted"])
@pytest.mark.parametrize("layers", ["mean", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_heads_then_layers_then_neighbours(heads: Any, layers: Any, kernel: int) -> None:
    """Outside the demo is 0, also where the kernel is wider than the demo."""
    torch.manual_seed(0)
    per_head, weights = torch.randn(3, 4, 5), torch.randn(3, 4)
    score = TokenScore(KeyNorm(), heads, layers, kernel)
    assert pool(per_head, score, weights).numpy() == pytest.approx(loop_pool(per_head, score, weights), rel=1e-5, abs=1e-6)


def test_fitted_heads_without_weights_are_an_error() -> None:
    with pytest.raises(ValueError, match="not fitted"):
        pool(torch.zeros(1, 1, 3), TokenScore(KeyNorm(), "fitted"))


# scores of every reading

Loop = Callable[[Case, OnSample], torch.Tensor]


def over_query(
    query: Callable[[Case, OnSample], tuple[int, ...]],
    window: int | None = None,
    pooling: str = "mean",
    over_input: bool = False,
) -> Loop:
    """Attention of a query to the demo, (layers, H, L)."""

    def loop(case: Case, sample: OnSample) -> torch.Tensor:
        demo = range(len(sample.demo_token_ids))
        asked = query(case, sample)
        rows = range(len(demo), len(demo) + len(asked))
        layers = case.plain.read(sample.demo_token_ids + asked)
        return torch.stack([eager.rows(layer, demo, rows, window, pooling, over_input) for layer in layers])

    return loop


def of_demo(reading: Callable[[Layer, range], torch.Tensor], with_query: bool = False) -> Loop:
    """A reading of the demo's own tokens, (layers, H, L)."""

    def loop(case: Case, sample: OnSample) -> torch.Tensor:
        layers = case.plain.read(sample.teacher_ids if with_query else sample.demo_token_ids)
        return torch.stack([reading(layer, range(len(sample.demo_token_ids))) for layer in layers])

    return loop


def replayed(plus: bool) -> Loop:
    """The demo, the instruction, and the demo again without BOS; only the repetition's rows count."""

    def loop(case: Case, sample: OnSample) -> torch.Tensor:
        demo, again = sample.demo_token_ids, sample.demo_token_ids[int(sample.has_bos) :]
        tokens = demo + case.ids(REPEAT) + again
        rows = range(len(tokens) - len(again), len(tokens))
        layers = case.plain.read(tokens)
        return torch.stack([eager.rows(layer, range(len(demo)), rows, None, "max", plus) for layer in layers])

    return loop


def expected(case: Case, sample: OnSample) -> torch.Tensor:
    layers, rope = case.plain.read(sample.teacher_ids), case.plain.model.model.rotary_emb
    return torch.stack([eager.expected_attention(layer, rope, len(sample.demo_token_ids), 9, 0.01, 4) for layer in layers])


def minus(one: Loop, other: Loop) -> Loop:
    return lambda case, sample: one(case, sample) - other(case, sample)


def times(one: Loop, other: Loop) -> Loop:
    return lambda case, sample: one(case, sample) * other(case, sample)


def own(case: Case, sample: OnSample) -> tuple[int, ...]:
    return sample.query_token_ids


def other(case: Case, sample: OnSample) -> tuple[int, ...]:
    return sample.other_query_ids or ()


def null(case: Case, sample: OnSample) -> tuple[int, ...]:
    return case.ids("N/A")


NORMS = of_demo(eager.value_norms)
ATTENTION = over_query(own)
MEAN = ("select.row_pooling=mean", "select.head_pooling=mean", "select.layer_pooling=mean")
SCORES: dict[tuple[str, ...], tuple[Loop, TokenScore]] = {
    ("attention_diversity_span",): (ATTENTION, TokenScore(KeyNorm())),
    ("attention_diversity_span", "select.row_pooling=max", "select.head_pooling=max", "select.layer_pooling=max"): (
        over_query(own, None, "max"),
        TokenScore(KeyNorm(), "max", "max"),
    ),
    ("attention_diversity_span", "select.query_window=2", "select.row_pooling=max", "select.head_pooling=max"): (
        over_query(own, 2, "max"),
        TokenScore(KeyNorm(), "max"),
    ),
    ("attention_diversity_span", "select.layer_pooling=max", "select.pooling_kernel=5"): (
        ATTENTION,
        TokenScore(KeyNorm(), layers="max", kernel=5),
    ),
    ("attention_diversity_span", "select.value_weighting=output_norm", "select.null_query=true"): (
        times(minus(ATTENTION, over_query(null)), NORMS),
        TokenScore(KeyNorm()),
    ),
    ("value_weighted_attention", "select.row_pooling=max"): (
        times(over_query(own, None, "max"), NORMS),
        TokenScore(KeyNorm()),
    ),
    ("calibrated_attention",): (minus(ATTENTION, over_query(null)), TokenScore(KeyNorm())),
    ("snapkv", "select.head_pooling=max", "select.params={window: 3, kernel: 3}"): (
        over_query(own, 3),
        TokenScore(KeyNorm(), kernel=3),
    ),
    ("tova", "select.head_pooling=max"): (over_query(own, 1), TokenScore(KeyNorm())),
    ("transfer_span",): (over_query(other), TokenScore(KeyNorm())),
    ("accumulated_attention", "select.head_pooling=max"): (of_demo(eager.received, True), TokenScore(KeyNorm(), "max")),
    ("replay",): (replayed(False), TokenScore(KeyNorm(), "max")),
    ("replay", PLUS): (times(replayed(True), NORMS), TokenScore(KeyNorm(), "max")),
    ("expected_attention", FUTURE): (expected, TokenScore(KeyNorm())),
    ("key_norm",): (of_demo(eager.key_norms), TokenScore(KeyNorm())),
    ("key_difference",): (of_demo(eager.key_differences), TokenScore(KeyNorm())),
    ("lagkv", "select.params={lag: 6, sinks: 3}"): (
        of_demo(lambda layer, demo: eager.lag_relative(layer, demo, 6, 3)),
        TokenScore(KeyNorm()),
    ),
}
"""Selector and settings beside ``MEAN`` -> how the score is computed by loops, and its aggregation (its reading is not looked
at).
"""


@pytest.mark.parametrize("settings", SCORES, ids=" ".join)
def test_the_score_of_every_selector(case: Case, settings: tuple[str, ...]) -> None:
    """Over all layers, and over two of them where the aggregation is the configured one."""
    mode, *overrides = settings
    loop, aggregation = SCORES[settings]
    with torch.inference_mode():
        per_head = [loop(case, sample) for sample in case.samples]
    for scope in ("all", [0, 2]):
        config = case.config(f"select.mode={mode}", f"layer_scope.selection={scope}", *MEAN, *overrides)
        for found, layers in zip(read_evidence(case.batch(config), config), per_head, strict=True):
            of_scope = layers if scope == "all" or mode in ("snapkv", "tova") else layers[[0, 2]]
            by_loop = loop_pool(of_scope, aggregation)
            assert abs(found.scores - by_loop).max() < 2e-5 * max(1.0, abs(by_loop).max())


def test_by_default_the_largest_attention_of_any_row_head_and_layer(case: Case) -> None:
    """A configuration that says nothing of pooling; of four layers ``top25`` reads the last."""
    loop = over_query(own, None, "max")
    with torch.inference_mode():
        per_head = [loop(case, sample)[3:] for sample in case.samples]
    config = case.config()
    for found, layers in zip(read_evidence(case.batch(config), config), per_head, strict=True):
        assert found.scores == pytest.approx(loop_pool(layers, TokenScore(KeyNorm(), "max", "max")), abs=2e-5)


EVERY = [*((mode,) for mode in tiny.MODES), ("replay", PLUS), *SCORES]


@pytest.mark.parametrize("settings", dict.fromkeys(EVERY), ids=" ".join)
def test_a_batch_of_n_is_n_batches_of_one(case: Case, settings: tuple[str, ...]) -> None:
    """Scores and ablations of each sample, whatever the others' lengths: padding, windows and rows are each row's own."""
    mode, *overrides = settings
    config = case.config(f"select.mode={mode}", *overrides)
    for found, sample in zip(read_evidence(case.batch(config), config), case.samples, strict=True):
        (alone,) = read_evidence(case.batch(config, [sample]), config)
        for name in ("attention", "scores"):
            one, by_itself = getattr(found, name), getattr(alone, name)
            assert one == pytest.approx(by_itself, rel=1e-4, abs=1e-4 * max(1.0, abs(by_itself).max())), name
        for name in ("causal_drop", "span_drop"):
            if getattr(alone, name) is not None:
                assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=1e-3, abs=1e-4), name
        if found.answer_odds is not None and alone.answer_odds is not None:
            masks = np.random.default_rng(0).random((5, len(sample.demo_token_ids))) < 0.5
            assert found.answer_odds(masks) == pytest.approx(alone.answer_odds(masks), abs=1e-3)
        if found.divergence is not None and alone.divergence is not None:
            selections = [Selection((), (0, 1, 2, 5)), Selection((), (0, 3, 4))]
            assert found.divergence(selections) == pytest.approx(alone.divergence(selections), rel=1e-3, abs=1e-5)


def test_lag_relative_of_a_demo_without_two_partitions_is_1(case: Case) -> None:
    config = case.config("select.mode=lagkv", "select.params={lag: 40}")
    batch = case.batch(config)
    assert all((token_score(batch, TokenScore(LagRelative(40, 4)), row) == 1).all() for row in range(3))


# passes


@pytest.mark.parametrize(
    ("overrides", "extra", "kept"),
    [
        ((), 0, False),
        (("select.mode=value_weighted_attention",), 0, False),
        (("select.mode=calibrated_attention",), 1, True),
        (("select.mode=transfer_span", "select.null_query=true"), 2, True),
        (("select.mode=replay",), 1, True),
        (("select.mode=key_norm",), 0, True),
        (("select.mode=expected_attention",), 0, False),
    ],
)
def test_passes_are_those_that_are_needed(overrides: tuple[str, ...], extra: int, kept: bool) -> None:
    passes = plan_passes([tiny.config("x", *overrides)])
    assert (sum(map(bool, (passes.other, passes.null, passes.replay))), passes.over_cache) == (extra, kept)


def test_a_score_is_computed_once(case: Case) -> None:
    config = case.config()
    batch, (configured, _) = case.batch(config), token_scores(config)
    assert token_score(batch, configured, 1) is token_score(batch, configured, 1)


def test_a_sample_without_another_query_is_named(case: Case) -> None:
    bare = [case.samples[0], replace(case.samples[1], other_query_ids=None)]
    with pytest.raises(DataError, match=rf'{bare[1].sample_id}: "other_query_text" is needed'):
        case.batch(case.config("select.mode=transfer_span"), bare)


@pytest.mark.parametrize("of_a_layer", [False, True])
@pytest.mark.parametrize("mode", ["replay", "calibrated_attention", "transfer_span"])
def test_a_pass_that_is_too_long_is_rejected(case: Case, mode: str, of_a_layer: bool) -> None:
    """Demo and query fit, the demo twice need not: a sliding window would hide half of the demo from the repetition."""
    config = case.config(f"select.mode={mode}")
    texts = {"replay": REPEAT, "calibrated_attention": "N/A", "transfer_span": ""}
    rows = [
        len(case.ids(texts[mode]))
        + (len(sample.demo_token_ids) - sample.has_bos) * (mode == "replay")
        + len(sample.other_query_ids or ()) * (mode == "transfer_span")
        for sample in case.samples
    ]
    longest = max(len(sample.demo_token_ids) for sample in case.samples) + max(rows)
    for tokens in (longest, longest - 1):
        limit = {"context_limits": (ContextLimit(tokens, "a window"),)} if of_a_layer else {"max_positions": tokens}
        capabilities = replace(case.lm.capabilities, **limit)
        uses = [use for use in selection_uses(config, case.samples, case.lm.tokenizer) if use.arm not in ("teacher", "select")]
        assert len(uses) == len(case.samples)
        if tokens == longest:
            require_fits(capabilities, uses)
        else:
            unit, arm = ("slots and tokens" if of_a_layer else "positions"), "(replay|null query|other query)"
            with pytest.raises(ModelError, match=f"needs {longest} {unit} in the arm '{arm}', the model has {tokens}"):
                require_fits(capabilities, uses)
