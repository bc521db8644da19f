"""What all commands have in common: grouped help, readable usage errors, and options made from the table of short names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from cedkv.config.options import OPTIONS
from cedkv.core import stdio
from cedkv.core.text import sanitize

PHASE2_FLAGS = ("model_id", "device", "max_on", "max_off", "prefix_len", "select_mode", "dtype")
"""The options that are also flags of the command line (``--phase2-model-id``); ``--set`` reaches every key."""


@contextmanager
def _readable_usage() -> Iterator[None]:
    """click repeats what it does not understand as it stands, however long."""
    try:
        yield
    except click.UsageError as error:
        message = sanitize(error.format_message())
        if len(message) > 400:
            message = f"{message[:200]} [...] {message[-150:]}"
        raise click.UsageError(message, error.ctx) from None


class GroupedCommand(click.Command):
    """A command whose help lists options in groups; an option's group is the part of its help before ``|``."""

    def make_context(self, *given: Any, **more: Any) -> click.Context:
        with _readable_usage():
            return super().make_context(*given, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with _readable_usage():
            return super().invoke(ctx)

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


def program(command: click.Command, name: str) -> None:
    """Run a command as the program this process is."""
    stdio.tolerate_closed_streams()
    command(prog_name=name)


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """The options every command has: a file, any key, a run to go on with, and tracebacks."""
    command = click.option(
        "--debug", type=bool, is_flag=False, flag_value=True, default=False, metavar="true",
        help="Running|Show the traceback of an error.",
    )(command)  # fmt: skip
    command = click.option(
        "--resume", metavar="RUN_ID", help="Running|Go on with a run that was broken off, where it was: a folder in outputs/.",
    )(command)  # fmt: skip
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE,...",
        help="Configuration|Any configuration key: select.span_len=6,eval.off_samples=32. May be given again.",
    )(command)  # fmt: skip
    return click.option("--config", "path", metavar="FILE", help="Configuration|YAML file with a phase2 block.")(command)


def short_options(command: Callable[..., None]) -> Callable[..., None]:
    """The ``-P`` names, as options ``--select_mode``."""
    for name, (key, text) in reversed(OPTIONS.items()):
        command = click.option(f"--{name}", name, metavar="VALUE", help=f"-P names|{text} [{key}]")(command)
    return command


def phase2_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The flags of ``python -m cedkv``, as options ``--phase2-select-mode``."""
    for name in reversed(PHASE2_FLAGS):
        key, text = OPTIONS[name]
        flag = f"--phase2-{name.replace('_', '-')}"
        command = click.option(flag, name, metavar="VALUE", help=f"Phase 2|{text} [{key}]")(command)
    return command
