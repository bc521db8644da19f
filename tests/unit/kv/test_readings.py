"""Readings of attention calls, of padded batches, against loops over eager attention (``tests.support.eager``)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cedkv.core.errors import ModelError
from cedkv.inference.teacher import TeacherOutput, read_queries, read_teacher
from cedkv.kv import readings
from cedkv.kv.readers import AttentionReader, layer_readers
from cedkv.kv.readings import Reading, ReceivedAttention, RowAttention, SpanDrop, ValueNorm
from cedkv.models import capabilities
from cedkv.models.loading import LanguageModel
from cedkv.models.output_projection import grams
from tests.families.models import FAMILIES, save
from tests.support import eager, tiny
from tests.support import patch_points as points
from tests.support.eager import Eager, Layer

DEMOS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25], [30] * 4 + [31, 32, 33]]
QUERIES = [[40, 41, 42], [50], [60, 61, 62, 63]]
ALL = frozenset(range(4))
KINDS = {
    "Llama": {},
    "Qwen3": {},
    "Gemma 2": {"sliding_window": 6},
    "gpt-oss": {"sliding_window": 6},
    "Llama, one key head": {},
}
"""Grouped heads; norms of queries and keys; soft cap and windows; sinks and windows; one key head."""
ROWS = [RowAttention(w, p, over) for w in (1, 2, 8, None) for p in ("mean", "max") for over in (False, True)]
EXPECTED = readings.ExpectedAttention(future=7, epsilon=0.05, sinks=2)
DROPS = [SpanDrop(3, None), SpanDrop(2, 2)]
DROP_ERROR = {False: 1e-4, True: 5e-3}
"""Relative, without and with sinks: what attention leaves to a sink is known as 1 less the rest, to float32's rounding."""


@dataclass(frozen=True)
class Case:
    """One kind of model: loaded here, and as transformers has it, with every layer of every sample's pass."""

    kind: str
    lm: LanguageModel
    plain: Eager
    layers: list[list[Layer]]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = next(family for family in FAMILIES if family.name == request.param)
    folder = save(replace(family, settings=family.settings | KINDS[family.name]), tmp_path_factory.mktemp("model"))
    plain = Eager(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capabilities, "LEAST_CONTEXT", 1)  # windows of a few tokens, which a certificate could not be measured in
        lm = tiny.load(folder)[1]
    return Case(family.name, lm, plain, [plain.read(d + q) for d, q in zip(DEMOS, QUERIES, strict=True)])


def read(lm: LanguageModel, wanted: Collection[Reading], which: Collection[int] = range(3)) -> TeacherOutput:
    weigh = grams(lm) if any(reading.weighs_values for reading in wanted) else {}
    reader = AttentionReader(ALL, layer_readers(wanted, weigh, lm.rope_layouts))
    return read_teacher(lm, [DEMOS[i] for i in which], [QUERIES[i] for i in which], [f"s{i}" for i in which], reader)


def compare(case: Case, reading: Reading, expected: Callable[[Layer, range, range], Any], atol: float = 1e-5) -> None:
    """Every layer, head and demo token of every sample; also of each sample in a batch of its own."""
    batch = read(case.lm, [reading])
    for row, (demo, query) in enumerate(zip(DEMOS, QUERIES, strict=True)):
        rows = range(len(demo)), range(len(demo), len(demo) + len(query))
        with torch.inference_mode():
            loop = torch.stack([torch.as_tensor(expected(layer, *rows)) for layer in case.layers[row]])
        found = batch.maps[reading][row][:, :, : loop.shape[-1]]
        scale = max(1.0, float(loop.abs().max()))
        assert found.shape == loop.shape
        assert (found - loop).abs().max() < atol * scale
        assert (batch.maps[reading][row] - read(case.lm, [reading], [row]).maps[reading][0]).abs().max() < atol * scale


@pytest.mark.parametrize("reading", ROWS, ids=str)
def test_rows_of_every_window_and_pooling(case: Case, reading: RowAttention) -> None:
    """The window stops at the query's first token, whatever the longest query of the batch."""
    compare(case, reading, lambda *at: eager.rows(*at, reading.window, reading.pooling, reading.over_input))


def test_all_rows_come_from_one_pass(case: Case) -> None:
    """Readings must not disturb each other: together they are what each is alone."""
    together = read(case.lm, ROWS)
    for reading in ROWS:
        alone = read(case.lm, [reading])
        assert all(torch.allclose(a, b) for a, b in zip(together.maps[reading], alone.maps[reading], strict=True))


def test_value_norms(case: Case) -> None:
    compare(case, ValueNorm(), lambda layer, demo, _: eager.value_norms(layer, demo), atol=1e-4)


def test_received_attention(case: Case) -> None:
    compare(case, ReceivedAttention(), lambda layer, demo, _: eager.received(layer, demo))


@pytest.mark.parametrize("reading", DROPS, ids=str)
def test_span_drop_is_its_closed_form(case: Case, reading: SpanDrop) -> None:
    def loop(layer: Layer, demo: range, query: range) -> torch.Tensor:
        return torch.tensor([eager.span_drops(layer, demo, query, reading.span_len, reading.window)])

    compare(case, reading, loop, atol=DROP_ERROR[case.kind == "gpt-oss"])


