"""``python -m cedkv``: the suite from the command line. Heavy imports wait until a run is really asked for."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from cedkv import __version__
from cedkv.errors import CedkvError, ConfigError
from cedkv.options import COMPARISONS, OPTIONS

if TYPE_CHECKING:
    from cedkv.config import Phase2Config

PHASE2_FLAGS = ("model_id", "device", "max_on", "max_off", "prefix_len", "select_mode", "dtype")
"""The options that are also flags of the command line (``--phase2-model-id``); ``--set`` reaches every key."""


class GroupedCommand(click.Command):
    """A command whose help lists options in groups; an option's group is the part of its help before ``|``."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record:
                group, bar, text = record[1].partition("|")
                groups.setdefault(group if bar else "Other", []).append((record[0], text if bar else record[1]))
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl(rows)


class MainCommand(GroupedCommand, click.Group):
    """The program: without a subcommand it runs an evaluation."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """The two options every command has: a file, and any key."""
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE,...",
        help="Configuration|Any configuration key: select.span_len=6,eval.off_samples=32. May be given again.",
    )(command)  # fmt: skip
    return click.option("--config", "path", metavar="FILE", help="Configuration|YAML file with a phase2 block.")(command)


def execute(path: str | None, overrides: Sequence[str], options: Mapping[str, str | None], phase: Literal["1.5", "2"]) -> None:
    """Resolve the configuration, run, and exit: 0 done, 1 a gate failed and ``fail_on_gate`` is set, 2 an error."""

    def job(config: Phase2Config) -> bool:
        from cedkv.driver import run_phase2

        return all(run_phase2(config, phase).verdicts.values())

    _run(path, overrides, options, job)


def execute_comparison(
    name: str,
    path: str | None,
    overrides: Sequence[str],
    options: Mapping[str, str | None],
    lists: Mapping[str, str | None],
) -> None:
    """As ``execute``, for a comparison; ``fail_on_gate`` wants every condition's Gate A and the first one's Gate B."""

    def job(config: Phase2Config) -> bool:
        from cedkv.compare import run_comparison

        verdicts = [result.results.verdicts for result in run_comparison(name, config, lists)]
        return all(verdict["gateA"] for verdict in verdicts) and verdicts[0]["phase2"]

    _run(path, overrides, options, job)


def _run(
    path: str | None,
    overrides: Sequence[str],
    options: Mapping[str, str | None],
    job: Callable[[Phase2Config], bool],
) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a terminated run ends as FAILED, with its data
    try:
        from cedkv.config_sources import resolve

        config = resolve(path, overrides, options)
        passed = job(config)
    except CedkvError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    if config.runtime.fail_on_gate and not passed:
        click.echo("exit code 1: a gate did not pass (fail_on_gate)", err=True)
        sys.exit(1)


def short_options(command: Callable[..., None]) -> Callable[..., None]:
    """The ``-P`` names, as options ``--select_mode``."""
    for name, (key, text) in reversed(OPTIONS.items()):
        command = click.option(f"--{name}", name, metavar="VALUE", help=f"-P names|{text} [{key}]")(command)
    return command


def comparison_command(name: str) -> click.Command:
    """The entry point of a comparison: lists of settings, and every option of a single run."""

    def command(path: str | None, overrides: tuple[str, ...], **given: str | None) -> None:
        lists = {option: given.pop(option) for option in COMPARISONS[name]}
        execute_comparison(name, path, overrides, given, lists)

    body: Callable[..., None] = configured(short_options(command))
    for option, (key, text) in reversed(COMPARISONS[name].items()):
        body = click.option(f"--{option}", option, metavar="A,B,...", help=f"Conditions|{text} [{key}]")(body)
    about = "Evaluate several conditions on the same samples: a parent run, a nested run each, paired statistics, a page."
    return click.command(name, cls=GroupedCommand, help=about, context_settings={"max_content_width": 110})(body)


def _strict_only(value: str) -> None:
    if value.strip().lower() not in ("true", "1", "yes", "on"):
        raise ConfigError(
            f"--phase2-strict-hf {value} is refused: a verdict on a mock says nothing about a model, so strict is the only "
            "mode. Leave the flag out; a small real model needs no hub: --phase2-model-id smollm2-135m"
        )


def _phase2_flags(command: Callable[..., None]) -> Callable[..., None]:
    for name in reversed(PHASE2_FLAGS):
        key, text = OPTIONS[name]
        flag = f"--phase2-{name.replace('_', '-')}"
        command = click.option(flag, name, metavar="VALUE", help=f"Phase 2|{text} [{key}]")(command)
    return command


@click.group(
    cls=MainCommand, invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip
@click.option(
    "--phase", type=click.Choice(["1.5", "2"]), default="2", show_default=True,
    help="What to run|2: all arms, Gates A and B. 1.5: Gate A alone, does the cache pipeline hold on this model?",
)  # fmt: skip
@configured
@_phase2_flags
@click.option(
    "--phase2-strict-hf", "strict", is_flag=False, flag_value="true", default="true", metavar="true",
    help="Phase 2|Real weights or a clear error. Always on; switching it off is refused.",
)  # fmt: skip
@click.version_option(__version__, prog_name="cedkv")
@click.pass_context
def main(
    ctx: click.Context,
    /,
    phase: Literal["1.5", "2"],
    path: str | None,
    overrides: tuple[str, ...],
    strict: str,
    **options: Any,
) -> None:
    """Can a few spans of a demonstration's KV cache replace the whole demonstration, and do no harm elsewhere?

    Every run is an MLflow run (experiment "cedkv" unless MLflow's own environment says otherwise); its files are in
    outputs/RUN_ID. A failing gate is a finished run, exit code 0, unless runtime.fail_on_gate is set. Exit code 2 is an
    error, with the reason and a remedy.

    \b
    Examples:
      python -m cedkv --phase 2 --config configs/quickstart.yaml
      python -m cedkv --phase 2 --phase2-model-id smollm2-135m --phase2-select-mode random_span
      python -m cedkv --phase 1.5 --phase2-model-id /path/to/model
    """
    if ctx.invoked_subcommand is not None:
        return
    try:
        _strict_only(strict)
    except ConfigError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    execute(path, overrides, options, phase)
