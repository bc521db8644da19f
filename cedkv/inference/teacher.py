"""The teacher's reading of demos: distribution after the query, attention to the demo, the demo's K/V.

A demo goes through the model once for all queries about it in a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cedkv.inference.forward import (
    Ids,
    full_demo_prefix,
    last_logits,
    left_padded,
    log_softmax,
    map_rows,
    prefill,
    require_finite,
    room_like,
)
from cedkv.kv.attention import AttentionReader, capture_attention
from cedkv.kv.cache import KVPrefix, read_cache
from cedkv.models.loading import LanguageModel


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says about B samples.

    logprobs: (B, vocabulary) of the token after the query.
    demo: demos' K/V as a prefix, slot t = demo token t; of the samples that ``demo_row`` names, or None.
    demo_row: sample -> row of ``demo``.
    rows: attention of each query's last tokens to the demo, (layers, window, L) a sample, float32.
    received: attention each demo token receives from all later tokens, (layers, L) a sample, summed; empty if not read.
    layers, received_layers: which layers those are, ascending.
    query_lengths: tokens, per sample.
    names: sample ids.
    """

    logprobs: torch.Tensor
    demo: KVPrefix | None
    demo_row: dict[int, int]
    rows: list[torch.Tensor]
    received: list[torch.Tensor]
    layers: tuple[int, ...]
    received_layers: tuple[int, ...]
    query_lengths: list[int]
    names: list[str]

    def demos(self, samples: Sequence[int]) -> KVPrefix:
        """The demos' K/V of some samples, in this order. Raises ValueError where it was not kept."""
        return self.kept().rows([self.demo_row[sample] for sample in samples])

    def kept(self) -> KVPrefix:
        """All K/V that was kept. Raises ValueError when none was."""
        if self.demo is None:
            raise ValueError("the demos' K/V was not kept")
        return self.demo

    def attention(self, sample: int, layers: frozenset[int], window: int) -> NDArray[np.float64]:
        """(L,) attention of the query's last ``window`` tokens to the demo, mean over those, heads and ``layers``."""
        at = [self.layers.index(layer) for layer in sorted(layers)]
        return self._finite(self.rows[sample][at, -window:].mean(dim=(0, 1)), sample)

    def accumulated(self, sample: int, layers: frozenset[int]) -> NDArray[np.float64]:
        """(L,) attention received from later tokens, over how many those are, mean over heads and ``layers``."""
        at = [self.received_layers.index(layer) for layer in sorted(layers)]
        received = self.received[sample][at].mean(dim=0)
        length = len(received)
        later = length + self.query_lengths[sample] - 1 - torch.arange(length, device=received.device)
        return self._finite(received / later, sample)

    def _finite(self, scores: torch.Tensor, sample: int) -> NDArray[np.float64]:
        require_finite(scores[None], "attention scores", [self.names[sample]])
        return scores.double().cpu().numpy()


