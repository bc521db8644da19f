"""The teacher's pass over demo + query: distribution after the query, attention to the demo, the demo's K/V.

A demo that several queries of a batch share is prefilled once, unless the demo's own rows are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from cedkv.inference.batched import map_rows, zeros_like_kv
from cedkv.inference.distributions import require_finite
from cedkv.inference.forward import Further, Ids, full_demo_prefix, given_tokens, last_logits, left_padded, prefill, read_logits
from cedkv.kv.attention import observe_attention
from cedkv.kv.cache import KVPrefix, read_cache
from cedkv.kv.readers import AttentionReader, PassRows, measure_inputs
from cedkv.kv.readings import Reading
from cedkv.kv.transfers import index_on
from cedkv.models.loading import LanguageModel


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's output for B samples.

    logprobs: (B, vocabulary) of the token after the query.
    demo: demos' K/V as a prefix, slot t = demo token t, of the samples in ``demo_row``; None if no K/V was kept.
    demo_row: sample -> row of ``demo``.
    maps: reading -> per sample (layers, H, L), by demo token.
    layers: the layers of ``maps``, ascending.
    names: sample ids.
    """

    logprobs: torch.Tensor
    demo: KVPrefix | None
    demo_row: dict[int, int]
    maps: dict[Reading, list[torch.Tensor]]
    layers: tuple[int, ...]
    names: list[str]

    def demo_prefixes(self, samples: Sequence[int]) -> KVPrefix:
        """Return the demos' K/V of these samples, in this order. Raises ValueError if no K/V was kept."""
        return self.demo_kv().rows([self.demo_row[sample] for sample in samples])

    def demo_kv(self) -> KVPrefix:
        """Return all K/V that was kept. Raises ValueError if none was."""
        if self.demo is None:
            raise ValueError("the demos' K/V was not kept")
        return self.demo

    def rows(self, samples: Sequence[int]) -> TeacherOutput:
        """Return the output of these samples, in this order; neither K/V nor maps are copied."""
        kept = {row: self.demo_row[sample] for row, sample in enumerate(samples) if sample in self.demo_row}
        maps = {reading: [of_sample[sample] for sample in samples] for reading, of_sample in self.maps.items()}
        names = [self.names[sample] for sample in samples]
        return replace(
            self, logprobs=self.logprobs[index_on(samples, self.logprobs.device)], demo_row=kept, maps=maps, names=names
        )

    def map(self, reading: Reading, sample: int, layers: frozenset[int]) -> torch.Tensor:
        """Return a reading of one sample's demo in some layers, (layers, H, L). Raises NumericsError: it is not finite."""
        read = self.maps[reading][sample]
        found = read[index_on([self.layers.index(layer) for layer in sorted(layers)], read.device)]
        require_finite(found[None], "token scores", [self.names[sample]])
        return found


@torch.inference_mode()
def read_teacher(
    lm: LanguageModel,
    demos: Sequence[Ids],
    queries: Sequence[Ids],
    names: Sequence[str],
    reader: AttentionReader,
    keep: Collection[int] = (),
    further: Further | None = None,
) -> TeacherOutput:
    """Run demo + query for B samples: distribution, attention, and the demo's K/V.

    A demo that several queries share is prefilled once and its queries run over its K/V. Where ``reader`` needs the demo's own
    rows, demo and query run together.

    Args:
        demos, queries: B token sequences each.
        names: sample ids, for errors.
        reader: what to read.
        keep: samples whose demo's K/V is kept (needed by gather, causal drop, and the plumbing checks).
        further: tokens that follow the queries, and what takes the distributions after them. Nothing that ``reader`` reads
            sees them.

    Raises:
        NumericsError: a logit is not finite, or a key or value of a shared demo.
    """
    if len(set(map(tuple, demos))) < len(demos) and not reader.all_rows:
        first_name = {tuple(demo): name for demo, name in zip(reversed(demos), reversed(names), strict=True)}
        unique = list(dict.fromkeys(map(tuple, demos)))
        index = {demo: row for row, demo in enumerate(unique)}
        keys, values = prefill(lm, unique, [range(len(demo)) for demo in unique], [first_name[demo] for demo in unique])
        prefix = full_demo_prefix(keys, values, [len(demo) for demo in unique])
        output = read_queries(lm, prefix, [index[tuple(demo)] for demo in demos], queries, names, reader, further=further)
        return output if keep else replace(output, demo=None, demo_row={})
    sequences = [tuple(demo) + tuple(query) for demo, query in zip(demos, queries, strict=True)]
    given = given_tokens(further, len(demos))
    demo_row = {sample: row for row, sample in enumerate(sorted(keep))}
    collector = _Collector(len(demos), reader)
    kept_kv: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def compute(indices: list[int]) -> torch.Tensor:
        nonlocal kept_kv
        ids, mask, positions = left_padded([sequences[i] for i in indices], lm.device, [given[i] for i in indices])
        use_cache, after = any(i in demo_row for i in indices), max(len(given[i]) for i in indices)
        starts = [ids.shape[1] - after - len(sequences[i]) for i in indices]
        demo_spans = [(start, start + len(demos[i])) for start, i in zip(starts, indices, strict=True)]
        with collector.reading(lm, indices, [len(queries[i]) for i in indices], demo_spans, after):
            output = lm.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=use_cache, logits_to_keep=1 + after
            )
        if use_cache:
            pass_kv = read_cache(output)
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
        return read_logits(output.logits[:, -1 - after :], "teacher logits", indices, names, further)

    logprobs = map_rows(lm, [len(row) + len(tokens) for row, tokens in zip(sequences, given, strict=True)], compute)
    demo = None
    if kept_kv is not None:
        demo = full_demo_prefix(tuple(kept_kv[0]), tuple(kept_kv[1]), [len(demos[i]) for i in sorted(demo_row)])
    return collector.output(logprobs, demo, demo_row, names)


