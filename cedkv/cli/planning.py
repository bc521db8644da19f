"""``cedkv plan``: what a run takes, without weights; ``runs.planning``, which counts it, is imported when it is called."""

from __future__ import annotations

from typing import Any

import click

from cedkv.cli.click_ext import (
    GroupedCommand,
    config_options,
    list_options,
    report_errors,
    short_options,
    without_garbage_collection,
)
from cedkv.config.options import COMPARISONS, OPTIONS
from cedkv.core.errors import ConfigError

LISTS = {name: option for comparison in COMPARISONS.values() for name, option in comparison.items()}
"""The list options of all comparisons."""


def _options(command: Any) -> Any:
    return list_options(LISTS, config_options(short_options(command, with_flags=True)))


@click.command("plan", cls=GroupedCommand, context_settings={"max_content_width": 110})
@click.option(
    "--comparison",
    metavar="NAME",
    help=f"What to plan|{' or '.join(COMPARISONS)}; without it, a single evaluation.",
    type=click.Choice([*COMPARISONS, *(name.replace("_", "-") for name in COMPARISONS)]),
)
@click.option("--phase", type=click.Choice(["1.5", "2"]), default="2", help="What to plan|2 (default), or 1.5: Gate A alone.")
@click.option(
    "--from", "measured", metavar="RUN", help="Time|A finished run, whose pace is taken: its folder, or id in outputs/."
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Time|Tokens a second of one worker, without padding, in place of --from.",
)
@click.option("--json", "target", metavar="FILE", help="Running|Write the plan to a file too.")
@_options
def plan_command(
    comparison: str | None,
    phase: Any,
    measured: str | None,
    rate: float | None,
    target: str | None,
    path: str | None,
    overrides: tuple[str, ...],
    debug: bool,
    **options: str | None,
) -> None:
    """Say what a run takes, without its weights: units, tokens, evaluations, memory, and the time on n workers.

    It takes the options of the run that it is about, and ends with the errors that the run would end with before it loads
    weights (exit code 2); --device may name one that is not here. Passes are counted by the engine itself on a stand-in for
    the model (docs/planning.md).

    \b
    Examples:
      python -m cedkv plan --config configs/quickstart.yaml
      python -m cedkv plan --phase2-model-id smollm2-135m --phase2-max-on 512
      python -m cedkv plan --comparison ablate_selector --select_modes all --tasks symbol_lookup,kv_retrieval
      python -m cedkv plan --comparison compare_positioning --from outputs/RUN_ID --workers 8 --json plan.json
    """
    with report_errors(debug):
        command = "phase2" if comparison is None else comparison.replace("-", "_")
        lists = {name: options.pop(name) for name in LISTS}
        foreign = [name for name, value in lists.items() if value is not None and name not in COMPARISONS.get(command, {})]
        if foreign:
            owners = " or ".join(name for name, own in COMPARISONS.items() if foreign[0] in own)
            raise ConfigError(f"--{foreign[0]} is a list of conditions; add --comparison {owners}, or leave it out")
        if measured is not None and rate is not None:
            raise ConfigError(f"--from {measured} and --rate {rate:g} both say how fast the model is; leave one of the two out")
        from cedkv.config.resolve import resolve

        config = resolve(path, overrides, {name: options[name] for name in OPTIONS})
        own_lists = {name: lists[name] for name in COMPARISONS.get(command, {})}
        from cedkv.runs.resolved import resolve_inputs

        workers = config.runtime.workers or 1
        if workers == "auto":
            raise ConfigError("--workers auto is as many as the cluster has room for, which is not known here: give a number")
        here = config.runtime.model_copy(update={"workers": None, "ray_address": None})  # Ray need not be installed to plan
        inputs = resolve_inputs(command, config.model_copy(update={"runtime": here}), phase, own_lists)
        with without_garbage_collection():
            from cedkv.runs.plan_text import show_plan

        show_plan(inputs, measured, rate, workers, target)
