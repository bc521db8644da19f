"""A tiny model here and as transformers has it, with samples whose evidence is computed both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cedkv.config.schema import Phase2Config
from cedkv.core.values import OnSample
from cedkv.inference.batch import Batch
from cedkv.inference.evidence import head_weights_key, read_batch
from cedkv.inference.head_weights import fitted_scores
from cedkv.models.loading import LanguageModel
from cedkv.tasks.load import load_samples
from tests.support import tiny
from tests.support.eager import Eager

SMALL = ("data.pairs=3", "select.span_len=4", "select.span_budget=4", "select.min_span_distance=3", "prefix_len=100")


@dataclass(frozen=True)
class Case:
    """A model, here and as transformers has it, and samples of different lengths."""

    folder: Path
    lm: LanguageModel
    plain: Eager
    samples: list[OnSample]

    def config(self, *overrides: str) -> Phase2Config:
        return tiny.config(self.folder, *SMALL, *overrides)

    def batch(self, config: Phase2Config, samples: Sequence[OnSample] | None = None) -> Batch:
        return read_batch(self.lm, [config], list(samples or self.samples), None, lambda *_: None)

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.lm.tokenizer(text, add_special_tokens=False).input_ids)


def make_case(folder: Path, bos: bool) -> Case:
    """The embedding of token 0, with which rows are padded, is zero; heads have any weights, in place of fitted ones."""
    folder = tiny.save(folder, bos=bos, pad_token_id=0, bos_token_id=2)
    config, lm = tiny.load(folder, *SMALL)
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary).on[:3]
    assert len({len(sample.demo_token_ids) for sample in samples}) > 1
    assert (lm.model.get_input_embeddings().weight[0] == 0).all()
    for score in fitted_scores([tiny.config(folder, "select.mode=fitted_heads")]):
        lm.measured[head_weights_key(score.reading)] = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    return Case(folder, lm, Eager(folder), samples)
