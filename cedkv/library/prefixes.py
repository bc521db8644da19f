"""Selected prefixes: what was kept and why, text after them, a cache for a loop of one's own, files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from cedkv.core.errors import ConfigError, DataError
from cedkv.core.text import plural, preview
from cedkv.core.values import OnEpisode, OnSample, Placement, Selection
from cedkv.inference import generation
from cedkv.inference.forward import prefill
from cedkv.inference.generation import pieces_of
from cedkv.inference.prefix_store import load_with_details, save_prefix
from cedkv.kv.cache import KVPrefix
from cedkv.library.answering import (
    PrefixCache,
    SamplingOptions,
    cache_of,
    check_room,
    inputs_of,
    logprobs_after,
    row_names,
    sampling_of,
    texts_after,
)
from cedkv.library.texts import query_tokens, retokenize
from cedkv.models.fingerprint import prefix_fingerprint
from cedkv.models.loading import LanguageModel
from cedkv.models.tokenizer import tokens_text


class TextSpan(NamedTuple):
    """A kept span: demo tokens ``[start, end)``, the selector's score of it, and its text."""

    start: int
    end: int
    score: float
    text: str


@dataclass(frozen=True, eq=False, repr=False)
class SelectedPrefix:
    """The prefix that was selected for one query.

    Attributes:
        sample: demo and query, tokenised.
        selection: the chosen spans and the kept tokens.
        placement: rotary positions of the kept tokens and of the query's first token, and the number of slots.
        scores: (L,) what the selector holds each demo token to be worth; ``scores_of`` is ``attention``, where it ranks no
            tokens, and they are the configured attention.
        injection: layers that see the prefix (``layer_scope.injection``).
        kv: keys and values, one row.
    """

    lm: LanguageModel
    sample: OnSample
    selection: Selection
    placement: Placement
    scores: NDArray[np.float64]
    scores_of: str
    injection: str | list[int]
    kv: KVPrefix

    def __repr__(self) -> str:
        kept, length = len(self.kept_tokens), len(self.sample.demo_token_ids)
        spans = plural(len(self.selection.spans), "span")
        return f"<prefix of {kept} of {length} demo tokens, {spans}, for {preview(self.query, 60)}>"

    @property
    def demo(self) -> str:
        """The demonstration."""
        return self.sample.episode.demo_text

    @property
    def query(self) -> str:
        """The query that the prefix was selected for."""
        return self.sample.episode.query_text

    @property
    def kept_tokens(self) -> tuple[int, ...]:
        """The kept demo tokens by their index, ascending: BOS, sinks and spans."""
        return self.selection.kept_tokens

    @property
    def spans(self) -> list[TextSpan]:
        """The kept spans in the order of the demo."""
        ids, tokenizer = self.sample.demo_token_ids, self.lm.tokenizer
        return [
            TextSpan(span.start, span.end, span.score, tokens_text(tokenizer, ids[span.start : span.end]))
            for span in self.selection.spans
        ]

    @overload
    def logprobs(self, query: str | None = None) -> torch.Tensor: ...

    @overload
    def logprobs(self, query: list[str]) -> torch.Tensor: ...

    def logprobs(self, query: str | list[str] | None = None) -> torch.Tensor:
        """Return the log-probabilities of the token after the prefix and a query: the engine's select arm.

        Args:
            query: None for the query that the prefix was selected for.

        Returns:
            (vocabulary,) in nats; (queries, vocabulary) of several queries.

        Raises:
            DataError: a query that cannot follow this demo.
            ModelError: prefix and query are longer than the model can attend to.
            NumericsError: a logit is not finite.
        """
        texts = [query] if query is None or isinstance(query, str) else list(query)
        found = logprobs_after(self.lm, [self.query_ids(text) for text in texts], self.kv, [0] * len(texts), self.injection)
        return found[0] if query is None or isinstance(query, str) else found

    @overload
    def generate(
        self,
        query: str | None = None,
        max_new_tokens: int = ...,
        streamer: Callable[[str], object] | None = ...,
        **options: Unpack[SamplingOptions],
    ) -> str: ...

    @overload
    def generate(
        self, query: list[str], max_new_tokens: int = ..., streamer: None = ..., **options: Unpack[SamplingOptions]
    ) -> list[str]: ...

    def generate(
        self,
        query: str | list[str] | None = None,
        max_new_tokens: int = 20,
        streamer: Callable[[str], object] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> str | list[str]:
        """Return the text that follows the prefix and a query, without control tokens.

        Args:
            query: None for the query that the prefix was selected for; several run in a batch under this one prefix.
            max_new_tokens: tokens at most; generation stops earlier at a token that ends a text.
            streamer: called with each piece of text as soon as it is certain; for one query.
            options: ``do_sample`` (False: the most probable token at each step), ``temperature``, ``top_k``, ``top_p``,
                ``seed``, see ``SamplingOptions``.

        Returns:
            The text; a list of texts for several queries.

        Raises:
            ConfigError: options that contradict each other, or an impossible value.
            DataError, ModelError, NumericsError: as ``logprobs``.
        """
        if query is None or isinstance(query, str):
            pieces = []
            for piece in self.stream(query, max_new_tokens, **options):
                pieces.append(piece)
                if streamer is not None:
                    streamer(piece)
            return "".join(pieces)
        if streamer is not None:
            raise ConfigError("generate: streamer takes the text of one query; generate the queries one by one")
        ids = [self.query_ids(text) for text in query]
        return texts_after(self.lm, ids, self.kv, [0] * len(ids), self.injection, max_new_tokens, sampling_of(options))

    def stream(self, query: str | None = None, max_new_tokens: int = 20, **options: Unpack[SamplingOptions]) -> Iterator[str]:
        """Return the text of ``generate`` in pieces, each as soon as it is certain; arguments and errors as there."""
        rows, sampling = [self.query_ids(query)], sampling_of(options)
        layers = check_room(self.lm, rows, self.kv, [0], self.injection, max_new_tokens)
        steps = generation.stream_tokens(self.lm, rows, row_names(rows), self.kv, layers, [0], max_new_tokens, sampling)
        return pieces_of((token for (token,) in steps if token is not None), self.lm.tokenizer)

    def query_ids(self, query: str | None = None) -> tuple[int, ...]:
        """Return the tokens of a query as it follows the demo; None for the prefix's own. Raises DataError: it cannot."""
        if query is None or query == self.query:
            return self.sample.query_token_ids
        return query_tokens(self.lm, self.sample, query)

    def cache(self) -> PrefixCache:
        """Return a fresh cache with this prefix, its mask, and the position of the query's first token.

        Raises:
            ConfigError: only some layers see the prefix, which no mask can say.
        """
        return cache_of(self.lm, self.kv, self.injection)

    def inputs(self, query: str | list[str] | None = None) -> dict[str, Any]:
        """Return the arguments of a pass of the transformers model over this prefix and a query, or several.

        For ``lm.model(**prefix.inputs())`` and ``lm.model.generate(**prefix.inputs(), max_new_tokens=20)``; each call needs
        fresh ones. ``generate`` follows the checkpoint's generation settings wherever it is not told otherwise.

        Returns:
            input_ids (B, Q), left-padded; attention_mask (B, V + Q); position_ids (B, Q) from ``query_start`` on; the cache, by
            the name that this model takes it by (``cache``, before transformers 5.24 ``past_key_values``).

        Raises:
            ConfigError: as ``cache``.
            DataError, ModelError: as ``logprobs``.
        """
        texts = [query] if query is None or isinstance(query, str) else list(query)
        return inputs_of(self.lm, [self.query_ids(text) for text in texts], self.kv.rows([0] * len(texts)), self.injection)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prefix as safetensors: keys and values, and as metadata what this object says and which model made it."""
        details = {
            "episode": asdict(self.sample.episode),
            "selection": asdict(self.selection),
            "scores": self.scores.tolist(),
            "scores_of": self.scores_of,
            "injection": self.injection,
        }
        save_prefix(self.kv, [self.placement], prefix_fingerprint(self.lm), Path(path), details)

    @classmethod
    def load(cls, lm: LanguageModel, path: Path) -> SelectedPrefix:
        """Return the prefix that ``save`` wrote; see ``load_prefix``."""
        kv, placements, details = load_with_details(path, prefix_fingerprint(lm), lm.device)
        if not details:
            raise DataError(f"{path} holds a prefix without its demo and query: it was not written by SelectedPrefix.save")
        if lm.meta["device_map"]:  # every layer's keys and values belong where the layer is
            probe = prefill(lm, [[0]], [[0]], ["probe"])
            kv = kv.to_devices_of(KVPrefix(*probe, kv.visible.to(lm.device), kv.query_start.to(lm.device)))
        return cls(
            lm=lm,
            sample=retokenize(lm, _EPISODE.validate_python(details["episode"])),
            selection=_SELECTION.validate_python(details["selection"]),
            placement=placements[0],
            scores=np.asarray(details["scores"]),
            scores_of=details["scores_of"],
            injection=details["injection"],
            kv=kv,
        )


_EPISODE, _SELECTION = TypeAdapter(OnEpisode), TypeAdapter(Selection)


class PrefixBatch(Sequence[SelectedPrefix]):
    """The prefixes that were selected for several queries about one demo, in the order of the queries."""

    def __init__(self, prefixes: Sequence[SelectedPrefix], kv: KVPrefix) -> None:
        """Create the batch; ``kv`` has the prefixes' keys and values in its rows."""
        self._prefixes, self.kv, self.lm = tuple(prefixes), kv, prefixes[0].lm
        self._injection = prefixes[0].injection

    def __len__(self) -> int:
        return len(self._prefixes)

    @overload
    def __getitem__(self, index: int) -> SelectedPrefix: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[SelectedPrefix, ...]: ...

    def __getitem__(self, index: int | slice) -> SelectedPrefix | tuple[SelectedPrefix, ...]:
        return self._prefixes[index]

    def __repr__(self) -> str:
        return f"<{len(self)} prefixes of a demo of {len(self[0].sample.demo_token_ids)} tokens>"

    def logprobs(self) -> torch.Tensor:
        """Return the log-probabilities of the token after each query under its prefix, (B, vocabulary) in nats.

        Raises:
            NumericsError: a logit is not finite.
        """
        return logprobs_after(self.lm, self._rows(), self.kv, range(len(self)), self._injection)

    def generate(self, max_new_tokens: int = 20, **options: Unpack[SamplingOptions]) -> list[str]:
        """Return the text that follows each query under its prefix; arguments and errors as ``SelectedPrefix.generate``."""
        sampling = sampling_of(options)
        return texts_after(self.lm, self._rows(), self.kv, range(len(self)), self._injection, max_new_tokens, sampling)

    def cache(self) -> PrefixCache:
        """Return a fresh cache with all prefixes, one a row; see ``SelectedPrefix.cache``."""
        return cache_of(self.lm, self.kv, self._injection)

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of a pass over every prefix and its query; see ``SelectedPrefix.inputs``."""
        return inputs_of(self.lm, self._rows(), self.kv, self._injection)

    def _rows(self) -> list[tuple[int, ...]]:
        return [prefix.sample.query_token_ids for prefix in self]
