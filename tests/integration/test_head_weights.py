"""Fitted heads: fitted once for a model, on episodes that are not evaluated, as a ridge regression without the library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cedkv.checks.certificate import FOLDER
from cedkv.core.errors import DataError, NumericsError
from cedkv.core.seeding import rng_for
from cedkv.inference import head_weights
from cedkv.inference.evidence import head_weights_key
from cedkv.inference.head_weights import EPISODES, FIT_SEED, ensure_head_weights, held_out_samples
from cedkv.runs.manifest import find_resumable
from cedkv.tasks.load import load_samples
from tests.support import eager, tiny
from tests.support import patch_points as points
from tests.support.crashing import left_by, the_run
from tests.support.eager import Eager
from tests.support.runs import run_phase2

FITTED = "select.mode=fitted_heads"


@pytest.fixture
def fits(small_fits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs in folders of their own, and how many episodes each fit had."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "kept"))
    points.without_mlflow(monkeypatch)
    counted: list[int] = []

    def fit(real: Any, lm: Any, configs: Any, samples: Any, *rest: Any) -> Any:
        counted.append(len(samples))
        return real(lm, configs, samples, *rest)

    points.FIT_HEADS.wrap(monkeypatch, fit)
    return counted


def run_in(folder: Path, patch: pytest.MonkeyPatch, *overrides: str, model: Path) -> dict[str, str]:
    """The files of a run in a folder of its own."""
    folder.mkdir()
    patch.chdir(folder)
    run_phase2(tiny.config(model, FITTED, *overrides))
    return left_by(the_run())


def stored(tmp_path: Path) -> dict[str, bytes]:
    """Everything that is kept for models, by name."""
    return {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}


def test_fitted_once_and_loaded_the_next_time(
    llama_folder: Path, tmp_path: Path, fits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_in(tmp_path / "first", monkeypatch, model=llama_folder)
    kept = stored(tmp_path)
    second = run_in(tmp_path / "second", monkeypatch, model=llama_folder)
    assert fits == [head_weights.EPISODES]
    assert stored(tmp_path) == kept
    assert len(kept) == 2, "the certificate and the weights"
    (weights,) = json.loads(first["artifacts/head_weights.json"])["fitted"]
    assert any(json.loads(content) == weights for content in kept.values())
    assert np.shape(weights["weights"]) == (4, 4)
    assert (weights["episodes"], weights["source"]) == (head_weights.EPISODES, f"symbol_lookup(pairs=4, seed={FIT_SEED})")
    assert np.count_nonzero(weights["weights"]) == 16
    assert second["metrics.jsonl"] == first["metrics.jsonl"]
    assert second["artifacts/head_weights.json"] == first["artifacts/head_weights.json"]
    run_in(tmp_path / "third", monkeypatch, "select.row_pooling=mean", model=llama_folder)
    assert fits == [head_weights.EPISODES] * 2, "another reading has weights of its own"
    assert kept.items() < stored(tmp_path).items()


def test_weights_that_cannot_be_read_are_fitted_again(
    llama_folder: Path, tmp_path: Path, fits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_in(tmp_path / "first", monkeypatch, model=llama_folder)
    (path,) = [path for path in (tmp_path / "kept").iterdir() if b"agreement" in path.read_bytes()]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    second = run_in(tmp_path / "second", monkeypatch, model=llama_folder)
    assert len(fits) == 2
    assert path.read_bytes() == whole
    assert second["artifacts/head_weights.json"] == first["artifacts/head_weights.json"]


@pytest.mark.parametrize("seed", [42, FIT_SEED, FIT_SEED - 1])
def test_held_out_episodes_are_none_of_the_run(llama_folder: Path, seed: int) -> None:
    """Also where the run has the seed that they usually have."""
    config, lm = tiny.load(llama_folder, FITTED, f"seed={seed}", "eval.on_samples=60")
    samples, _ = held_out_samples(lm, [config])
    own = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary).on
    assert (len(samples), len(own)) == (EPISODES, 60)
    for name in ("sample_id", "demo_token_ids"):
        assert {getattr(sample, name) for sample in samples}.isdisjoint(getattr(sample, name) for sample in own)


def lines(n: int, path: Path) -> str:
    """A file of samples, each with a demo of its own."""
    words = [f"w{i}" for i in range(n)]
    rows = [
        {"demo_text": f"Word: {word}\nSymbol: red\n\nWord: other{word}\nSymbol: blue\n\n",
         "query_text": f"Word: {word}\nSymbol:", "answer_text": " red", "id": word}
        for word in words
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.on_path={path}"


def test_lines_of_a_file_that_are_not_evaluated(
    llama_folder: Path, tmp_path: Path, fits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = head_weights.EPISODES
    on = lines(6 + episodes, tmp_path / "on.jsonl")
    config, lm = tiny.load(llama_folder, FITTED, on)
    samples, source = held_out_samples(lm, [config])
    assert [sample.sample_id for sample in samples] == [f"w{i}" for i in range(6, 6 + episodes)]
    assert source == str(tmp_path / "on.jsonl")
    files = run_in(tmp_path / "run", monkeypatch, on, model=llama_folder)
    assert json.loads(files["artifacts/head_weights.json"])["fitted"][0]["source"] == source


def test_a_file_with_too_few_lines_says_how_many_before_weights_are_loaded(
    llama_folder: Path, tmp_path: Path, fits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_weights, "EPISODES", EPISODES)
    on = lines(30, tmp_path / "on.jsonl")
    model = shutil.copytree(llama_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(
        DataError, match=rf"30 samples, of which 6 are evaluated.*on {EPISODES} others; add {6 + EPISODES - 30}"
    ):
        run_in(tmp_path / "run", monkeypatch, on, model=model)
    assert fits == []


def test_a_resumed_run_is_the_same(
    llama_folder: Path, tmp_path: Path, fits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after its first unit, and before anything is fitted."""
    undisturbed = run_in(tmp_path / "undisturbed", monkeypatch, model=llama_folder)
    for name, where in (("after a unit", points.JOURNAL_APPEND), ("before the fit", points.FIT_HEADS)):
        if where is points.FIT_HEADS:
            next(path for path in (tmp_path / "kept").iterdir() if b"agreement" in path.read_bytes()).unlink()
        with pytest.MonkeyPatch.context() as patch:

            def broken(real: Any, *given: Any, _where: Any = where) -> Any:
                if _where is points.JOURNAL_APPEND:
                    real(*given)
                raise NumericsError("planted")

            where.wrap(patch, broken)
            with pytest.raises(NumericsError, match="planted"):
                run_in(tmp_path / name, monkeypatch, model=llama_folder)
        run_id = the_run()
        run_phase2(tiny.config(llama_folder, FITTED), resumed=find_resumable(run_id))
        assert left_by(run_id) == undisturbed