@torch.inference_mode()
def read_teacher(
    lm: LanguageModel,
    demos: Sequence[Ids],
    queries: Sequence[Ids],
    names: Sequence[str],
    reader: AttentionReader,
    keep: Collection[int] = (),
) -> TeacherOutput:
    """Run demo + query for B samples: distribution, attention, and the demo's K/V.

    A demo that several queries share is run once, its queries over its K/V; where every row's attention is asked for
    (``reader.accumulate``) demo and query go together.

    Args:
        reader: which attention to read.
        keep: samples whose demo's K/V is kept (needed by gather, causal drop, and the plumbing checks).
    """
    if len(set(map(tuple, demos))) < len(demos) and not reader.accumulate:
        unique = list(dict.fromkeys(map(tuple, demos)))
        index = {demo: row for row, demo in enumerate(unique)}
        keys, values = prefill(lm, unique, [range(len(demo)) for demo in unique], names)
        shared = full_demo_prefix(keys, values, [len(demo) for demo in unique])
        found = read_queries(lm, shared, [index[tuple(demo)] for demo in demos], queries, names, reader)
        return found if keep else replace(found, demo=None, demo_row={})
    whole_rows = [tuple(demo) + tuple(query) for demo, query in zip(demos, queries, strict=True)]
    where = {sample: row for row, sample in enumerate(sorted(keep))}
    collected = _Attention(len(demos), reader)
    kept: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def compute(part: list[int]) -> torch.Tensor:
        nonlocal kept
        ids, mask, positions = left_padded([whole_rows[i] for i in part], lm.device)
        use_cache = any(i in where for i in part)
        with capture_attention(reader.again()) as seen:
            output = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=use_cache, logits_to_keep=1)
        logits = output.logits[:, -1]
        require_finite(logits, "teacher logits", [names[i] for i in part])
        starts = [ids.shape[1] - len(whole_rows[i]) for i in part]
        collected.add(part, seen, [(s, s + len(demos[i])) for s, i in zip(starts, part, strict=True)], queries)
        if use_cache:
            layers = read_cache(output.past_key_values)
            if kept is None:
                longest = max(len(demos[i]) for i in where)
                kept = tuple([room_like(t, len(where), longest) for t in side] for side in layers)  # type: ignore[assignment]
            for side, room in zip(layers, kept, strict=True):  # type: ignore[arg-type]
                for tensor, into in zip(side, room, strict=True):
                    for row, i in enumerate(part):
                        if i in where:
                            length = len(demos[i])
                            into[where[i], :, :length] = tensor[row, :, starts[row] : starts[row] + length]
        return log_softmax(logits)

    logprobs = map_rows(lm, [len(row) for row in whole_rows], compute)
    demo = None
    if kept is not None:
        demo = full_demo_prefix(tuple(kept[0]), tuple(kept[1]), [len(demos[i]) for i in sorted(where)])
    return collected.output(logprobs, demo, where, queries, names)


@torch.inference_mode()
def read_queries(
    lm: LanguageModel,
    demo: KVPrefix,
    owners: Sequence[int],
    queries: Sequence[Ids],
    names: Sequence[str],
    reader: AttentionReader,
) -> TeacherOutput:
    """As ``read_teacher``, over demos that were run already: query i over row ``owners[i]`` of ``demo``."""
    collected = _Attention(len(queries), reader)
    lengths = demo.visible.sum(dim=1).tolist()

    def compute(part: list[int]) -> torch.Tensor:
        with capture_attention(reader.again()) as seen:
            logits = last_logits(lm, [queries[i] for i in part], demo.rows([owners[i] for i in part]), None)
        require_finite(logits, "teacher logits", [names[i] for i in part])
        collected.add(part, seen, [(0, lengths[owners[i]]) for i in part], queries)
        return log_softmax(logits)

    logprobs = map_rows(lm, [len(query) for query in queries], compute)
    return collected.output(logprobs, demo, dict(enumerate(owners)), queries, names)


class _Attention:
    """Collects, pass by pass, the attention to each sample's demo."""

    def __init__(self, n: int, reader: AttentionReader) -> None:
        self.layers, self.received_layers = tuple(sorted(reader.layers)), tuple(sorted(reader.accumulate))
        self.rows = [torch.empty(0)] * n
        self.received = [torch.empty(0)] * n

    def add(self, part: Sequence[int], seen: AttentionReader, demos: Sequence[tuple[int, int]], queries: Sequence[Ids]) -> None:
        """``demos``: where each row's demo lies among the keys."""
        seen.require_complete()
        for row, (i, (start, end)) in enumerate(zip(part, demos, strict=True)):
            window = min(seen.window, len(queries[i]))  # rows before the query's first token belong to the demo
            if self.layers:
                self.rows[i] = _stacked([seen.rows[layer][row, -window:, start:end] for layer in self.layers])
            if self.received_layers:
                self.received[i] = _stacked([seen.received[layer][row, start:end] for layer in self.received_layers])

    def output(
        self,
        logprobs: torch.Tensor,
        demo: KVPrefix | None,
        demo_row: dict[int, int],
        queries: Sequence[Ids],
        names: Sequence[str],
    ) -> TeacherOutput:
        """What was collected, with the rest of a reading."""
        lengths = [len(query) for query in queries]
        return TeacherOutput(
            logprobs, demo, demo_row, self.rows, self.received, self.layers, self.received_layers, lengths, list(names)
        )


def _stacked(by_layer: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of a value a layer; a model may be spread over several devices."""
    return torch.stack([values.to(by_layer[0].device) for values in by_layer])
