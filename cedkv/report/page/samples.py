"""The data of the sample browser: every sample under every condition, as the page's script reads it. Tokens are stored by id,
and what conditions share is stored once: texts and demo tokens of a sample, and token scores where they are the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from cedkv.analysis.best import by_group
from cedkv.analysis.quantities import JUDGED
from cedkv.analysis.results import ConditionResult
from cedkv.core.values import Record

MAX_SAMPLES = 500
"""Most ON samples, and most OFF prompts, of one condition in a page; with more the page would open slowly."""

TokenText = Callable[[int], str]
_ARMS = ("base", "teacher", "select")


class ConditionSamples:
    """What a page shows of one condition's samples; filled while records are read. Tokens are ids."""

    def __init__(self) -> None:
        self.on: list[dict[str, Any]] = []
        self._off: list[Record] = []

    def add_on(self, on: Record, selection: Record) -> None:
        """Add an ON sample, if it is one of the first ``MAX_SAMPLES``."""
        if len(self.on) < MAX_SAMPLES:
            self.on.append(_on_sample(on, selection))

    def add_off(self, off: Record) -> None:
        """Add an OFF prompt."""
        self._off.append(off)

    @property
    def off(self) -> list[dict[str, Any]]:
        """The OFF prompts that moved most."""
        most_moved = sorted(self._off, key=lambda record: -(_short(record["phase2_delta_off_select"]) or 0.0))
        return [_off_prompt(record) for record in most_moved[:MAX_SAMPLES]]

    def tokens(self) -> Iterator[int]:
        """Yield the ids of all tokens that are shown, repeats included."""
        for sample in self.on:
            source = sample["source"]
            yield from (*source["demo"], *source["query"], *source["answer"])
            for arm in sample["arms"].values():
                yield from (arm["token"], *(token for token, _ in arm["top"]))
            yield from (trial["token"] for trial in sample["random"])
        for prompt in self.off:
            yield from (prompt["base"], prompt["select"], *prompt["prompt"], *prompt["answer"])


class SharedValues:
    """Values by index; values with the same JSON are one."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self.values: list[Any] = []

    def add(self, value: Any) -> int:
        """Return the index of a value, new or not."""
        index = self._index.setdefault(json.dumps(value), len(self.values))
        if index == len(self.values):
            self.values.append(value)
        return index


class SampleIndex:
    """The conditions of a page, the sources and token scores that they share by index, and the text of every token in use."""

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text
        self._tokens: dict[int, str] = {}
        self._sources, self._scores = SharedValues(), SharedValues()
        self._results: list[ConditionResult] = []
        self.conditions: list[dict[str, Any]] = []

    def add(self, result: ConditionResult, samples: ConditionSamples) -> None:
        """Add a condition with its samples."""
        for token in samples.tokens():
            if token not in self._tokens:
                self._tokens[token] = self._token_text(token)
        self._results.append(result)
        self.conditions.append(
            {
                "label": result.label,
                "n_on": len(result.records.on),
                "n_off": len(result.records.off),
                "p99": _short(result.results.metrics["phase2_off_delta_p99_select"]),
                "limit": result.config.thresholds.off_delta_p99_max,
                "on": [
                    {
                        **sample,
                        "source": self._sources.add(sample["source"]),
                        "scores": self._scores.add(sample["scores"]),
                    }
                    for sample in samples.on
                ],
                "off": samples.off,
            }
        )

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script reads; ``groups`` has the conditions by index, group by group."""
        index = {id(result): i for i, result in enumerate(self._results)}
        groups = groupby(by_group(self._results), key=lambda result: result.group)
        return {
            "tokens": self._tokens,
            "judged": [[quantity.label, quantity.unit] for quantity in JUDGED],
            "sources": self._sources.values,
            "scores": self._scores.values,
            "conditions": self.conditions,
            "groups": [[name, [index[id(result)] for result in group]] for name, group in groups],
        }


def _on_sample(record: Record, selection: Record) -> dict[str, Any]:
    prefixes = [selection, *selection["random"]]
    in_spans = {i for span in selection["spans"] for i in range(span["start"], span["end"])}
    trials = zip(
        record["token_random"],
        record["correct_random"],
        record["answer_logprob_random"],
        record["kl_random_teacher"],
        strict=True,
    )
    return {
        "id": record["sample_id"],
        "source": {
            "demo": selection["demo_token_ids"],
            "query": selection["query_token_ids"],
            "answer": selection.get("answer_token_ids", [selection["answer_token_id"]]),
            "kinds": [kind[0] for kind in selection["token_kinds"]],
            "gold": selection.get("gold_tokens"),
            "text": "\n".join(selection[name] for name in ("demo_text", "query_text", "answer_text")),
        },
        "scores": [_short(score) for score in selection["scores"]],
        "scores_of": selection.get("scores_of", "attention"),
        "prefix_of": selection.get("prefix_of", record["sample_id"]),
        "arms": {arm: _arm(record, arm) for arm in _ARMS},
        "random": [
            {"token": token, "right": right, "logprob": _short(logprob), "kl": _short(divergence)}
            for token, right, logprob, divergence in trials
        ],
        "spans": [[[span["start"], span["end"], _short(span["score"])] for span in prefix["spans"]] for prefix in prefixes],
        "always": [token for token in selection["kept_tokens"] if token not in in_spans],
        "slots": [[prefix["prefix_slots"], len(prefix["kept_tokens"])] for prefix in prefixes],
        "ratio": _short(record["rel_kl_to_teacher"]),
        "delta": _short(record["phase2_delta_on_select"]),
        "gain": _short(record["phase2_answer_logprob_gain"]),
        "drop": _short(record.get("phase2_selection_score_causal_drop")),
        "judged": [_short(record.get(quantity.column("select"))) for quantity in JUDGED],
    }


def _arm(record: Record, arm: str) -> dict[str, Any]:
    return {
        "token": record[f"token_{arm}"],
        "right": record[f"correct_{arm}"],
        "logprob": _short(record[f"answer_logprob_{arm}"]),
        "kl": _short(record.get(f"kl_{arm}_teacher")),
        "top": [[entry["token_id"], _short(math.exp(entry["logprob"] or 0.0))] for entry in record["topk"][arm]],
    }


def _off_prompt(record: Record) -> dict[str, Any]:
    return {
        "id": record["sample_id"],
        "delta": _short(record["phase2_delta_off_select"]),
        "base": record["token_base"],
        "select": record["token_select"],
        "state": record["state_of"],
        "prompt": record["token_ids"],
        "entropy": _short(record.get("base_entropy")),
        "answer": record.get("further_token_ids", []),
        "further": [_short(value) for value in record.get("further_kl", [])],
        "same": [record["same_token"], *record.get("further_same", [])],
    }


def _short(value: float | None) -> float | None:
    """Return four significant digits, as the page shows them; None for a missing value or one that is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
