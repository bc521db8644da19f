"""How good a sample's selection and the selector's scores are, beside accuracy and KL: gold coverage, LDS, comprehensiveness.

LDS and comprehensiveness hide demo tokens from the query: their slots of the demo's cache are masked out. Demo tokens that
come later had seen them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cedkv.config.extensions import SELECTORS
from cedkv.config.schema import Phase2Config
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, OnSample, Selection, Span
from cedkv.inference.ablation import answer_odds, greedy_tokens
from cedkv.inference.batch import Announce, Batch
from cedkv.inference.forward import next_token_logprobs
from cedkv.inference.passes import mass_rows, token_scores
from cedkv.kv.readings import RowAttention
from cedkv.kv.transfers import download, index_on
from cedkv.metrics_phase2 import spearman
from cedkv.selectors.base import (
    SelectionTask,
    create,
    cut_into_pieces,
    selector_class,
    token_worth,
    visible_tokens,
)


@dataclass(frozen=True)
class MaskedAnswers:
    """What the teacher answers to one sample under M random span masks.

    The demo is cut into consecutive pieces of ``select.span_len`` tokens after BOS, each visible with probability 0.5.

    visible: (M, pieces) bool.
    token_id: the teacher's greedy token without a mask.
    log_odds: (M,) log p / (1 - p) of this token.
    """

    visible: NDArray[np.bool_]
    token_id: int
    log_odds: NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """One sample's selection and scores, judged; None where a number is not defined or was not asked for.

    worth: (L,) the selector's score of each demo token (``Selector.worth``).
    gold_coverage: share of the gold tokens that are kept.
    lds: rank correlation of the sum of the visible tokens' scores with the teacher's answer under ``masked``.
    comprehensiveness: fall of the log-probability of the answer's first token when the selected spans are hidden from the
        teacher, in nats.
    """

    worth: NDArray[np.float64] | None = None
    gold_coverage: float | None = None
    masked: MaskedAnswers | None = None
    lds: float | None = None
    comprehensiveness: float | None = None


def judge(
    batch: Batch, config: Phase2Config, evidences: Sequence[Evidence], selections: Sequence[Selection], announce: Announce
) -> list[Quality]:
    """Judge the select arm of every sample; with ``eval.lds_masks`` also by masks of the demo.

    What is kept under a selector that uses partners is of another demo: its selection is not judged, nor are its scores.

    Args:
        selections: what is in front of each sample's query.

    Raises:
        ConfigError: a selector's ``worth`` is not one finite score per demo token.
    """
    worths = [_worth(config, sample, evidence) for sample, evidence in zip(batch.samples, evidences, strict=True)]
    if selector_class(config.select.mode).uses_partner:
        return [Quality(worth) for worth in worths]
    coverages = [gold_coverage(s, selection) for s, selection in zip(batch.samples, selections, strict=True)]
    if not uses_masks(config):
        return [Quality(worth, coverage) for worth, coverage in zip(worths, coverages, strict=True)]
    masked = masked_answers(batch, config, announce)
    falls = comprehensiveness(batch, [selection.spans for selection in selections], announce)
    return [
        Quality(worth, coverage, answers, lds(worth, answers, sample, config.select.span_len), fall)
        for sample, worth, coverage, answers, fall in zip(batch.samples, worths, coverages, masked, falls, strict=True)
    ]


def uses_masks(config: Phase2Config) -> bool:
    """Return whether LDS and comprehensiveness are measured under a configuration, for which the demos' caches are kept."""
    return config.eval.n_lds_masks > 0 and not selector_class(config.select.mode).uses_partner


def masks_key(config: Phase2Config) -> tuple[int, int, int]:
    """Return what the masks depend on beside the sample: their number, the length of a piece, the seed."""
    return config.eval.n_lds_masks, config.select.span_len, config.seed


def judging_evaluations(configs: Sequence[Phase2Config], n: int) -> int:
    """Return how many evaluations judging ``n`` samples takes: masks that configurations share count once."""
    judged = [config for config in configs if uses_masks(config)]
    return n * (len(judged) + sum(masks for masks, *_ in {masks_key(config) for config in judged}))


def _worth(config: Phase2Config, sample: OnSample, evidence: Evidence) -> NDArray[np.float64] | None:
    """Return what the configured selector holds a sample's tokens to be worth, by the draws that its choice was made with."""
    rng = rng_for(config.seed, "select", 0, sample.sample_id)
    with SELECTORS.errors_named(config.select.mode, f"sample {sample.sample_id}"):
        return token_worth(create(config.select), SelectionTask(config.select, sample.token_kinds, evidence, rng))


def gold_coverage(sample: OnSample, selection: Selection) -> float | None:
    """Return the share of a sample's gold tokens that are kept; None where it does not say which they are."""
    if sample.gold_tokens is None:
        return None
    start, end = sample.gold_tokens
    return len(set(range(start, end)).intersection(selection.kept_tokens)) / (end - start)


