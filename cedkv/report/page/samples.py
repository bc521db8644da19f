"""The data of the sample browser: every sample under every condition, as the page's script reads it. Tokens are stored by id,
and what conditions share is stored once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from cedkv.analysis.results import Records, Results
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record

MAX_SAMPLES = 500
"""Most ON samples, and most OFF prompts, of one condition in a page; with more the page would open slowly."""

TokenText = Callable[[int], str]
_ARMS = ("base", "teacher", "select")


class SampleIndex:
    """Conditions, the sources that they share by index, and the text of every token in use."""

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text
        self._index: dict[str, int] = {}
        self.tokens: dict[int, str] = {}
        self.sources: list[Record] = []
        self.conditions: list[dict[str, Any]] = []

    def add(self, label: str, config: Phase2Config, records: Records, results: Results) -> None:
        """Add a condition: its first ON samples, and the OFF prompts that moved most."""
        most_moved = sorted(records.off, key=lambda record: -(_short(record["phase2_delta_off_select"]) or 0.0))
        pairs = islice(zip(records.on, records.selections, strict=True), MAX_SAMPLES)  # selections may come from disk
        self.conditions.append(
            {
                "label": label,
                "n_on": len(records.on),
                "n_off": len(records.off),
                "p99": _short(results.metrics["phase2_off_delta_p99_select"]),
                "limit": config.thresholds.off_delta_p99_max,
                "on": [self._on(record, selection) for record, selection in pairs],
                "off": [self._off(record) for record in most_moved[:MAX_SAMPLES]],
            }
        )

    def _on(self, record: Record, selection: Record) -> dict[str, Any]:
        source = {
            "demo": self._tokens(selection["demo_token_ids"]),
            "query": self._tokens(selection["query_token_ids"]),
            "answer": self._token(selection["answer_token_id"]),
            "kinds": [kind[0] for kind in selection["token_kinds"]],
            "scores": [_short(score) for score in selection["scores"]],
            "text": "\n".join(selection[name] for name in ("demo_text", "query_text", "answer_text")),
        }
        states = [selection, *selection["random"]]
        in_spans = {i for span in selection["spans"] for i in range(span["start"], span["end"])}
        return {
            "id": record["sample_id"],
            "source": self._share(source),
            "prefix_of": selection.get("prefix_of", record["sample_id"]),
            "arms": {arm: self._arm(record, arm) for arm in _ARMS},
            "random": [
                {"token": self._token(token), "right": right, "logprob": _short(logprob), "kl": _short(divergence)}
                for token, right, logprob, divergence in zip(
                    record["token_random"],
                    record["correct_random"],
                    record["answer_logprob_random"],
                    record["kl_random_teacher"],
                    strict=True,
                )
            ],
            "spans": [[[span["start"], span["end"], _short(span["score"])] for span in state["spans"]] for state in states],
            "always": [token for token in selection["kept_tokens"] if token not in in_spans],
            "slots": [[state["prefix_slots"], len(state["kept_tokens"])] for state in states],
            "ratio": _short(record["rel_kl_to_teacher"]),
            "delta": _short(record["phase2_delta_on_select"]),
            "gain": _short(record["phase2_answer_logprob_gain"]),
            "drop": _short(record.get("phase2_selection_score_causal_drop")),
        }

    def _arm(self, record: Record, arm: str) -> dict[str, Any]:
        return {
            "token": self._token(record[f"token_{arm}"]),
            "right": record[f"correct_{arm}"],
            "logprob": _short(record[f"answer_logprob_{arm}"]),
            "kl": _short(record.get(f"kl_{arm}_teacher")),
            "top": [
                [self._token(entry["token_id"]), _short(math.exp(entry["logprob"] or 0.0))] for entry in record["topk"][arm]
            ],
        }

    def _off(self, record: Record) -> dict[str, Any]:
        return {
            "id": record["sample_id"],
            "delta": _short(record["phase2_delta_off_select"]),
            "base": self._token(record["token_base"]),
            "select": self._token(record["token_select"]),
            "state": record["state_of"],
            "prompt": self._tokens(record["token_ids"]),
        }

    def _token(self, token: int) -> int:
        """Return the token id, and store the token's text."""
        if token not in self.tokens:
            self.tokens[token] = self._token_text(token)
        return token

    def _tokens(self, tokens: Sequence[int]) -> list[int]:
        return [self._token(token) for token in tokens]

    def _share(self, source: Record) -> int:
        """Return the index of a source; conditions with the same tokens and scores for a sample share one."""
        key = json.dumps(source)
        if key not in self._index:
            self._index[key] = len(self.sources)
            self.sources.append(source)
        return self._index[key]


def _short(value: float | None) -> float | None:
    """Return four significant digits, as the page shows them; None for a missing value or one that is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
