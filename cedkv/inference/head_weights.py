"""Weights of attention heads, fitted against ablations on held-out episodes (AT2, Cohen-Wang et al. 2025, arXiv 2504.13752).

Under random span masks of a demo, the log-odds of the teacher's answer are predicted by sum_h w_h sum_j A_j^h over the
visible tokens j: ridge regression over episodes and masks, both sides centred per episode, strength by cross-validation over
episodes. The episodes are of a seed that the run does not use, or lines of the user's file that it does not evaluate. Weights
are kept beside the certificate under the digest of the model's identity and of these episodes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from cedkv.config.schema import Phase2Config
from cedkv.core.errors import DataError
from cedkv.core.files import write_shared_text
from cedkv.core.seeding import rng_for
from cedkv.core.values import OnSample
from cedkv.inference.ablation import answer_odds
from cedkv.inference.context_window import check_padded, load_fitting
from cedkv.inference.evidence import head_map, head_weights_key, read_batch
from cedkv.inference.passes import token_scores
from cedkv.kv.readings import TokenScore
from cedkv.models.loading import LanguageModel
from cedkv.models.opening import ModelSpec
from cedkv.tasks.context_use import teacher_use

EPISODES = 48
"""Held-out episodes to fit on."""
MASKS, PIECE = 32, 8
"""Random masks per episode, and tokens of the pieces that a mask hides or leaves."""
FIT_SEED = 2**31 - 1
ALPHAS = tuple(float(alpha) for alpha in np.logspace(-1, 5, 13))
BATCH = 16


@dataclass(frozen=True)
class HeadWeights:
    """Fitted weights.

    reading: what is weighed, as text. weights: layers x heads.
    agreement: correlation of predicted and real log-odds, centred per episode, of episodes left out of the fit.
    """

    reading: str
    source: str
    episodes: int
    masks: int
    alpha: float
    agreement: float
    weights: list[list[float]]


def fitted_scores(configs: Sequence[Phase2Config]) -> list[TokenScore]:
    """Return the scores of these configurations that need fitted weights, each once."""
    scores = dict.fromkeys(score for config in configs for score in token_scores(config) if score.heads == "fitted")
    return list(scores)


def ensure_head_weights(
    lm: LanguageModel, configs: Sequence[Phase2Config], identity: Mapping[str, Any], folder: Path
) -> list[HeadWeights]:
    """Load or fit the weights that these configurations need, and give them to the model.

    Args:
        identity: everything that the model's numbers depend on.
        folder: where fitted weights are kept.

    Raises:
        DataError: too few held-out episodes.
    """
    found = []
    needed = fitted_scores(configs)
    if not needed:
        return []
    samples, source = held_out_samples(lm, configs)
    for score in needed:
        path = folder / f"{_digest(identity, samples, score)[:32]}.json"
        fitted = _load(path)
        if fitted is None:
            rows = len(samples) * (1 + MASKS)
            click.echo(f"fitted_heads: fitting head weights on {len(samples)} held-out episodes, {rows:,} rows ...", err=True)
            fitted = fit(lm, configs, samples, source, score)
            write_shared_text(path, json.dumps(asdict(fitted), allow_nan=False) + "\n")
        found.append(fitted)
    use_head_weights(lm, configs, found)
    return found


def use_head_weights(lm: LanguageModel, configs: Sequence[Phase2Config], fitted: Sequence[HeadWeights]) -> None:
    """Give the model the weights that ``ensure_head_weights`` returned for these configurations, in place of any others."""
    for score, weights in zip(fitted_scores(configs), fitted, strict=True):
        lm.measured[head_weights_key(score.reading)] = torch.tensor(weights.weights)


def check_held_out(spec: ModelSpec, configs: Sequence[Phase2Config]) -> None:
    """Raise DataError, before weights are loaded, if there are too few episodes to fit head weights that are needed."""
    if fitted_scores(configs):
        held_out_samples(spec, configs)


def held_out_samples(model: LanguageModel | ModelSpec, configs: Sequence[Phase2Config]) -> tuple[list[OnSample], str]:
    """Return episodes that a run of these configurations does not evaluate, and where they come from.

    A generator gives those of another seed, a file the samples behind those that are evaluated.

    Raises:
        DataError: the user's file has too few samples beyond those that are evaluated.
        ModelError: a layer's window is shorter than a pass over these episodes.
    """
    config = configs[0]
    data, seed = config.data, config.seed
    if data.on_path is None:
        seed, evaluated = FIT_SEED + (seed == FIT_SEED), set[str]()
    else:
        evaluated = {sample.sample_id for sample in load_fitting(model, configs, "2").on}
    sizes = config.eval.model_copy(update={"on_samples": len(evaluated) + EPISODES, "off_samples": 1})
    update = {"seed": seed, "eval": sizes, "data": data.model_copy(update={"sample_ids": None})}
    samples = load_fitting(model, [config.model_copy(update=update)], "1.5")
    others = [sample for sample in samples.on if sample.sample_id not in evaluated][:EPISODES]
    if len(others) < EPISODES:
        raise DataError(
            f"{data.on_path or data.task}: {len(samples.on)} samples, of which {len(samples.on) - len(others)} are evaluated "
            f"(eval.on_samples, -P max_on), and fitted_heads fits its weights on {EPISODES} others; add "
            f"{EPISODES - len(others)}, or use another selector"
        )
    check_padded(model.capabilities, map(teacher_use, others))
    return others, samples.on_source


def fit(
    lm: LanguageModel, configs: Sequence[Phase2Config], samples: Sequence[OnSample], source: str, score: TokenScore
) -> HeadWeights:
    """Fit the weights of one reading's heads."""
    config = next(c for c in configs if score in token_scores(c))
    layers = lm.selection_layers("all")
    features, targets, groups = list[NDArray[np.float64]](), list[NDArray[np.float64]](), list[int]()
    for start in range(0, len(samples), BATCH):
        some = list(samples[start : start + BATCH])
        batch = read_batch(lm, [config], some, None, lambda *_: None, keep=range(len(some)))
        for row, sample in enumerate(some):
            masks = random_masks(sample, MASKS, PIECE)
            per_head = head_map(batch, score.reading, row, layers).flatten(0, 1).double().cpu().numpy()
            per_head[:, 0] = 0  # an attention sink
            odds = answer_odds(batch, row)(masks)
            sums = masks @ per_head.T
            features.append(sums - sums.mean(axis=0))
            targets.append(odds - odds.mean())
            groups += [start + row] * MASKS
    alpha, agreement, weights = _ridge(np.concatenate(features), np.concatenate(targets), groups)
    shaped = weights.reshape(len(layers), -1).tolist()
    return HeadWeights(repr(score.reading), source, len(samples), MASKS, alpha, agreement, shaped)


