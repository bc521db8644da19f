"""Small hand-made values for the tests of the pure modules: token kinds, selector tasks, sample records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cedkv.analysis.results import ConditionResult, Records, decide
from cedkv.checks.base import CheckResult, RunRecords
from cedkv.checks.gates import judge_gate
from cedkv.conditions import Condition, factors, labels
from cedkv.config.resolve import resolve_over
from cedkv.config.schema import Phase2Config, SelectBlock
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence, Record, Selection, TokenKind
from cedkv.metrics_phase2 import run_metrics
from cedkv.selectors.base import SelectionTask, candidates, select_tokens, selector_class

_KINDS: dict[str, TokenKind] = {"b": "bos", "i": "input", "d": "delimiter", "a": "answer"}


def kinds(letters: str) -> tuple[TokenKind, ...]:
    """``"bdia"`` -> (bos, delimiter, input, answer)."""
    return tuple(_KINDS[letter] for letter in letters)


def task(
    letters: str,
    select: SelectBlock,
    attention: Sequence[float] = (),
    trial: int = 0,
    drops: dict[int, float] | None = None,
    **evidence: Any,
) -> SelectionTask:
    """A selector's task with every kind of evidence; all scores are zero (a tie everywhere) unless given.

    Args:
        drops: causal drops and closed-form drops.
        evidence: other fields of ``Evidence``; by default every token after BOS is a shot, and the odds and divergences are 0.
    """
    known = kinds(letters)
    read = np.array(attention, dtype=float) if len(attention) else np.zeros(len(known))
    dropped = dict.fromkeys((c.start for c in candidates(known, select)), 0.0) | (drops or {})
    others: dict[str, Any] = {
        "causal_drop": dropped,
        "span_drop": dropped,
        "gold": (len(known) - 1, len(known)),
        "shots": tuple((token, token + 1) for token in range(known[0] == "bos", len(known))),
        "answer_odds": lambda masks: np.zeros(len(masks)),
        "divergence": lambda selections: [0.0] * len(selections),
        **evidence,
    }
    return SelectionTask(select, known, Evidence(read, **others), rng_for(0, "test", trial, "sample"))


def select(name: str, selection_task: SelectionTask) -> Selection:
    """What a selector with its default parameters keeps."""
    return select_tokens(selector_class(name)(), selection_task)


def on(**changes: object) -> Record:
    """The record of an ON sample that every gate likes; arguments replace its values."""
    return {
        "type": "sample", "kind": "on", "sample_id": "on-0", "correct_base": False, "correct_teacher": True,
        "correct_select": True, "correct_random": [False, True], "kl_base_teacher": 2.0, "kl_select_teacher": 0.5,
        "kl_random_teacher": [1.0, 1.5], "kl_random_base": [0.5, 0.7], "random_same": [False, False],
        "phase2_delta_on_select": 1.0, "phase2_answer_logprob_gain": 3.0, **changes,
    }  # fmt: skip


def among_labels(kl: float | None) -> Record:
    """What a sample with labels has besides; ``kl`` is select's to the teacher, nothing for None."""
    if kl is None:
        return {}
    return {
        "kl_select_teacher_labels": kl, "kl_base_teacher_labels": 1.0, "kl_random_teacher_labels": [0.5, 0.7],
        "correct_base_labels": False, "correct_teacher_labels": True, "correct_select_labels": True,
        "correct_random_labels": [False, True],
    }  # fmt: skip


def off(**changes: object) -> Record:
    """The record of an OFF prompt that is left alone."""
    return {
        "type": "sample", "kind": "off", "sample_id": "off-0", "phase2_delta_off_select": 0.01, "same_token": True, **changes,
    }  # fmt: skip


def further(*kls: float, entropy: float = 1.0, changed: Sequence[int] = ()) -> Record:
    """What an OFF prompt has besides: KLs along base's own answer, the positions whose greedy token changes, base's entropy."""
    return {
        "base_entropy": entropy, "further_token_ids": list(range(2, 2 + len(kls))), "further_kl": list(kls),
        "further_same": [position not in changed for position in range(len(kls))],
    }  # fmt: skip


