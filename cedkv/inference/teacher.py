"""The teacher's pass over demo + query: distribution after the query, attention to the demo, the demo's K/V.

A demo that several queries of a batch share is prefilled once, unless accumulated attention is read.
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
    zeros_like_kv,
)
from cedkv.kv.attention import AttentionReader, capture_attention
from cedkv.kv.cache import KVPrefix, read_cache
from cedkv.models.loading import LanguageModel


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's output for B samples.

    logprobs: (B, vocabulary) of the token after the query.
    demo: demos' K/V as a prefix, slot t = demo token t, of the samples in ``demo_row``; None if no K/V was kept.
    demo_row: sample -> row of ``demo``.
    rows: per sample, attention of the query's last tokens to the demo, (layers, window, L), float32.
    received: per sample, attention that each demo token receives from all later tokens, (layers, L), summed; empty if not read.
    layers, received_layers: the layers of ``rows`` and ``received``, ascending.
    query_lengths: per sample, tokens of the query.
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

    def demo_prefixes(self, samples: Sequence[int]) -> KVPrefix:
        """Return the demos' K/V of these samples, in this order. Raises ValueError if no K/V was kept."""
        return self.demo_kv().rows([self.demo_row[sample] for sample in samples])

    def demo_kv(self) -> KVPrefix:
        """Return all K/V that was kept. Raises ValueError if none was."""
        if self.demo is None:
            raise ValueError("the demos' K/V was not kept")
        return self.demo

    def attention(self, sample: int, layers: frozenset[int], window: int) -> NDArray[np.float64]:
        """Return the attention of the query's last ``window`` tokens to each demo token.

        Returns:
            (L,), the mean over these query tokens, heads and ``layers``.

        Raises:
            NumericsError: a value is not finite.
        """
        layer_indices = [self.layers.index(layer) for layer in sorted(layers)]
        return self._finite(self.rows[sample][layer_indices, -window:].mean(dim=(0, 1)), sample)

    def accumulated(self, sample: int, layers: frozenset[int]) -> NDArray[np.float64]:
        """Return the attention each demo token receives from all later tokens, divided by the number of later tokens.

        Returns:
            (L,), the mean over heads and ``layers``.

        Raises:
            NumericsError: a value is not finite.
        """
        layer_indices = [self.received_layers.index(layer) for layer in sorted(layers)]
        received = self.received[sample][layer_indices].mean(dim=0)
        length = len(received)
        n_later = length + self.query_lengths[sample] - 1 - torch.arange(length, device=received.device)
        return self._finite(received / n_later, sample)

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

    A demo that several queries share is prefilled once and its queries run over its K/V. If ``reader.accumulate`` asks for the
    attention of every row, demo and query run together.

    Args:
        demos, queries: B token sequences each.
        names: sample ids, for errors.
        reader: which attention to read.
        keep: samples whose demo's K/V is kept (needed by gather, causal drop, and the plumbing checks).

    Raises:
        NumericsError: a logit is not finite, or a key or value of a shared demo.
    """
    if len(set(map(tuple, demos))) < len(demos) and not reader.accumulate:
        first_name = {tuple(demo): name for demo, name in zip(reversed(demos), reversed(names), strict=True)}
        unique = list(dict.fromkeys(map(tuple, demos)))
        index = {demo: row for row, demo in enumerate(unique)}
        keys, values = prefill(lm, unique, [range(len(demo)) for demo in unique], [first_name[demo] for demo in unique])
        prefix = full_demo_prefix(keys, values, [len(demo) for demo in unique])
        output = read_queries(lm, prefix, [index[tuple(demo)] for demo in demos], queries, names, reader)
        return output if keep else replace(output, demo=None, demo_row={})
    sequences = [tuple(demo) + tuple(query) for demo, query in zip(demos, queries, strict=True)]
    demo_row = {sample: row for row, sample in enumerate(sorted(keep))}
    collector = _AttentionCollector(len(demos), reader)
    kept_kv: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def compute(indices: list[int]) -> torch.Tensor:
        nonlocal kept_kv
        ids, mask, positions = left_padded([sequences[i] for i in indices], lm.device)
        use_cache = any(i in demo_row for i in indices)
        with capture_attention(reader.fresh()) as pass_reader:
            output = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=use_cache, logits_to_keep=1)
        logits = output.logits[:, -1]
        require_finite(logits, "teacher logits", [names[i] for i in indices])
        starts = [ids.shape[1] - len(sequences[i]) for i in indices]
        demo_spans = [(start, start + len(demos[i])) for start, i in zip(starts, indices, strict=True)]
        collector.add(indices, pass_reader, demo_spans, queries)
        if use_cache:
            pass_kv = read_cache(output.past_key_values)
            if kept_kv is None:
                longest = max(len(demos[i]) for i in demo_row)
                keys, values = ([zeros_like_kv(t, len(demo_row), longest) for t in layers] for layers in pass_kv)
                kept_kv = keys, values
            for layers, buffers in zip(pass_kv, kept_kv, strict=True):
                for tensor, buffer in zip(layers, buffers, strict=True):
                    for row, i in enumerate(indices):
                        if i in demo_row:
                            length = len(demos[i])
                            buffer[demo_row[i], :, :length] = tensor[row, :, starts[row] : starts[row] + length]
        return log_softmax(logits)

    logprobs = map_rows(lm, [len(sequence) for sequence in sequences], compute)
    demo = None
    if kept_kv is not None:
        demo = full_demo_prefix(tuple(kept_kv[0]), tuple(kept_kv[1]), [len(demos[i]) for i in sorted(demo_row)])
    return collector.output(logprobs, demo, demo_row, queries, names)


@torch.inference_mode()
def read_queries(
    lm: LanguageModel,
    demo: KVPrefix,
    owners: Sequence[int],
    queries: Sequence[Ids],
    names: Sequence[str],
    reader: AttentionReader,
) -> TeacherOutput:
    """Run B queries over demos that were prefilled already; otherwise as ``read_teacher``.

    Args:
        demo: the demos' K/V, slot t = demo token t.
        owners: for each query, the row of ``demo`` it runs over.

    Raises:
        NumericsError: a logit is not finite.
    """
    collector = _AttentionCollector(len(queries), reader)
    lengths = demo.visible.sum(dim=1).tolist()

    def compute(indices: list[int]) -> torch.Tensor:
        with capture_attention(reader.fresh()) as pass_reader:
            logits = last_logits(lm, [queries[i] for i in indices], demo.rows([owners[i] for i in indices]), None)
        require_finite(logits, "teacher logits", [names[i] for i in indices])
        collector.add(indices, pass_reader, [(0, lengths[owners[i]]) for i in indices], queries)
        return log_softmax(logits)

    logprobs = map_rows(lm, [len(query) for query in queries], compute)
    return collector.output(logprobs, demo, dict(enumerate(owners)), queries, names)


class _AttentionCollector:
    """Collects, pass by pass, the attention to each sample's demo."""

    def __init__(self, n_samples: int, reader: AttentionReader) -> None:
        self.layers, self.received_layers = tuple(sorted(reader.layers)), tuple(sorted(reader.accumulate))
        self.rows = [torch.empty(0)] * n_samples
        self.received = [torch.empty(0)] * n_samples

    def add(
        self,
        indices: Sequence[int],
        reader: AttentionReader,
        demo_spans: Sequence[tuple[int, int]],
        queries: Sequence[Ids],
    ) -> None:
        """Take the attention that one pass read.

        Args:
            indices: the samples of the pass.
            demo_spans: for each row of the pass, the slots ``[start, end)`` of its demo among the keys.
            queries: of all samples.
        """
        reader.require_complete()
        for row, (i, (start, end)) in enumerate(zip(indices, demo_spans, strict=True)):
            window = min(reader.window, len(queries[i]))  # rows before the query's first token belong to the demo
            if self.layers:
                self.rows[i] = _stack_layers([reader.rows[layer][row, -window:, start:end] for layer in self.layers])
            if self.received_layers:
                self.received[i] = _stack_layers([reader.received[layer][row, start:end] for layer in self.received_layers])

    def output(
        self,
        logprobs: torch.Tensor,
        demo: KVPrefix | None,
        demo_row: dict[int, int],
        queries: Sequence[Ids],
        names: Sequence[str],
    ) -> TeacherOutput:
        """Combine the collected attention with the rest of the teacher's output."""
        return TeacherOutput(
            logprobs=logprobs,
            demo=demo,
            demo_row=demo_row,
            rows=self.rows,
            received=self.received,
            layers=self.layers,
            received_layers=self.received_layers,
            query_lengths=[len(query) for query in queries],
            names=list(names),
        )


def _stack_layers(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack one tensor per layer; a model may be spread over several devices."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
