"""How long a grid will take: the tokens and forward passes of all its units, by the speed of its own first passes.

Counting needs no model. The speed comes from passes that are made anyway (the first batch's teacher and base), so an
estimate costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cedkv import arms, selectors
from cedkv.config import Phase2Config
from cedkv.eval_phase2 import Condition, Unit
from cedkv.samples.load import Samples
from cedkv.selectors.common import candidates
from cedkv.types import OnSample


@dataclass(frozen=True)
class Work:
    """Tokens that go through the model, padding aside, and the forward passes they take."""

    tokens: int = 0
    passes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.passes + other.passes)

    def times(self, n: int) -> Work:
        """The same n times over."""
        return Work(self.tokens * n, self.passes * n)


def forward(lengths: Sequence[int], size: int) -> Work:
    """Rows of these lengths in batches of ``size``."""
    return Work(sum(lengths), math.ceil(len(lengths) / size))


def seconds(total: Work, teacher: tuple[Work, float], base: tuple[Work, float]) -> float:
    """``tokens x a + passes x b``, a and b from two measurements (what was done, seconds); neither is below 0."""
    (long, t_long), (short, t_short) = teacher, base
    most = t_long / long.tokens
    each = min(max((t_long - t_short) / (long.tokens - short.tokens), 0.0), most) if long.tokens > short.tokens else most
    fixed = max((t_short - each * short.tokens) / short.passes, 0.0)
    return total.tokens * each + total.passes * fixed


def first_passes(conditions: Sequence[Condition], unit: Unit, samples: Samples) -> tuple[Work, Work]:
    """The teacher's and base's work in a unit."""
    on, size = [samples.on[i] for i in unit.on], conditions[0].config.runtime.batch_size
    return forward([len(s.teacher_ids) for s in on], size), forward([len(s.base_ids) for s in on], size)


def work(conditions: Sequence[Condition], units: Sequence[Unit], samples: Samples) -> Work:
    """All units of a grid (phase 2)."""
    return sum((_unit(conditions, unit, samples) for unit in units), Work())


def _unit(conditions: Sequence[Condition], unit: Unit, samples: Samples) -> Work:
    configs = [condition.config for condition in conditions]
    size, on = configs[0].runtime.batch_size, [samples.on[i] for i in unit.on]
    teacher, base = first_passes(conditions, unit, samples)
    total = teacher + _drops(configs, on)
    if "other_attention" in arms.wanted(configs):
        total += forward([len(s.demo_token_ids) + len(s.other_query_ids or ()) for s in on], size)
    total += sum((_student(config, on) for config in configs), Work())
    if unit.repeat:
        return total
    off = [samples.off[j] for j in unit.off]
    total += base + forward([len(u.token_ids) for u in off], size)
    total += forward([len(u.student_ids) for u in off], size).times(len(configs))
    randoms = {arms.random_key(c, t): c for c in configs for t in range(c.eval.n_random_trials)}
    total += sum((_student(c, on, "random_span") for c in randoms.values()), Work())
    return total + _gate_a(configs, [samples.on[i] for i in unit.on if i < configs[0].eval.gate_a_samples])


def _student(config: Phase2Config, on: Sequence[OnSample], mode: str | None = None) -> Work:
    """Prefixes of a batch, and the answers under them."""
    answers = forward([len(s.query_token_ids) for s in on], config.runtime.batch_size)
    return answers + _prefill(config, on, config.runtime.batch_size, mode)


def _prefill(config: Phase2Config, on: Sequence[OnSample], size: int, mode: str | None = None) -> Work:
    """``gather`` runs nothing."""
    return forward([_kept(config, s, mode) for s in on], size) if config.prefix.kv_source == "prefill" else Work()


def _kept(config: Phase2Config, sample: OnSample, mode: str | None = None) -> int:
    """Tokens of a prefix, at most."""
    if selectors.is_unbounded(mode or config.select.mode):
        return len(sample.demo_token_ids)
    room = config.select.span_budget * config.select.span_len + config.select.keep_sink + int(sample.has_bos)
    return min(room, len(sample.demo_token_ids))


def _drops(configs: Sequence[Phase2Config], on: Sequence[OnSample]) -> Work:
    """The query once for every candidate span that is hidden."""
    asked = {
        (config.select.span_len, config.select.center_policy): config
        for config in configs
        if "causal_drop" in arms.wanted([config])
    }
    rows = [
        forward([len(s.query_token_ids)] * len(candidates(s.token_kinds, config.select)), config.runtime.batch_size)
        for config in asked.values()
        for s in on
    ]
    return sum(rows, Work())


def _gate_a(configs: Sequence[Phase2Config], on: Sequence[OnSample]) -> Work:
    """The checks of ``plumbing.py``: what conditions share, then each condition's own."""
    if not on:
        return Work()
    size = configs[0].runtime.batch_size
    queries = forward([len(s.query_token_ids) for s in on], size)
    teachers = forward([len(s.teacher_ids) for s in on], 1)
    shared = teachers.times(2) + Work(0, len(on))  # demo, then query; and each sample alone
    shared += queries.times(3) + forward([len(s.demo_token_ids) for s in on], size)  # null effect, every token kept
    total = shared
    for config in configs:
        total += queries.times(3) + forward([len(s.query_token_ids) for s in on], 1) + _prefill(config, on, 1)
        total += forward([_kept(config, s) for s in on], size).times(2)  # rotation
    return total


def duration(time: float) -> str:
    """``40 seconds``, ``25 minutes``, ``2.5 hours``."""
    if time < 90:
        return f"{max(time, 1):.0f} seconds"
    return f"{time / 60:.0f} minutes" if time < 5400 else f"{time / 3600:.1f} hours"