def plumbing(**changes: object) -> Record:
    """The observations of one sample by Gate A, all of them good."""
    return {
        "type": "plumbing", "sample_id": "on-0", "teacher_incremental": 1e-7, "null_effect": 1e-8, "roundtrip": 0.0,
        "keep_all_absolute": 1e-7, "padding_equivalence": 2e-7, "batch_consistency": 5e-8, "rotation_equivariance": 1e-6,
        "source_cache_unchanged": 0.0, "roundtrip_exact": 0.0, "attention_alone": 1e-6, "selection_rules": 0.0,
        "kv_precision": 1e-4, "arithmetic": 1e-7, "left_alone": 1e-7, "off_alone": 1e-7, **changes,
    }  # fmt: skip


def repeats(on_records: Sequence[Record], runs: int, wrong: int = 0) -> list[Record]:
    """The select arm's repetitions; the first ``wrong`` samples of each come out the other way."""
    return [
        {"type": "repro", "repeat": repeat, "correct_select": record["correct_select"] ^ (row < wrong)}
        for repeat in range(1, runs)
        for row, record in enumerate(on_records)
    ]


def grid(
    *conditions: tuple[dict[str, str], dict[str, Any]], n: int = 12, config: Phase2Config | None = None
) -> list[ConditionResult]:
    """Finished conditions of ``n`` ON samples and OFF prompts, without a model.

    Args:
        conditions: settings, and what differs from samples every gate likes: ``correct`` and ``random`` (one value a sample),
            ``kl`` (select to teacher), ``label_kl`` (the same among labels; None for samples without labels), ``depth`` (of
            the gold tokens), ``off``, ``base``, ``teacher``; each a value or a list of n. ``extra`` and ``off_extra`` go into
            every record.
    """
    base = config or Phase2Config()
    made = [Condition(str(settings), resolve_over(base, settings)) for settings, _ in conditions]
    named, varied = labels(made), factors(made)
    found = []
    for condition, (_, given) in zip(made, conditions, strict=True):

        def each(name: str, default: Any, given: dict[str, Any] = given) -> list[Any]:
            value = given.get(name, default)
            return list(value) if isinstance(value, list) else [value] * n

        kls, deltas = each("kl", 0.5), each("off", 0.01)
        ons = [
            on(sample_id=f"on-{i}", correct_select=right, correct_base=alone, kl_select_teacher=kl, answer_logprob_select=-kl,
               correct_random=[bool(drawn)] * 2, topk={}, correct_teacher=taught, **among_labels(label_kl),
               **({} if depth is None else {"gold_depth": depth}), **given.get("extra", {}))
            for i, (right, alone, taught, kl, drawn, label_kl, depth) in enumerate(
                zip(each("correct", True), each("base", False), each("teacher", True), kls, each("random", False),
                    each("label_kl", None), each("depth", None), strict=True)
            )
        ]  # fmt: skip
        more = given.get("off_extra", {})
        offs = [off(sample_id=f"off-{i}", phase2_delta_off_select=delta, **more) for i, delta in enumerate(deltas)]
        repeated = repeats(ons, condition.config.eval.repro_runs)
        records = Records(ons, offs, [plumbing(sample_id=r["sample_id"]) for r in ons], repeated, [2] * n)
        results = decide(condition.config, records, "2")
        name, run_id, differing = named[condition.key], f"run-{len(found)}", varied[condition.key]
        found.append(ConditionResult(condition.key, name, run_id, condition.config, records, results, differing))
    return found


def gate_b(config: Phase2Config, on: Sequence[Record], off: Sequence[Record]) -> list[CheckResult]:
    """Return the results of Gate B's checks."""
    return judge_gate("B", judged(config, on, off))


def judged(config: Phase2Config, on: Sequence[Record], off: Sequence[Record]) -> RunRecords:
    """What Gate B and the preconditions decide from."""
    return RunRecords(config, on, off, metrics=run_metrics(on, off))