def masked_answers(batch: Batch, config: Phase2Config, announce: Announce) -> list[MaskedAnswers]:
    """Return every sample's answers under its masks; conditions with one ``span_len`` share them."""
    n, span_len, seed = key = masks_key(config)

    def compute() -> list[MaskedAnswers]:
        announce("LDS masks", n * len(batch.samples))
        return [_masked_answers(batch, row, n, span_len, seed) for row in range(len(batch.samples))]

    return batch.cached(("masked answers", *key), compute)


def _masked_answers(batch: Batch, row: int, n: int, span_len: int, seed: int) -> MaskedAnswers:
    sample = batch.samples[row]
    pieces = int(cut_into_pieces(sample.token_kinds, span_len).max()) + 1
    visible = rng_for(seed, "lds", 0, sample.sample_id).random((n, pieces)) < 0.5
    distinct, place = np.unique(visible, axis=0, return_inverse=True)  # a short demo has fewer masks than are drawn
    log_odds = answer_odds(batch, row)(visible_tokens(distinct, sample.token_kinds, span_len))[place.reshape(-1)]
    return MaskedAnswers(visible, greedy_tokens(batch)[row], log_odds)


def lds(worth: NDArray[np.float64] | None, answers: MaskedAnswers, sample: OnSample, span_len: int) -> float | None:
    """Return the linear datamodelling score (Park et al. 2023, arXiv 2303.14186; of contexts ContextCite, 2409.00729).

    Spearman's rank correlation over the masks between the sum of the visible tokens' scores and the log-odds of the first
    token of the teacher's answer. As in the score of a span, the demo's first token, an attention sink, does not count.

    Returns:
        From -1 to 1; None where the selector ranks no tokens, or a side is constant.
    """
    if worth is None:
        return None
    visible = visible_tokens(answers.visible, sample.token_kinds, span_len)[:, 1:]
    sums = [math.fsum(worth[1:][mask]) for mask in visible]  # exact: masks with the same scores must be tied
    return spearman(sums, answers.log_odds.tolist())


def comprehensiveness(batch: Batch, spans: Sequence[tuple[Span, ...]], announce: Announce) -> list[float]:
    """Return log p_teacher(answer) - log p_teacher without the spans(answer) of every sample, in nats.

    ERASER (DeYoung et al. 2020, arXiv 1911.03429). The spans' tokens are hidden; BOS and sinks outside them are not. Of an
    answer of several tokens it is the first one's: what the query reads out of the demo, before any of the answer is given.

    Args:
        spans: of each sample; those that were hidden before, under another condition, are not hidden again.
    """
    announce("comprehensiveness", len(spans))
    known: dict[Any, float] = batch.cached("comprehensiveness", dict)
    keys = [(row, tuple((span.start, span.end) for span in chosen)) for row, chosen in enumerate(spans)]
    new = [key for key in keys if key not in known]
    if new:
        rows = [row for row, _ in new]
        answers = index_on([batch.samples[row].answer_token_id for row in rows], batch.teacher.logprobs.device)
        hidden = batch.teacher.demo_prefixes(rows).hide([chosen for _, chosen in new])
        queries, names = [batch.samples[row].query_token_ids for row in rows], [batch.names[row] for row in rows]
        without = next_token_logprobs(batch.lm, queries, names, hidden)
        whole = batch.teacher.logprobs[index_on(rows, answers.device)]
        falls = whole.gather(1, answers[:, None]) - without.gather(1, answers[:, None])
        known.update(zip(new, falls[:, 0].tolist(), strict=True))
    return [known[key] for key in keys]


@dataclass(frozen=True)
class GoldMass:
    """How much attention a batch's queries pay to gold tokens, by layer and head.

    rows: which query rows, and how they are pooled (mean). layers: numbers of the layers in the model, ascending.
    total: (layers, H) sum over ``n`` samples of the attention to all gold tokens.
    """

    rows: RowAttention
    layers: tuple[int, ...]
    total: torch.Tensor
    n: int


def gold_mass(batch: Batch, config: Phase2Config) -> GoldMass | None:
    """Return how much attention the query rows that a configuration reads pay to gold tokens, in every layer.

    None where its selector's score does not read the sample's own query, or where no sample says which its gold tokens are.
    """
    rows = mass_rows(token_scores(config)[1].reading)
    with_gold = [row for row, sample in enumerate(batch.samples) if sample.gold_tokens is not None]
    if rows is None or not with_gold:
        return None
    layers = batch.lm.selection_layers("all")

    def compute() -> torch.Tensor:
        masses = [batch.teacher.map(rows, row, layers)[:, :, slice(*batch.samples[row].gold_tokens or ())] for row in with_gold]
        return torch.stack([mass.double().sum(dim=2) for mass in download(masses)]).sum(dim=0)

    return GoldMass(rows, tuple(sorted(layers)), batch.cached(("gold mass", rows, layers), compute), len(with_gold))