def test_weights_are_those_of_a_ridge_in_numpy(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and answers by eager transformers, one mask at a time; the regression by its normal equations."""
    n, masks = 6, 12
    monkeypatch.setattr(head_weights, "EPISODES", n)
    monkeypatch.setattr(head_weights, "MASKS", masks)
    config, lm = tiny.load(llama_folder, FITTED)
    (found,) = ensure_head_weights(lm, [config], {}, tmp_path)
    assert found.alpha in head_weights.ALPHAS
    plain, features, targets = Eager(llama_folder), [], []
    for sample in held_out_samples(lm, [config])[0]:
        demo, whole = range(len(sample.demo_token_ids)), sample.teacher_ids
        query = range(len(demo), len(whole))
        heads = torch.stack([eager.rows(layer, demo, query, None, "max") for layer in plain.read(whole)])
        per_head = heads.reshape(16, -1).double().numpy()
        answer = int(plain.logprobs(whole).argmax())
        pieces = [list(demo)[start : start + 8] for start in range(0, len(demo), 8)]
        drawn = rng_for(0, "head_weights", 0, sample.sample_id).random((masks, len(pieces))) < 0.5
        sums, odds = np.zeros((masks, 16)), np.zeros(masks)
        for i, mask in enumerate(drawn):
            visible = [token for piece, shown in zip(pieces, mask, strict=True) if shown for token in piece]
            sums[i] = per_head[:, [token for token in visible if token > 0]].sum(axis=1)
            p = np.exp(plain.logprobs(whole, sorted(set(demo) - set(visible)), len(demo)))
            odds[i] = np.log(p[answer] / np.delete(p, answer).sum())
        features.append(sums - sums.mean(axis=0))
        targets.append(odds - odds.mean())
    x, y = np.concatenate(features), np.concatenate(targets)
    scale = x.std(axis=0)
    x = x / scale
    weights = np.linalg.solve(x.T @ x + found.alpha * np.eye(16), x.T @ y) / scale
    assert found.weights == pytest.approx(weights.reshape(4, 4), rel=1e-3, abs=1e-3 * abs(weights).max())
    (score,) = head_weights.fitted_scores([config])
    assert lm.measured[head_weights_key(score.reading)].numpy() == pytest.approx(np.array(found.weights), rel=1e-6)
