"""The verdict of a run in words: for the console and, as markdown, for the run's description in MLflow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from cedkv.analysis.best import by_group
from cedkv.analysis.results import ConditionResult, Results, verdict_word
from cedkv.checks.base import CheckResult
from cedkv.config.data import DataBlock
from cedkv.config.schema import Phase2Config
from cedkv.core.text import escape_control, escape_markdown, number, plural, sentence, wrapped
from cedkv.tasks.load import Unusable


def run_name(config: Phase2Config, phase: str) -> str:
    """Return a name that tells runs apart in a list: ``attention_diversity_span · compact · seed 42``.

    A file of samples, or a task that is not the default one, is named too.
    """
    start = "gate A" if phase == "1.5" else config.select.mode
    parts: list[str] = [start, config.injection.positioning_mode]
    if config.prefix.kv_source != "prefill":
        parts.append(config.prefix.kv_source)
    if config.prefix.padding_mode != "null_pad":
        parts.append("shrink")
    if config.select.keep_sink:
        parts.append(f"sink {config.select.keep_sink}")
    if config.data.source != DataBlock().source:
        parts.append(config.data.source)
    return " · ".join([*parts, f"seed {config.seed}"])


def describe_run(config: Phase2Config, n_on: int, n_off: int) -> str:
    """Return model, dtype and numbers of samples."""
    return f"{config.model.id}, {config.runtime.torch_dtype}, {n_on} ON, {n_off} OFF"


def about_samples(notes: Sequence[str], unusable: Sequence[Unusable], n_on: int, n_off: int) -> list[str]:
    """Return what a reader should know about a run's samples, a sentence each.

    Args:
        notes, unusable: of ``tasks.load.Samples``. n_on, n_off: the samples that were used.
    """
    used = {"ON": (n_on, "ON sample"), "OFF": (n_off, "OFF prompt")}
    lines = list(notes)
    for left_out in unusable:
        n, noun = used[left_out.kind]
        tried = n + sum(other.count for other in unusable if other.kind == left_out.kind)
        more = ", ..." if left_out.count > len(left_out.examples) else ""
        first = f" (first: {', '.join(left_out.examples)}{more})" if left_out.examples else ""
        lines.append(f"{left_out.count} of {plural(tried, noun)} left out: {left_out.reason}{first}")
    return [escape_control(" ".join(line.split())) for line in lines]


def samples_of(result: ConditionResult) -> list[str]:
    """Return ``about_samples`` of a finished condition."""
    return about_samples(result.notes, result.unusable, len(result.records.on), len(result.records.off))


def accuracies(results: Results, among_labels: bool = False) -> str:
    """Return one line with the accuracy of every arm, or what it is among labels."""
    m, labels = results.metrics, "_labels" if among_labels else ""
    arms = {"base": "base", "teacher": "teacher", "select": "student_select", "random": "student_random_mean"}
    shown = {arm: m[f"phase2_on_acc{labels}_{name}"] for arm, name in arms.items()}
    parts = [f"{arm} {number(value)}" for arm, value in shown.items() if arm != "random" or value is not None]
    spread = m["phase2_on_acc_student_random_std"]
    if not among_labels and spread is not None:
        parts[-1] += f" ± {number(spread)}"
    return "   ".join(parts)


def measures(result: ConditionResult) -> dict[str, str]:
    """Return what a run says in a line each, by its heading: accuracy, the same among labels, OFF prompts."""
    m = result.results.metrics
    lines = {"accuracy": accuracies(result.results)}
    if m["phase2_on_acc_labels_base"] is not None:
        select, random = m["phase2_rel_kl_labels_select"], m["phase2_rel_kl_labels_random"]
        of_random = "" if random is None else f" (random {number(random)})"
        lines["among labels"] = f"{accuracies(result.results, among_labels=True)}   KL ratio {number(select)}{of_random}"
    if (beyond := beyond_limit(result)) is not None:
        lines["OFF prompts"] = beyond
    if (further := further_positions(result.results)) is not None:
        lines["OFF answers"] = further
    return lines


def beyond_limit(result: ConditionResult) -> str | None:
    """Return how many OFF prompts move beyond the limit: ``0 of 128 beyond 1 nat: at most 2.3 % (95 %)``.

    The percentage is the upper bound of the share. None where nothing finite was observed.
    """
    m, n = result.results.metrics, len(result.records.off)
    share, upper = m["phase2_off_over_limit_share"], m["phase2_off_over_limit_upper"]
    if share is None or upper is None or not math.isfinite(share):
        return None
    limit = result.config.thresholds.off_delta_p99_max
    nats = f"{number(limit)} nat{'s' * (limit != 1)}"
    return f"{round(share * n)} of {n} beyond {nats}: at most {percent(upper)} (95 %)"


def further_positions(results: Results) -> str | None:
    """Return how far base's own answers to OFF prompts move beyond their first token; None where that was not measured."""
    m = results.metrics
    changed = m["phase2_off_further_changed_share"]
    if changed is None:
        return None
    mean, worst = m["phase2_off_further_kl_mean"], m["phase2_off_further_kl_p99"]
    return f"KL at further positions: mean {number(mean)}, p99 {number(worst)} nats; greedy token changes at {percent(changed)}"


