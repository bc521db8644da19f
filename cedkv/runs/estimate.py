"""How long a grid will take: the tokens of all its units, by the speed of its own first pass.

Counting needs no model. The speed comes from the first batch's teacher, which is run anyway, so an estimate costs nothing;
passes are of one size, so that tokens are what time goes by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cedkv import selectors
from cedkv.checks.consistency import ROTATION_TOKENS
from cedkv.conditions import Condition
from cedkv.config.schema import Phase2Config
from cedkv.core.values import OffSample, OnSample
from cedkv.eval_phase2 import OFF_ALONE, Unit
from cedkv.inference import student
from cedkv.inference.forward import Ids, shared_head
from cedkv.selectors.base import candidates
from cedkv.tasks.load import Samples


def tokens(conditions: Sequence[Condition], units: Sequence[Unit], samples: Samples) -> int:
    """Tokens that go through the model in a grid (phase 2), padding aside; kept tokens are counted at their most."""
    return sum(_unit(conditions, unit, samples) for unit in units)


def teacher_tokens(unit: Unit, samples: Samples) -> int:
    """Those of the teacher's first pass over a unit, whose speed is taken for all."""
    return _all(samples.on[i].teacher_ids for i in unit.on)


def _unit(conditions: Sequence[Condition], unit: Unit, samples: Samples) -> int:
    configs, on = [condition.config for condition in conditions], [samples.on[i] for i in unit.on]
    reading = _all(s.teacher_ids for s in on)
    if "other_attention" in student.wanted(configs):
        reading += _all(s.other_query_ids or () for s in on)
    encoded = {(*_kept_by(c), c.select.model_dump_json(exclude={"causal_drop_advisory"})): c for c in configs}
    select = sum(_prefill(c, on) for c in encoded.values()) + len(configs) * _all(s.query_token_ids for s in on)
    off = [samples.off[j] for j in unit.off]
    owners = len({j % len(samples.on) for j in unit.off})
    alone, under = _run([u.token_ids for u in off], 1), _run([u.student_ids for u in off], owners)
    randoms = {student.random_key(c, t): c for c in configs for t in range(c.eval.n_random_trials)}
    random = sum(_prefill(c, on, "random_span") + _all(s.query_token_ids for s in on) for c in randoms.values())
    plumbed = [i for i in unit.on if i < configs[0].eval.gate_a_samples]
    probed = [samples.off[j] for i in plumbed[:OFF_ALONE] for j in [j for j in unit.off if j % len(samples.on) == i][:1]]
    gate_a = _gate_a(configs, [samples.on[i] for i in plumbed], probed)
    again = (configs[0].eval.repro_runs - 1) * (reading + select)
    base = _all(s.base_ids for s in on)
    return reading + base + alone + select + _drops(configs, on) + len(configs) * under + random + gate_a + again


def _all(rows: Iterable[Ids]) -> int:
    return sum(map(len, rows))


def _run(rows: Sequence[Ids], prefixes: int) -> int:
    """Rows under so many prefixes: what they all begin with goes through once for each prefix."""
    head = shared_head(rows, prefixes)
    return _all(rows) - head * (len(rows) - prefixes) if head else _all(rows)


def _kept_by(config: Phase2Config) -> tuple[str, ...]:
    """Beside the selector, what the K/V of kept tokens depend on."""
    return config.prefix.kv_source, config.injection.positioning_mode, str(config.layer_scope.selection)


def _prefill(config: Phase2Config, on: Sequence[OnSample], mode: str | None = None) -> int:
    """Tokens that are run for a batch's prefixes, at most; ``gather`` runs none."""
    return 0 if config.prefix.kv_source == "gather" else _kept(config, on, mode)


def _kept(config: Phase2Config, on: Sequence[OnSample], mode: str | None = None) -> int:
    if selectors.is_unbounded(mode or config.select.mode):
        return _all(s.demo_token_ids for s in on)
    room = config.select.span_budget * config.select.span_len + config.select.keep_sink
    return sum(min(room + int(s.has_bos), len(s.demo_token_ids)) for s in on)


def _drops(configs: Sequence[Phase2Config], on: Sequence[OnSample]) -> int:
    """The query once for every candidate span that is hidden."""
    asked = {(c.select.span_len, c.select.center_policy): c for c in configs if "causal_drop" in student.wanted([c])}
    return sum(len(s.query_token_ids) * len(candidates(s.token_kinds, c.select)) for c in asked.values() for s in on)


def _gate_a(configs: Sequence[Phase2Config], on: Sequence[OnSample], off: Sequence[OffSample]) -> int:
    """The checks of ``plumbing.py`` and ``left_alone.py``: what conditions share, then each condition's own."""
    if not on:
        return 0
    queries, bases = _all(s.query_token_ids for s in on), [s.base_ids for s in on]
    shared = 2 * _all(s.teacher_ids for s in on)  # cached and alone
    shared += _all(s.demo_token_ids for s in on) + 2 * queries  # all kept
    shared += 2 * _all(bases) + min(map(len, bases))  # null effect, alone, arithmetic
    shared += 2 * sum(min(len(s.demo_token_ids), ROTATION_TOKENS) for s in on)
    some, prompts = on[: len(off)], _all(u.student_ids for u in off)
    own = sum(4 * queries + _kept(config, on) + prompts + _prefill(config, some) for config in configs)
    return shared + own + queries * sum(config.layer_scope.injection != "all" for config in configs)


def duration(time: float) -> str:
    """``40 seconds``, ``25 minutes``, ``2.5 hours``."""
    if time < 90:
        return f"{max(time, 1):.0f} seconds"
    return f"{time / 60:.0f} minutes" if time < 5400 else f"{time / 3600:.1f} hours"
