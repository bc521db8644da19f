"""Tables for the MLflow UI, one plain value per cell. Its compare view groups by the first column, ``sample_id``, and shows the
second one side by side at first, so the second column is one in which runs differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cedkv.analysis.best import by_group
from cedkv.analysis.results import ConditionResult, verdict_word
from cedkv.core.values import Record
from cedkv.tasks.load import Samples

_ON = (
    "sample_id",
    "token_select",
    "query_text",
    "answer_text",
    "correct_base",
    "correct_teacher",
    "correct_select",
    "correct_random_mean",
    "token_base",
    "token_teacher",
    "answer_logprob_base",
    "answer_logprob_teacher",
    "answer_logprob_select",
    "phase2_answer_logprob_gain",
    "phase2_delta_on_select",
    "kl_base_teacher",
    "kl_select_teacher",
    "kl_random_teacher_mean",
    "rel_kl_to_teacher",
    "correct_base_labels",
    "correct_teacher_labels",
    "correct_select_labels",
    "correct_random_labels_mean",
    "kl_base_teacher_labels",
    "kl_select_teacher_labels",
    "kl_random_teacher_labels_mean",
    "gold_depth",
    "phase2_selection_score_attention",
    "phase2_selection_score_causal_drop",
    "gold_coverage",
    "gold_coverage_random_mean",
    "lds",
    "comprehensiveness",
    "spans",
)
_PER_TRIAL = (
    "correct_random",
    "kl_random_teacher",
    "correct_random_labels",
    "kl_random_teacher_labels",
    "gold_coverage_random",
)
_OFF = (
    "sample_id",
    "phase2_delta_off_select",
    "prompt_text",
    "state_of",
    "same_token",
    "token_base",
    "token_select",
    "base_entropy",
    "base_answer",
    "further_kl_mean",
    "further_changed",
)


_WHERE_MEASURED = (
    *("acc_labels", "rel_kl_labels", "acc_random_labels", "rel_kl_random_labels"),
    *("off_further_kl", "off_further_p99", "off_further_changed"),
)
"""Columns of ``conditions_table`` that are left out where no condition has them."""


class OnTable:
    """One row per ON sample, with tokens as text and random trials as their mean; filled while records are read."""

    def __init__(self) -> None:
        self._rows: list[Record] = []

    def add_on(self, on: Record, selection: Record) -> None:
        """Add an ON sample."""
        row = dict(on)
        row["query_text"], row["answer_text"] = selection["query_text"], selection["answer_text"]
        row["spans"] = " ".join(f"{span['start']}:{span['end']}" for span in selection["spans"])
        for column in _PER_TRIAL:
            row[f"{column}_mean"] = float(np.mean(trials)) if (trials := on.get(column)) else None
        for arm, top in on["topk"].items():
            row[f"token_{arm}"] = top[0]["text"]
        self._rows.append({name: row.get(name) for name in _ON})

    def add_off(self, off: Record) -> None:
        """Leave out OFF prompts: they have a table of their own."""

    def frame(self) -> pd.DataFrame:
        """Return the table, without columns that are empty."""
        return _table(self._rows, _ON)


def off_table(off: Sequence[Record], token_text: Callable[[int], str]) -> pd.DataFrame:
    """Return one row per OFF prompt, with tokens as text: also base's own answer, and how far its further positions move."""
    return _table([_off_row(record, token_text) for record in off], _OFF)


def _off_row(record: Record, token_text: Callable[[int], str]) -> Record:
    row = record | {name: token_text(record[name]) for name in ("token_base", "token_select")}
    if further := record.get("further_kl"):
        row["base_answer"] = "".join(token_text(token) for token in record["further_token_ids"])
        row["further_kl_mean"] = float(np.mean(further))
        row["further_changed"] = sum(not same for same in record["further_same"])
    return row


def off_tokens(off: Sequence[Record]) -> Iterator[int]:
    """Yield the ids of all tokens whose text is in ``off_table``, repeats included."""
    for record in off:
        yield from (record["token_base"], record["token_select"], *record.get("further_token_ids", ()))


def conditions_table(results: Sequence[ConditionResult]) -> pd.DataFrame:
    """Return one row per condition, group by group: label, kind and query, main metrics, verdicts, run."""
    columns = {
        "acc_select": "phase2_on_acc_student_select",
        "acc_random": "phase2_on_acc_student_random_mean",
        "acc_base": "phase2_on_acc_base",
        "acc_teacher": "phase2_on_acc_teacher",
        "rel_kl_to_teacher": "phase2_rel_kl_to_teacher_select",
        "acc_labels": "phase2_on_acc_labels_student_select",
        "rel_kl_labels": "phase2_rel_kl_labels_select",
        "acc_random_labels": "phase2_on_acc_labels_student_random_mean",
        "rel_kl_random_labels": "phase2_rel_kl_labels_random",
        "off_delta_p99": "phase2_off_delta_p99_select",
        "off_over_limit": "phase2_off_over_limit_share",
        "off_over_limit_upper": "phase2_off_over_limit_upper",
        "off_further_kl": "phase2_off_further_kl_mean",
        "off_further_p99": "phase2_off_further_kl_p99",
        "off_further_changed": "phase2_off_further_changed_share",
        "delta_on": "phase2_delta_on_mean_select",
        "gold_coverage": "phase2_gold_coverage_mean",
        "gold_coverage_random": "phase2_gold_coverage_random_mean",
        "lds": "phase2_lds_mean",
        "comprehensiveness": "phase2_comprehensiveness_mean",
    }
    measured = {name for result in results for name, value in result.results.metrics.items() if value is not None}
    columns = {column: metric for column, metric in columns.items() if metric in measured or column not in _WHERE_MEASURED}
    rows = []
    for result in by_group(results):
        metrics: dict[str, Any] = {column: result.results.metrics[metric] for column, metric in columns.items()}
        verdicts = {gate: verdict_word(passed) for gate, passed in result.results.verdicts.items()}
        rows.append(
            {
                "condition": result.label,
                "kind": result.role,
                "query": result.query,
                **metrics,
                **verdicts,
                "run_id": result.run_id,
            }
        )
    return pd.DataFrame(rows)


def sample_tables(samples: Samples, phase: str) -> dict[str, tuple[str, pd.DataFrame]]:
    """Return the samples as they went in: context (on and, in phase 2, off) -> where they come from, and their texts."""
    on = [
        {
            "sample_id": sample.sample_id,
            "demo_text": sample.episode.demo_text,
            "query_text": sample.episode.query_text,
            "answer_text": sample.episode.answer_text,
        }
        for sample in samples.on
    ]
    tables = {"on": (samples.on_source, pd.DataFrame(on))}
    if phase == "2":
        off = [{"sample_id": sample.sample_id, "prompt_text": sample.prompt_text} for sample in samples.off]
        tables["off"] = (samples.off_source, pd.DataFrame(off))
    return tables


def _table(rows: Sequence[Record], columns: Sequence[str]) -> pd.DataFrame:
    """Return the rows with those columns that hold a value in any row."""
    present = [name for name in columns if any(row.get(name) is not None for row in rows)]
    return pd.DataFrame([{name: row.get(name) for name in present} for row in rows], columns=present or ["sample_id"])
