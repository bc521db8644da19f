"""``python -m cedkv``: the command line. Heavy modules are imported only once a run has been resolved."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cedkv.cli.click_ext import (
    GroupedCommand,
    MainCommand,
    list_options,
    phase2_flags,
    report_errors,
    run_options,
    short_options,
    without_garbage_collection,
)
from cedkv.cli.completion import completion_command
from cedkv.cli.data import data_command
from cedkv.cli.export import export_command
from cedkv.cli.leaderboard import leaderboard_command
from cedkv.cli.listing import list_command
from cedkv.cli.planning import plan_command
from cedkv.config.options import COMPARISONS, DEFAULT_CONFIG, OPTIONS
from cedkv.core.errors import CedkvError, ConfigError
from cedkv.core.text import preview
from cedkv.core.version import __version__
from cedkv.runs.request import RunRequest

if TYPE_CHECKING:
    from cedkv.analysis.results import ConditionResult

TRUE = ("true", "1", "yes", "on")
"""Values that ``--phase2-strict-hf`` accepts."""


def execute(request: RunRequest, debug: bool = False) -> None:
    """Resolve a request, run it, and exit.

    Exit codes: 0 done; 1 a gate failed and ``fail_on_gate`` is set (in a comparison: any condition's Gate A, or the first
    condition's Gate B); 2 an error with a remedy; 3 the run was interrupted; 4 results safe, not logged; 128 + n ended by
    signal n.
    """
    received = _end_on_signals()
    if not sys.stderr.isatty():
        # tqdm reads the variable when it is imported; in a log the bars of all libraries would be thousands of lines
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        with report_errors(debug):
            _execute(request)
    except (SystemExit, KeyboardInterrupt):
        if received:  # the code may be another one: Ray replaces what a handler raises while its calls wait
            sys.exit(128 + received[0])
        raise


def _execute(request: RunRequest) -> None:
    from cedkv.runs.resolved import resolve_request

    resolved = resolve_request(request)
    with without_garbage_collection():
        from cedkv.runs.pipeline import run

    results = run(resolved)
    if resolved.config.runtime.fail_on_gate:
        _exit_if_failed(results)


def _exit_if_failed(results: Sequence[ConditionResult]) -> None:
    """Exit with code 1 if a gate that counts did not pass; a shard decides no gate."""
    verdicts = [result.results.verdicts for result in results]
    if not all(verdict["gateA"] for verdict in verdicts) or not all(all(first.values()) for first in verdicts[:1]):
        click.echo("exit code 1: a gate did not pass (fail_on_gate)", err=True)
        sys.exit(1)


def request_of(command: str, parameters: dict[str, Any]) -> RunRequest:
    """Return the request that a command's click parameters describe.

    A resumed run has a configuration of its own, so the default configuration that MLproject passes is ignored then.
    """
    path, resume = parameters["path"], parameters["resume"]
    return RunRequest(
        command,
        None if resume is not None and path == DEFAULT_CONFIG else path,
        parameters["overrides"],
        {name: parameters[name] for name in OPTIONS if name in parameters},
        parameters.get("phase"),
        {name: parameters[name] for name in COMPARISONS.get(command, {})},
        resume,
    )


def _end_on_signals() -> list[int]:
    """Let SIGTERM, SIGINT and SIGHUP unwind the run, so that it ends as KILLED with its data; further signals are ignored.

    Returns:
        The signal that ended the run, once there is one.
    """
    received: list[int] = []

    def end(signal_number: int, _: object) -> None:
        for handled in handled_signals:
            signal.signal(handled, signal.SIG_IGN)
        with suppress(OSError):  # not by sys.stderr: the signal may have come while something was being written to it
            os.write(2, f"{signal.Signals(signal_number).name}: ending the run ...\n".encode())
        received.append(signal_number)
        sys.exit(128 + signal_number)

    names = ("SIGTERM", "SIGINT", "SIGHUP")  # a signal the parent process ignores (nohup) stays ignored
    handled_signals = [getattr(signal, n) for n in names if signal.getsignal(getattr(signal, n, 0)) is not signal.SIG_IGN]
    for handled in handled_signals:
        signal.signal(handled, end)
    return received


def comparison_command(name: str) -> click.Command:
    """Return the command of a comparison: its list options, and every option of a single run."""

    def run_comparison(**parameters: Any) -> None:
        execute(request_of(name, parameters), parameters["debug"])

    command = list_options(COMPARISONS[name], run_options(short_options(run_comparison)))
    summary = (
        f"{name.replace('_', ' ').capitalize()}: several conditions on the same samples, a parent run with a nested run each, "
        "paired statistics, a page."
    )
    return click.command(name, cls=GroupedCommand, help=summary, context_settings={"max_content_width": 110})(command)


def _check_strict(value: str) -> None:
    if value.strip().lower() not in TRUE:
        raise ConfigError(
            f"--phase2-strict-hf {preview(value)} is rejected: a verdict on a mock says nothing about a model, so strict is "
            "the only mode. Leave the flag out; a small real model needs no hub: --phase2-model-id smollm2-135m"
        )


@click.group(
    cls=MainCommand,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--phase",
    type=click.Choice(["1.5", "2"]),
    help="What to run|2 (default): all arms, Gates A and B. 1.5: Gate A alone, does the cache pipeline hold on this model?",
)
@run_options
@click.option("--shard", metavar="I/N", help=f"Running|{OPTIONS['shard'][1]} [{OPTIONS['shard'][0]}]")
@phase2_flags
@click.option(
    "--phase2-strict-hf",
    "strict",
    is_flag=False,
    flag_value="true",
    default="true",
    metavar="true",
    help="Phase 2|Real weights or a clear error. Always on; switching it off is rejected.",
)
@click.version_option(__version__, prog_name="cedkv")
@click.pass_context
def main(
    ctx: click.Context,
    /,
    strict: str,
    **parameters: Any,
) -> None:
    """Can a few spans of a demonstration's KV cache replace the whole demonstration, and do no harm elsewhere?

    Every run is an MLflow run (experiment "cedkv" unless MLflow's own environment says otherwise); its files are in
    outputs/RUN_ID (the variable CEDKV_OUTPUTS names another folder than outputs). A failing gate is a finished run, exit code
    0, unless runtime.fail_on_gate is set.

    \b
    Exit codes:
      0    done
      1    done, a gate did not pass, and runtime.fail_on_gate is set
      2    an error of input, model, numbers or environment, with the reason and a remedy
      3    the run was interrupted (a full disk, a defect); --resume RUN_ID continues it
      4    done, the results are safe in outputs/RUN_ID, but not logged; sync logs them
      128+n  ended by signal n (130 SIGINT, 143 SIGTERM), the run is KILLED; --resume continues it

    \b
    Examples:
      python -m cedkv --phase 2 --phase2-model-id smollm2-135m
      python -m cedkv --phase 2 --config my.yaml --phase2-select-mode random_span
      python -m cedkv --phase 1.5 --phase2-model-id /path/to/model
      python -m cedkv --resume 8da8f583e4b141b0874737737cefbd5a
      python -m cedkv sync outputs/8da8f583e4b141b0874737737cefbd5a
      python -m cedkv ablate-selector --model_id smollm2-135m --select_modes all --max_on 16
      python -m cedkv plan --comparison ablate_selector --model_id smollm2-135m --select_modes all
      python -m cedkv merge outputs/8da8f583e4b141b0874737737cefbd5a outputs/1f6e2c7d90ab4c0fb7c2a1d5e8f30946
    """
    if ctx.invoked_subcommand is not None:
        return
    with report_errors(parameters["debug"]):
        _check_strict(strict)
    execute(request_of("phase2" if parameters["resume"] is None else "any", parameters), parameters["debug"])


for _name in COMPARISONS:
    main.add_command(comparison_command(_name), _name.replace("_", "-"))
main.add_command(data_command)
main.add_command(plan_command)
main.add_command(leaderboard_command)
main.add_command(list_command)
main.add_command(completion_command)
main.add_command(export_command)


@main.command("sync", cls=GroupedCommand)
@click.argument("folder", metavar="RUN_DIR")
@click.option("--experiment", metavar="NAME", help="Log the folder as a new run, in the experiment of this name.")
@click.option("--timeout", type=click.IntRange(4, 3600), default=60, show_default=True, help="Longest wait per call (s).")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def sync_command(folder: str, experiment: str | None, timeout: int, debug: bool) -> None:
    """Log a run to MLflow from its folder (outputs/RUN_ID).

    For a run that was not logged, was interrupted, or was logged in part. It may be called again: what is logged already
    stays as it is. A run that could not set its status (kill -9, power loss) is ended as KILLED. Where the run or its
    experiment was deleted in MLflow, --experiment logs the folder, and the conditions of a comparison, as new runs. Exit code
    4: MLflow still does not have everything.
    """
    with report_errors(debug):
        from cedkv.runs.lifecycle import sync

        sync(
            Path(os.path.abspath(folder)), timeout, click.echo, experiment
        )  # absolute: the folder's name, also of ".", is the run id


@main.command("merge", cls=GroupedCommand)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def merge_command(runs: tuple[str, ...], debug: bool) -> None:
    """Make the one run of all its shards (runtime.shard = 1/n to n/n), identical to an undivided one in the same units.

    RUN is a shard's folder, or the id of a run in outputs/. No model is loaded. Shards that differ in anything their results
    depend on, that are missing, not finished or there twice are rejected. The merged run is a new one, in outputs/ and in
    MLflow; the shards remain as they are. Exit codes are those of a run.
    """
    _end_on_signals()
    with report_errors(debug):
        with without_garbage_collection():
            from cedkv.runs.merge import merge

        results = merge(runs)
        if results[0].config.runtime.fail_on_gate:
            _exit_if_failed(results)


@main.command("report", cls=GroupedCommand)
@click.argument("folder", metavar="RUN_DIR")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report_command(folder: str, debug: bool) -> None:
    """Render a finished run again from its folder (outputs/RUN_ID).

    Page, tables, figures and files are written; no model is loaded. The same version of cedkv writes the same bytes. The
    nested runs of a comparison are rendered too. MLflow is not called; sync logs what was written.
    """
    with report_errors(debug):
        with without_garbage_collection():
            from cedkv.runs.render import render_again

        render_again(Path(os.path.abspath(folder)), click.echo)


@main.command("certify", cls=GroupedCommand)
@click.option("--model-id", "model_id", metavar="VALUE", help="Hub id, local folder, GGUF file, or smollm2-135m.")
@click.option("--revision", "model_revision", metavar="VALUE", help="Branch, tag or commit of a hub model.")
@click.option("--device", metavar="VALUE", help="auto, cpu, cuda, cuda:N, mps.")
@click.option("--dtype", metavar="VALUE", help="float32, bfloat16, float16.")
@click.option("--config", "path", metavar="FILE", help="YAML file with a phase2 block.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE,...", help="Any configuration key.")
@click.option("--json", "target", metavar="FILE", help="Write the figures, or the reason of a rejection, to a file.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def certify_command(
    path: str | None, overrides: tuple[str, ...], target: str | None, debug: bool, **options: str | None
) -> None:
    """Check that this suite computes what the model computes by itself.

    The certificate is measured anew and stored.

    \b
    Exit codes:
      0    certified
      2    rejected before its weights were loaded (or it cannot be loaded), with the reason
      3    a check failed
    """
    with report_errors(debug):
        from cedkv.core.files import write_json

        try:
            from cedkv.checks import certificate
            from cedkv.config.resolve import resolve
            from cedkv.models import loading
            from cedkv.models.fingerprint import fingerprint

            config = resolve(path, overrides, options)
            lm = loading.load(config)
            certified = certificate.certify(lm, fingerprint(lm), config.model.cache_dir)
        except CedkvError as error:
            if target is not None:
                write_json(Path(target), {"certified": False, "refused": str(error)})
            raise
        if target is not None:
            write_json(Path(target), certified.as_dict())
        click.echo(certified.heading())
        click.echo(certified.table())
        failed = certified.failed([])
        click.echo(f"not certified: {', '.join(failed)}" if failed else f"certified ({certified.seconds:g} s)")
        sys.exit(3 if failed else 0)