@pytest.mark.parametrize("reading", DROPS, ids=str)
def test_span_drop_is_the_real_change_of_the_heads_outputs(case: Case, reading: SpanDrop) -> None:
    """A layer that does not see the span, in a real pass: what its heads write moves by as much, summed over rows and heads."""
    found = read(case.lm, [reading]).maps[reading]
    for row, (demo, query) in enumerate(zip(DEMOS, QUERIES, strict=True)):
        tokens = range(len(demo), len(demo) + len(query))[-(reading.window or len(query)) :]
        for number, before in enumerate(case.layers[row]):
            dim = before.values.shape[-1]
            for start in range(len(demo) - reading.span_len + 1):
                with case.plain.span_hidden(number, start, start + reading.span_len):
                    after = case.plain.read(demo + query)[number]
                moved = (after.outputs - before.outputs).reshape(-1, before.heads, dim)
                with torch.inference_mode():
                    change = sum(before.written(head, moved[i, head]) for i in tokens for head in range(before.heads))
                error = DROP_ERROR[case.kind == "gpt-oss"]
                assert float(found[row][number, 0, start]) == pytest.approx(change, rel=error, abs=1e-4)


def test_expected_attention(case: Case) -> None:
    """Rotation matrices averaged one by one, covariance as a sum of outer products."""
    if case.kind == "Gemma 2":
        with pytest.raises(ModelError, match="soft cap"):
            read(case.lm, [EXPECTED])
        return
    rope = case.plain.model.model.rotary_emb

    def loop(layer: Layer, demo: range, _: range) -> torch.Tensor:
        return eager.expected_attention(layer, rope, len(demo), EXPECTED.future, EXPECTED.epsilon, EXPECTED.sinks)

    compare(case, EXPECTED, loop, atol=1e-4)


def test_a_demo_shorter_than_its_sinks_keeps_its_last_token(case: Case) -> None:
    if case.kind != "Gemma 2":
        reading = replace(EXPECTED, sinks=50)
        scores = read(case.lm, [reading]).maps[reading][1]
        assert (scores[:, :, :-1] == 0).all()
        assert (scores[:, :, -1] > 0).all()


WEIGHTED = [*ROWS, *DROPS, ValueNorm(), ReceivedAttention(), EXPECTED]


def test_a_chunk_of_rows_is_as_good_as_all_of_them(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are reduced a chunk at a time; the chunk's own offset must not matter."""
    _, lm = tiny.load(llama_folder)
    whole = read(lm, WEIGHTED).maps
    for chunk in (3, 1):
        points.ROW_CHUNK.replace(chunk, monkeypatch)
        cut = read(lm, WEIGHTED).maps
        for reading in WEIGHTED:
            for one, other in zip(whole[reading], cut[reading], strict=True):
                assert (one - other).abs().max() < 1e-5 * max(1.0, float(one.abs().max())), reading


class Largest(TorchDispatchMode):
    """The largest number of floats in a tensor that any operation makes."""

    floats = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.floats = max(self.floats, tensor.numel())
        return made


def test_no_attention_map_is_held(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts: no tensor has a number per head and pair of tokens; with one chunk for all rows it would have."""
    _, lm = tiny.load(llama_folder)
    demo, query, whole = [2 + i % 400 for i in range(300)], [7] * 40, 4 * 340**2
    largest = {}
    for chunk in (16, 1000):
        points.ROW_CHUNK.replace(chunk, monkeypatch)
        reader = AttentionReader(frozenset({1}), layer_readers(WEIGHTED, grams(lm), lm.rope_layouts))
        with Largest() as seen:
            read_teacher(lm, [demo], [query], ["s"], reader)
        largest[chunk] = seen.floats
    assert largest[16] < whole / 2
    assert largest[1000] >= whole


def test_queries_over_a_cached_demo_read_as_much(llama_folder: Path) -> None:
    """The demo's slots are those of the cache; ``query_rows`` leaves the first rows of a query unread.

    Queries are padded with token 0, whose embedding is zero here, as that of a padding token may be: rows without an input.
    """
    _, lm = tiny.load(llama_folder)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[0] = 0
    wanted = [*ROWS, ValueNorm(), *DROPS]
    reader = AttentionReader(ALL, layer_readers(wanted, grams(lm), lm.rope_layouts))
    whole = read_teacher(lm, DEMOS, QUERIES, list("abc"), reader, keep=range(3))
    cached = read_queries(lm, whole.demo_kv(), range(3), QUERIES, list("abc"), reader)
    some = read_queries(lm, whole.demo_kv(), range(3), QUERIES, list("abc"), reader, [2, 1, 2])
    for reading in wanted:
        last_two = replace(reading, window=min(2, getattr(reading, "window", 2) or 2)) if reading != ValueNorm() else reading
        for row in range(3):
            scale = max(1.0, float(whole.maps[reading][row].abs().max()))
            starts = slice(len(DEMOS[row]) - getattr(reading, "span_len", 1) + 1)
            expected, found = (output.maps[reading][row][..., starts] for output in (whole, cached))
            assert (found - expected).abs().max() < 1e-4 * scale
            if last_two in whole.maps:
                same = whole.maps[last_two][row][..., starts]
                assert (some.maps[reading][row][..., starts] - same).abs().max() < 1e-4 * scale
