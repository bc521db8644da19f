"""Parts that all commands share: grouped help, short usage errors, and options built from the table of short names."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from cedkv.cli.environment import explain_import
from cedkv.config.extensions import REGISTRIES
from cedkv.config.options import OPTIONS
from cedkv.core import stdio, threads
from cedkv.core.errors import CedkvError
from cedkv.core.text import escape_control, one_line, redact, sanitize, shorten

PHASE2_FLAGS = ("model_id", "device", "max_on", "max_off", "prefix_len", "select_mode", "dtype")
"""The options that are also flags of the command line (``--phase2-model-id``); ``--set`` reaches every key."""


@contextmanager
def _short_usage_errors() -> Iterator[None]:
    """Sanitize and shorten click's usage errors, which quote an argument in full, however long."""
    try:
        yield
    except click.UsageError as error:
        # click lists the choices of an argument one a line
        message = sanitize(error.format_message().replace("\n\t", " "))
        raise click.UsageError(shorten(message, 400), error.ctx) from None


class GroupedCommand(click.Command):
    """A command whose help lists options in groups; an option's group is the part of its help before ``|``."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _short_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _short_usage_errors():
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
    """The main program, which runs an evaluation where no subcommand is given; its help lists subcommands last.

    Without any argument it prints its help: an evaluation of the default model would fetch gigabytes that nobody asked for.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def program(command: click.Command, name: str) -> None:
    """Run a command as the main program of this process, under the given name."""
    stdio.tolerate_closed_streams()
    threads.choose()
    try:
        command(prog_name=name)
    finally:
        gc.freeze()  # what ends with the process needs no collection, which would take a second


@contextmanager
def report_errors(debug: bool) -> Iterator[None]:
    """Turn an exception into one message and an exit code; with ``debug`` a traceback is printed too."""
    try:
        yield
    except Exception as error:
        if debug:
            click.echo(escape_control(redact(traceback.format_exc())), err=True)
        if isinstance(error, CedkvError):
            click.echo(f"Error: {sanitize(str(error))}", err=True)
            sys.exit(error.exit_code)
        unusable = explain_import(error) if isinstance(error, ImportError) else None
        if unusable is not None:
            click.echo(f"Error: {sanitize(unusable)}", err=True)
            sys.exit(2)
        message = one_line(f"{type(error).__name__}: {error}")
        click.echo(f"Error: unexpected error: {message}\nUse --debug to see where (-P debug=true), and report it", err=True)
        sys.exit(3)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import heavy modules in the block without garbage collection, and exempt their objects from later collections.

    torch, transformers and mlflow create a million objects that stay: scanning them costs seconds and finds no garbage.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def names_of(key: str) -> Callable[[click.Context, click.Parameter, str], list[str]] | None:
    """Return the shell completion of an option that takes registered names, or a list of them; None for any other key.

    No implementation is imported: registries know their names.
    """
    registry = REGISTRIES.get(key)
    if registry is None:
        return None

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in registry.names() if name.startswith(begun)]

    return complete


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that reads a whole configuration: ``--config``, ``--set`` and ``--debug``."""
    command = click.option(
        "--debug",
        type=bool,
        is_flag=False,
        flag_value=True,
        default=False,
        metavar="true",
        help="Running|Show the traceback of an error.",
    )(command)
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE,...",
        help="Configuration|Any configuration key: select.span_len=6,eval.off_samples=32. May be repeated.",
    )(command)
    return click.option("--config", "path", metavar="FILE", help="Configuration|YAML file with a phase2 block.")(command)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that makes a run: ``config_options``, and ``--resume``."""
    command = click.option(
        "--resume",
        metavar="RUN_ID",
        help="Running|Continue an interrupted run from its last finished unit; RUN_ID is a folder in outputs/.",
    )(command)
    return config_options(command)


def short_options(command: Callable[..., None], with_flags: bool = False) -> Callable[..., None]:
    """Add the ``-P`` names as options: ``--select_mode``; ``with_flags`` also as ``phase2_flags`` spell them."""
    for name, (key, text) in reversed(OPTIONS.items()):
        spellings = [f"--{name}", _flag(name)] if with_flags and name in PHASE2_FLAGS else [f"--{name}"]
        command = click.option(
            *spellings, name, metavar="VALUE", help=f"-P names|{text} [{key}]", shell_complete=names_of(key)
        )(command)
    return command


def list_options(options: Mapping[str, tuple[str, str]], command: Callable[..., None]) -> Callable[..., None]:
    """Add the list options of a comparison (of ``COMPARISONS``)."""
    for option, (key, text) in reversed([*options.items()]):
        command = click.option(
            f"--{option}", option, metavar="A,B,...", help=f"Conditions|{text} [{key}]", shell_complete=names_of(key)
        )(command)
    return command


def phase2_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags of ``python -m cedkv``: ``--phase2-select-mode``."""
    for name in reversed(PHASE2_FLAGS):
        key, text = OPTIONS[name]
        command = click.option(
            _flag(name), name, metavar="VALUE", help=f"Phase 2|{text} [{key}]", shell_complete=names_of(key)
        )(command)
    return command


def _flag(name: str) -> str:
    return f"--phase2-{name.replace('_', '-')}"
