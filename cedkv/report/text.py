"""The verdict of a run in words: for the console and, as markdown, for the run's description in MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from cedkv.analysis.best import by_group
from cedkv.analysis.results import ConditionResult, Results, verdict_word
from cedkv.checks.base import CheckResult
from cedkv.config.schema import Phase2Config
from cedkv.core.text import escape_markdown, number, wrapped


def run_name(config: Phase2Config, phase: str) -> str:
    """Return a name that tells runs apart in a list: ``attention_diversity_span · compact · seed 42``."""
    start = "gate A" if phase == "1.5" else config.select.mode
    parts: list[str] = [start, config.injection.positioning_mode]
    if config.prefix.kv_source != "prefill":
        parts.append(config.prefix.kv_source)
    if config.prefix.padding_mode != "null_pad":
        parts.append("shrink")
    if config.select.keep_sink:
        parts.append(f"sink {config.select.keep_sink}")
    return " · ".join([*parts, f"seed {config.seed}"])


def describe_run(config: Phase2Config, n_on: int, n_off: int) -> str:
    """Return model, dtype and numbers of samples."""
    return f"{config.model.id}, {config.runtime.torch_dtype}, {n_on} ON, {n_off} OFF"


def accuracies(results: Results) -> str:
    """Return one line with the accuracy of every arm."""
    m = results.metrics
    parts = [
        f"base {number(m['phase2_on_acc_base'])}",
        f"teacher {number(m['phase2_on_acc_teacher'])}",
        f"select {number(m['phase2_on_acc_student_select'])}",
    ]
    if m["phase2_on_acc_student_random_mean"] is not None:
        spread = number(m["phase2_on_acc_student_random_std"])
        parts.append(f"random {number(m['phase2_on_acc_student_random_mean'])} ± {spread}")
    return "   ".join(parts)


def console(config: Phase2Config, results: Results, n_on: int, n_off: int) -> str:
    """Return the table of verdicts that is printed at the end of a run."""
    rows = [("gate", "check", "observed", "limit", "n", "verdict")]
    rows += [
        (str(c.gate), c.name, number(c.observed), f"{c.relation} {number(c.limit)}", str(c.n), c.verdict)
        for c in results.checks
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    head = f"{run_name(config, results.phase)}   ({describe_run(config, n_on, n_off)})"
    lines = ["", head, f"accuracy   {accuracies(results)}", ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "   ".join(f"{name}: {verdict_word(value).upper()}" for name, value in results.verdicts.items())]
    lines += [f"  {check.name} does not pass: {explain(check)}" for check in results.checks if check.verdict != "pass"]
    return "\n".join(lines)


def explain(check: CheckResult) -> str:
    """Return the reason why a check does not pass, in one clause."""
    if check.verdict == "insufficient":
        return f"not enough to decide (observed {number(check.observed)}, limit {number(check.limit)}, n = {check.n})"
    return f"required: {check.meaning}; {number(check.observed)} {check.unit} is not {check.relation} {number(check.limit)}"


def markdown(config: Phase2Config, results: Results, n_on: int, n_off: int) -> str:
    """Return the run's description in the MLflow UI."""
    verdicts = " · ".join(f"{name} **{verdict_word(value)}**" for name, value in results.verdicts.items())
    lines = [
        f"### {verdicts}",
        "",
        escape_markdown(describe_run(config, n_on, n_off)),
        "",
        f"Accuracy: {accuracies(results)}",
        "",
        "| gate | check | observed | limit | n | verdict |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {c.gate} | {c.name} | {number(c.observed)} | {c.relation} {number(c.limit)} | {c.n} | {c.verdict} |"
        for c in results.checks
    ]
    lines += ["", f"Numerical floor: {number(results.floor)} nats. Files: `report_phase2.json`, `metrics.jsonl`, `artifacts/`."]
    return "\n".join(lines) + "\n"


def aligned(results: Sequence[ConditionResult]) -> str:
    """Return the conditions for the console, group by group under a heading.

    Text is aligned left, numbers right with four digits. A long label goes on below, between its settings, so that a line has
    about 100 characters however many settings vary.
    """
    columns = {
        "accuracy": "phase2_on_acc_student_select",
        "random": "phase2_on_acc_student_random_mean",
        "KL ratio": "phase2_rel_kl_to_teacher_select",
        "delta ON": "phase2_delta_on_mean_select",
        "OFF p99": "phase2_off_delta_p99_select",
    }
    heads = [f"  {name:>8}" for name in columns] + [f"  {gate}" for gate in results[0].results.verdicts]
    lines: list[tuple[str, str]] = []
    for name, group in groupby(by_group(results), key=lambda c: c.group):
        lines.append((name, ""))
        for c in group:
            label, *settings = wrapped(c.label + " (oracle)" * c.oracle)
            cells = [f"  {number(c.results.metrics[metric]):>8}" for metric in columns.values()]
            cells += [f"  {verdict_word(passed):<{len(gate)}}" for gate, passed in c.results.verdicts.items()]
            lines += [(f"  {label}", "".join(cells)), *((f"    {line}", "") for line in settings)]
    width = max(len(label) for label, _ in lines)
    m = results[0].results.metrics
    levels = f"base {number(m['phase2_on_acc_base'])}   teacher {number(m['phase2_on_acc_teacher'])}"
    table = [("condition", "".join(heads)), *lines]
    return "\n".join([f"accuracy   {levels}", "", *(f"{label:<{width}}{cells}".rstrip() for label, cells in table)])


def console_note(row: Mapping[str, Any]) -> str | None:
    """Return a note for the console where a known relation does not hold, or identical results differ; otherwise None."""
    if row.get("here") == "does not hold":
        return f"note     does not hold here: {row['relation']} ({row['figures']})"
    if row.get("verdict", "pass") != "pass":
        return f"note     not equal: {row['left']} and {row['right']}, {row['quantity']} {number(row['largest'])}"
    return None
