"""A plan in words: tables for the console, and the same as JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from tqdm import tqdm

from cedkv.core.files import write_json
from cedkv.core.text import number, plural, sanitize
from cedkv.runs.planning import Plan, TimePlan, measured_rate, plan_run, plan_time
from cedkv.runs.rate import Rate, run_folder
from cedkv.runs.resolved import RunInputs

LINE_INTERVAL = 5.0
"""Seconds at least between two lines about units that are counted."""
COLUMNS = {
    "conditions": "conditions", "on": "ON", "off": "OFF", "units": "units", "evaluations": "evaluations", "tokens": "tokens",
    "padded": "padded",
}  # fmt: skip
"""Field of ``TaskPlan`` that adds up over tasks -> its heading."""


def show_plan(inputs: RunInputs, measured: str | None, given: float | None, workers: int, target: str | None) -> None:
    """Print the plan of a run, and write it to a file.

    Args:
        measured: folder or id of a finished run, whose rate is taken. given: tokens a second, in place of it.
        target: file for the plan as JSON; None for none.

    Raises:
        ConfigError, DataError, ModelError: as ``plan_run`` and ``measured_rate``.
    """
    announce = _Announcer()
    rate = None if given is None else Rate(given)
    if measured is not None:
        rate = measured_rate(run_folder(measured), announce)
    plan = plan_run(inputs, announce)
    times = None if rate is None else plan_time(plan, rate, workers)
    lines = [*about_size(plan), "", *about_memory(plan, workers), "", *about_time(plan, rate, times)]
    click.echo("\n".join(map(sanitize, lines)))
    if target is not None:
        written = plan.as_dict()
        if rate is not None and times is not None:
            written |= {"rate": asdict(rate), "time": {**asdict(times), "total": times.total}}
        write_json(Path(target), written)


class _Announcer:
    """Says on stderr which unit is counted, where counting takes more than a few seconds."""

    def __init__(self) -> None:
        self._last_line = time.monotonic()

    def __call__(self, unit: str) -> None:
        if time.monotonic() - self._last_line >= LINE_INTERVAL:
            click.echo(f"counting the passes of {unit} ...", err=True)
            self._last_line = time.monotonic()


def about_size(plan: Plan) -> list[str]:
    """Return what the run is, and a table of its tasks."""
    what = "a single evaluation" if plan.command == "phase2" else plan.command
    rows = [(task.task, *(f"{getattr(task, name):,}" for name in COLUMNS), str(task.longest)) for task in plan.tasks]
    if len(rows) > 1:
        longest = max(task.longest for task in plan.tasks)
        rows.append(("all", *(f"{plan.total(name):,}" for name in COLUMNS), str(longest)))
    rehearsed, units, fit_tokens = map(plan.total, ("rehearsed", "units", "fit_tokens"))
    lines = [
        f"{what}, phase {plan.phase}, nothing was run",
        f"{plan.model}, {plan.parameters:,} parameters, {plan.dtype} on {plan.device}",
        "",
        *aligned([("task", *COLUMNS.values(), "longest row"), *rows]),
        "",
        "evaluations (sample x arm), at most; tokens through the model, about: counted on a stand-in for it, which chooses",
        "other spans, and with answers to OFF prompts as long as they can be; padded: with padding",
    ]
    lines += about_units(plan)
    if rehearsed < units:
        lines.append(f"{rehearsed} of {units} units were counted; each of the others counts as the largest of its kind")
    if fit_tokens:
        lines.append(f"once, unless they are stored: {fit_tokens:,} tokens to fit weights of attention heads")
    return lines


def about_units(plan: Plan) -> list[str]:
    """Return where the sizes of units come from that a run finds on a card; nothing of sizes that are fixed."""
    if plan.unit_sizes == "fixed":
        return []
    most = ", ".join(f"{task.unit_size} ({task.task})" for task in plan.tasks)
    if plan.unit_sizes == "found":
        return [f"ON samples of a unit, at most: {most}, by the memory that is free on {plan.device} now; a run looks again"]
    return [
        "ON samples of a unit: not known here, because a run finds them when it starts, by the memory that is free on",
        f"{plan.device}; counted with at most {most}",
    ]


def about_memory(plan: Plan, workers: int) -> list[str]:
    """Return the memory of one process by what it is of, and the size of the journal."""
    rows = [(name, "not known: quantised" if value is None else size(value)) for name, value in plan.memory.items()]
    peak = plan.peak
    return [
        f"memory of a worker, about, {'of its process' if plan.device == 'cpu' else f'on {plan.device}'}",
        *(f"  {line}" for line in aligned([*rows, ("peak", "not known" if peak is None else size(peak))])),
        *([] if peak is None or workers == 1 else [f"{workers} workers: {size(peak * workers)}"]),
        f"K/V of a token: {size(plan.kv_bytes)}; journal on disk: about {size(plan.journal_bytes)}",
    ]


def about_time(plan: Plan, rate: Rate | None, times: TimePlan | None) -> list[str]:
    """Return how long the run takes, and how far to trust that; without a rate, how to get one."""
    if rate is None or times is None:
        return [
            "time: not known without a rate. Run a few samples of this (--max_on 32) where it is to run, then plan with",
            "--from RUN_ID; or give the tokens a second of one worker: --rate N",
        ]
    source = f"run {rate.source}, {rate.model} in {rate.dtype} on {rate.device}" if rate.source else "as given"
    pace, units = f"{rate.tokens_per_second:,.1f}", plural(len(plan.unit_stages), "unit")
    parts = {"startup": times.startup, "fitting heads": times.fit, "units": times.units, "results and page": times.end}
    lines = [
        f"time on {plural(times.workers, 'worker')}: about {duration(times.total)}, at {pace} tokens a second and worker",
        f"  pace: {source}",
        f"  {', '.join(f'{name} {duration(seconds)}' for name, seconds in parts.items() if seconds)}",
        f"  the longest of {units} takes {duration(times.longest_unit)}: more workers do not make that shorter",
    ]
    lines += [f"  {caveat}" for caveat in caveats(plan, rate)]
    return lines


def caveats(plan: Plan, rate: Rate) -> list[str]:
    """Return what a time rests on that need not hold."""
    if not rate.source:
        return ["a rate that is given says nothing of startup and of results; both count as 0"]
    found = ["the pace is of that machine under its load; workers that share its cores or its memory are slower"]
    if rate.model != plan.model:
        found.append(f"the pace is of model {rate.model}, not of {plan.model}: of another size, it says nothing")
    if rate.dtype != plan.dtype:
        found.append(f"the pace is of {rate.dtype}, not of {plan.dtype}")
    return found


def size(n_bytes: int) -> str:
    """Return a number of bytes in decimal units: ``1.2 GB``."""
    value, unit = float(n_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:,.0f} {unit}" if unit == "bytes" or value >= 100 else f"{number(value, 3)} {unit}"


def duration(seconds: float) -> str:
    """Return seconds as people say them: ``12.5 s``, ``3:20 min``, ``5.2 h``."""
    if seconds < 60:
        return f"{number(seconds, 3)} s"
    return f"{tqdm.format_interval(seconds)} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
