"""A prefix on disk: the same to the bit, for the same model alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cedkv.core.errors import DataError
from cedkv.inference.prefix_store import save_prefix
from cedkv.library.models import load_model
from cedkv.library.selecting import load_prefix
from cedkv.models.fingerprint import prefix_fingerprint
from cedkv.models.loading import LanguageModel
from tests.support import tiny
from tests.unit.library.conftest import ANSWERS, QUERIES, select


@pytest.mark.parametrize("padding", ["null_pad", "shrink_to_selected"])
def test_what_is_loaded_is_what_was_saved(lm: LanguageModel, tmp_path: Path, padding: str) -> None:
    """Also of one of many, and with injected layers, which only generation knows of."""
    for number, prefix in enumerate(select(lm, QUERIES, padding_mode=padding, answers=ANSWERS, injection_layers="top50")):
        path = tmp_path / f"{number}.safetensors"
        prefix.save(path)
        loaded = load_prefix(lm, path)
        for one, other in zip((*prefix.kv.keys, *prefix.kv.values), (*loaded.kv.keys, *loaded.kv.values), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(loaded.logprobs(), prefix.logprobs())
        assert loaded.generate(QUERIES) == prefix.generate(QUERIES)
        assert (loaded.sample, loaded.selection, loaded.placement) == (prefix.sample, prefix.selection, prefix.placement)
        assert (loaded.spans, loaded.scores_of, loaded.injection) == (prefix.spans, prefix.scores_of, prefix.injection)
        assert loaded.scores.tolist() == prefix.scores.tolist()
        assert loaded.query == QUERIES[number]


def test_another_model_is_rejected_by_name(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "prefix.safetensors"
    select(lm).save(path)
    other = load_model(tiny.save(tmp_path / "other", seed=1), device="cpu")
    with pytest.raises(
        DataError, match=r"made by another model(.|\n)*model\.id: .* stored, .*other expected(.|\n)*model\.weights"
    ):
        load_prefix(other, path)
    coarse = load_model(lm.meta["model_id"], device="cpu", dtype="bfloat16")
    with pytest.raises(DataError, match="torch_dtype: float32 stored, bfloat16 expected"):
        load_prefix(coarse, path)


def test_other_files_are_rejected(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "prefix.safetensors"
    with pytest.raises(DataError, match="is not a stored prefix"):
        load_prefix(lm, path)
    prefix = select(lm)
    save_prefix(prefix.kv, [prefix.placement], prefix_fingerprint(lm), path)
    with pytest.raises(DataError, match="without its demo and query"):
        load_prefix(lm, path)
    prefix.save(path)
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="does not fit its sha256"):
        load_prefix(lm, str(path))