def random_masks(sample: OnSample, n: int, piece_len: int) -> NDArray[np.bool_]:
    """Return n random masks of a demo, (n, L), True = visible: each piece of ``piece_len`` tokens with probability 0.5."""
    first, length = int(sample.has_bos), len(sample.demo_token_ids)
    piece = (np.arange(first, length) - first) // piece_len
    visible = rng_for(0, "head_weights", 0, sample.sample_id).random((n, int(piece[-1]) + 1)) < 0.5
    masks = np.ones((n, length), dtype=bool)
    masks[:, first:] = visible[:, piece]
    return masks


def _ridge(
    features: NDArray[np.float64], targets: NDArray[np.float64], groups: Sequence[int]
) -> tuple[float, float, NDArray[np.float64]]:
    """Return strength, cross-validated correlation and weights of a ridge regression on standardised features."""
    from sklearn.linear_model import Ridge, RidgeCV  # takes a second to import, and few runs need it
    from sklearn.model_selection import GroupKFold, cross_val_predict

    scale = features.std(axis=0)
    scale[scale == 0] = 1.0
    folds = list(GroupKFold(min(8, len(set(groups)))).split(features, targets, groups))
    alpha = float(RidgeCV(alphas=ALPHAS, cv=folds, fit_intercept=False).fit(features / scale, targets).alpha_)
    model = Ridge(alpha=alpha, fit_intercept=False)
    predicted = cross_val_predict(model, features / scale, targets, cv=folds)
    agreement = float(np.corrcoef(predicted, targets)[0, 1]) if predicted.std() > 0 and targets.std() > 0 else 0.0
    return alpha, agreement, model.fit(features / scale, targets).coef_ / scale


def _digest(identity: Mapping[str, Any], samples: Sequence[OnSample], score: TokenScore) -> str:
    parts = [json.dumps(dict(identity), sort_keys=True, default=str), repr(score), repr((MASKS, PIECE, ALPHAS))]
    digest = hashlib.sha256()
    for part in [*parts, *map(repr, samples)]:
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()


def _load(path: Path) -> HeadWeights | None:
    """Return stored weights; None where there are none, or they cannot be read."""
    try:
        return HeadWeights(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