@torch.inference_mode()
def read_queries(
    lm: LanguageModel,
    demo: KVPrefix,
    owners: Sequence[int],
    queries: Sequence[Ids],
    names: Sequence[str],
    reader: AttentionReader,
    query_rows: Sequence[int] | None = None,
    further: Further | None = None,
) -> TeacherOutput:
    """Run B queries over demos that were prefilled already; otherwise as ``read_teacher``.

    Args:
        demo: the demos' K/V, slot t = demo token t.
        owners: for each query, the row of ``demo`` it runs over.
        query_rows: for each query, how many of its last tokens are read as its rows; None for all.
        further: as in ``read_teacher``.

    Raises:
        NumericsError: a logit is not finite.
    """
    collector = _Collector(len(queries), reader)
    lengths = demo.visible.sum(dim=1).tolist()
    counts = [len(query) for query in queries] if query_rows is None else query_rows
    given = given_tokens(further, len(queries))

    def compute(indices: list[int]) -> torch.Tensor:
        rows, some, prefix = [queries[i] for i in indices], [given[i] for i in indices], demo.rows([owners[i] for i in indices])
        demo_spans, after = [(0, lengths[owners[i]]) for i in indices], max(map(len, some))
        with collector.reading(lm, indices, [counts[i] for i in indices], demo_spans, after):
            logits = last_logits(lm, rows, prefix, None, some)
        return read_logits(logits, "teacher logits", indices, names, further)

    logprobs = map_rows(lm, [len(query) + len(tokens) for query, tokens in zip(queries, given, strict=True)], compute)
    return collector.output(logprobs, demo, dict(enumerate(owners)), names)


class _Collector:
    """Collects, pass by pass, what is read about each sample's demo."""

    def __init__(self, n_samples: int, reader: AttentionReader) -> None:
        self._reader, self._n = reader, n_samples
        self._layers = tuple(sorted(reader.layers))
        self._maps: dict[Reading, list[torch.Tensor]] = {}

    @contextmanager
    def reading(
        self, lm: LanguageModel, indices: Sequence[int], query_rows: Sequence[int], demo: Sequence[tuple[int, int]], after: int
    ) -> Iterator[None]:
        """Read the pass that runs inside the context.

        Args:
            indices: the samples of the pass.
            query_rows, demo, after: as in ``PassRows``.
        """
        rows = PassRows(query_rows, demo, after)
        pass_reader = self._reader.fresh(rows)
        with ExitStack() as stack:
            if self._reader.over_input:
                stack.enter_context(measure_inputs(lm.model, rows.input_norms))
            stack.enter_context(observe_attention(pass_reader))
            yield
        pass_reader.require_complete()
        for reading, by_layer in pass_reader.maps.items():
            collected = self._maps.setdefault(reading, [torch.empty(0)] * self._n)
            for row, (i, (start, end)) in enumerate(zip(indices, demo, strict=True)):
                collected[i] = _stack_layers([by_layer[layer][row, :, start:end] for layer in self._layers])

    def output(
        self, logprobs: torch.Tensor, demo: KVPrefix | None, demo_row: dict[int, int], names: Sequence[str]
    ) -> TeacherOutput:
        """Combine what was collected with the rest of the teacher's output."""
        return TeacherOutput(logprobs, demo, demo_row, self._maps, self._layers, list(names))


def _stack_layers(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack one tensor per layer; a model may be spread over several devices."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