def percent(share: float) -> str:
    """Return a share in percent with two significant digits."""
    return f"{number(100 * share, 2 if share < 0.995 else 3)} %"


def console(result: ConditionResult) -> str:
    """Return what is printed at the end of a run: its numbers, the table of verdicts, and what does not pass."""
    config, results = result.config, result.results
    rows = [("gate", "check", "observed", "limit", "n", "verdict")]
    rows += [
        (str(c.gate), c.name, number(c.observed), f"{c.relation} {number(c.limit)}", str(c.n), c.verdict)
        for c in results.checks
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    size = describe_run(config, len(result.records.on), len(result.records.off))
    shown = measures(result)
    width = max(len(name) for name in shown)
    lines = ["", f"{run_name(config, results.phase)}   ({size})"]
    lines += [f"{name:<{width}}   {line}" for name, line in shown.items()]
    lines += [f"{'samples':<{width}}   {line}" for line in samples_of(result)]
    lines += ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)]
    lines += ["", "   ".join(f"{name}: {verdict_word(value).upper()}" for name, value in results.verdicts.items())]
    lines += [f"  {', '.join(names)}: {reason}" for reason, names in not_passing(results).items()]
    return "\n".join(lines)


def not_passing(results: Results) -> dict[str, list[str]]:
    """Return why checks do not pass: reason -> ``on_gain does not pass``; preconditions, which qualify the others, first."""
    reasons: dict[str, list[str]] = {}
    for check in sorted(results.checks, key=lambda check: check.gate != "precondition"):
        if check.verdict != "pass":
            what = "does not hold" if check.gate == "precondition" else "does not pass"
            what = "is insufficient" if check.verdict == "insufficient" else what
            reasons.setdefault(explain(check), []).append(f"{check.name} {what}")
    return reasons


def explain(check: CheckResult) -> str:
    """Return the reason why a check does not pass, in one clause."""
    if check.note:
        return check.note
    if check.verdict == "insufficient":
        return f"not enough to decide (observed {number(check.observed)}, limit {number(check.limit)}, n = {check.n})"
    return f"required: {check.meaning}; {number(check.observed)} {check.unit} is not {check.relation} {number(check.limit)}"


def links(files: Mapping[str, str]) -> str:
    """Return a line of links to a run's files: what each is called -> its name at the run's root."""
    return " · ".join(f"[{escape_markdown(name)}]({file})" for name, file in files.items())


def markdown(result: ConditionResult) -> str:
    """Return the run's description in the MLflow UI, with links to its page and tables.

    In the table the checks of the effect come first: those of the plumbing are many, and mostly pass.
    """
    config, results = result.config, result.results
    verdicts = " · ".join(f"{name} **{verdict_word(value)}**" for name, value in results.verdicts.items())
    files = {"page": "report.html", "ON samples": "phase2_on_samples.json", "OFF prompts": "phase2_off_samples.json"}
    if not result.records.off:
        del files["OFF prompts"]
    lines = [f"### {verdicts}", "", links({**files, "report": "report_phase2.json"}), ""]
    for note in results.undecided:
        lines += [f"**{escape_markdown(sentence(note))}.**", ""]
    lines += [escape_markdown(describe_run(config, len(result.records.on), len(result.records.off))), ""]
    lines += [f"{sentence(name)}: {line.replace('   ', ' · ')}  " for name, line in measures(result).items()]
    lines += [f"{escape_markdown(line)}.  " for line in samples_of(result)]
    lines += ["", "| gate | check | observed | limit | n | verdict |", "| --- | --- | ---: | ---: | ---: | --- |"]
    lines += [
        f"| {c.gate} | {c.name} | {number(c.observed)} | {c.relation} {number(c.limit)} | {c.n} | "
        f"{c.verdict if c.verdict == 'pass' else f'**{c.verdict}**'} |"
        for c in sorted(results.checks, key=lambda check: check.gate == "A")
    ]
    lines += ["", f"Numerical floor: {number(results.floor)} nats."]
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
