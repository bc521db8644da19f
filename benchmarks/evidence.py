"""Which score to use: candidates on real models and on seeds that nothing was tuned on, the table of docs/evidence.md.

    python -m benchmarks.evidence smollm2-135m ./second-model --seeds 9001,9002,9003 --samples 64

Accuracy is that of the select arm at the budget of ``configs/phase2.yaml``; every candidate has the same samples. p values are
McNemar's, two-sided and exact, over the samples of all seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

from cedkv.analysis.paired import mcnemar
from cedkv.checks.certificate import measurements_folder
from cedkv.config.resolve import resolve, resolve_over
from cedkv.config.schema import Phase2Config
from cedkv.inference.distributions import kl
from cedkv.inference.evidence import read_batch
from cedkv.inference.head_weights import ensure_head_weights
from cedkv.inference.student import Students
from cedkv.models import loading, opening
from cedkv.models.fingerprint import fingerprint
from cedkv.tasks.load import load_samples
from cedkv.tasks.texts import read_sample_texts

MAX = {"select.row_pooling": "max", "select.head_pooling": "max", "select.layer_pooling": "max"}
STRONG = {**MAX, "layer_scope.selection": "mid33", "select.value_weighting": "output_norm"}
LAST_TOKEN = {"select.query_window": "1", **dict.fromkeys(MAX, "mean")}
CANDIDATES: dict[str, Mapping[str, str]] = {
    "recommended": {},
    "default": {},
    "last token, mean": LAST_TOKEN,
    "whole query, mean": dict.fromkeys(MAX, "mean"),
    "whole query, mean, all layers": {**dict.fromkeys(MAX, "mean"), "layer_scope.selection": "all"},
    "value-weighted, mean, all layers": {
        **dict.fromkeys(MAX, "mean"), "layer_scope.selection": "all", "select.mode": "value_weighted_attention",
    },
    "max, mid33, value-weighted": STRONG,
    "max, mid33, value-weighted, min_lead 0.5": {**STRONG, "select.params": "{min_lead: 0.5}"},
    "whole shots, max, mid33, value-weighted": {**STRONG, "select.mode": "whole_shots"},
    "calibrated, mean, mid33": {
        **dict.fromkeys(MAX, "mean"), "layer_scope.selection": "mid33", "select.mode": "calibrated_attention",
    },
    "snapkv": {"select.mode": "snapkv"},
    "tova": {"select.mode": "tova"},
    "span_drop, mid33": {"select.mode": "span_drop", "layer_scope.selection": "mid33"},
    "fitted_heads": {**dict.fromkeys(MAX, "mean"), "select.mode": "fitted_heads"},
    "context_cite": {"select.mode": "context_cite"},
    "causal_drop_span": {"select.mode": "causal_drop_span"},
    "entropy_gated_chunks, max, mid33": {**STRONG, "select.mode": "entropy_gated_chunks"},
    "replay": {"select.mode": "replay"},
    "expected_attention": {"select.mode": "expected_attention"},
    "key_norm": {"select.mode": "key_norm"},
    "key_difference": {"select.mode": "key_difference"},
    "lagkv": {"select.mode": "lagkv"},
    "random_span": {"select.mode": "random_span"},
    "oracle_span": {"select.mode": "oracle_span"},
}  # fmt: skip
"""Name -> settings over ``configs/phase2.yaml``; ``recommended`` is ``configs/recommended.yaml``."""
BATCH = 16


@dataclass
class Found:
    """What a candidate did: per sample right, KL to the teacher, tokens kept."""

    right: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


def measure(model: str, seeds: Sequence[int], samples: int, names: Sequence[str]) -> tuple[dict[str, Found], list[bool]]:
    """Return what each candidate did on a model, and whether the teacher was right, over the samples of all seeds."""
    found, teacher = {name: Found() for name in names}, list[bool]()
    root = Path(__file__).parents[1] / "configs"
    overrides = [f"model.id={model}", f"eval.on_samples={samples}", "eval.off_samples=1"]
    spec = opening.open_spec(resolve(root / "phase2.yaml", overrides))
    lm = loading.load(resolve(root / "phase2.yaml", overrides), spec)
    for seed in seeds:
        plain = resolve(root / "phase2.yaml", [*overrides, f"seed={seed}"])
        recommended = resolve(root / "recommended.yaml", [*overrides, f"seed={seed}"])
        configs = [recommended if name == "recommended" else resolve_over(plain, CANDIDATES[name]) for name in names]
        texts = read_sample_texts(plain)
        loaded = load_samples(plain, spec.tokenizer, spec.capabilities.max_positions, spec.vocabulary, texts).on
        ensure_head_weights(lm, configs, fingerprint(lm), measurements_folder(plain.model.cache_dir, "head_weights"))
        for start in tqdm(range(0, len(loaded), BATCH), desc=f"{Path(model).name}, seed {seed}"):
            _answer(lm, configs, list(loaded[start : start + BATCH]), list(found.values()), teacher)
    return found, teacher


def _answer(lm: Any, configs: Sequence[Phase2Config], some: list[Any], found: Sequence[Found], teacher: list[bool]) -> None:
    batch = read_batch(lm, configs, some, None, lambda *_: None)
    teacher += batch.teacher_answers.correct.tolist()
    students = Students(batch, configs)
    for index in students.order:
        choice, own = students.chosen[index].select, found[index]
        answered = students.answer(students.select(choice))
        own.right += answered.correct.tolist()
        own.kl += kl(answered.logprobs, batch.teacher.logprobs).tolist()
        own.kept += [len(placement.kept_tokens) for placement in choice.placements]


def table(found: Mapping[str, Found], teacher: Sequence[bool], reference: str) -> list[str]:
    """Return the rows of a Markdown table, the most accurate first; p is against random spans and against ``reference``."""
    lines = [
        f"teacher {np.mean(teacher):.3f}, n = {len(teacher)}",
        "",
        f"| candidate | accuracy | 95 % | KL to teacher | tokens kept | p, random | p, {reference} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, own in sorted(found.items(), key=lambda item: -np.mean(item[1].right)):
        low, high = binomtest(sum(own.right), len(own.right)).proportion_ci(method="wilson")
        p = [
            _p(own.right, found[other].right) if other in found and other != name else "–"
            for other in ("random_span", reference)
        ]
        figures = f"{np.mean(own.right):.3f} | {low:.2f}–{high:.2f} | {np.mean(own.kl):.2f} | {np.mean(own.kept):.1f}"
        lines.append(f"| {name} | {figures} | {p[0]} | {p[1]} |")
    return lines


def _p(left: Sequence[bool], right: Sequence[bool]) -> str:
    p = mcnemar(left, right)
    return f"{p:.1g}" if p < 0.1 else f"{p:.2f}"


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--seeds", default="9001,9002,9003", show_default=True, help="Seeds of the samples.")
@click.option("--samples", default=64, show_default=True, help="Samples per seed.")
@click.option("--only", help="Names of candidates, separated by semicolons; all where left out.")
def main(models: tuple[str, ...], seeds: str, samples: int, only: str | None) -> None:
    """Print a table of candidates for each model."""
    names = list(CANDIDATES) if only is None else only.split(";")
    unknown = sorted(set(names) - CANDIDATES.keys())
    if unknown:
        raise click.BadParameter(f"no candidate is named {unknown[0]!r}; they are {'; '.join(CANDIDATES)}")
    for model in models:
        found, teacher = measure(model, [int(seed) for seed in seeds.split(",")], samples, names)
        click.echo("\n".join(["", Path(model).name, *table(found, teacher, "last token, mean")]))


if __name__ == "__main__":
    main()
