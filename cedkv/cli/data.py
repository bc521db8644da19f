"""``cedkv data``: show samples as a model gets them; ``shown_samples``, which does it, is imported when it is called."""

from __future__ import annotations

import sys

import click

from cedkv.cli.click_ext import GroupedCommand, report_errors, short_options, without_garbage_collection
from cedkv.core.errors import ConfigError
from cedkv.core.text import preview


@click.command("data", cls=GroupedCommand, context_settings={"max_content_width": 110})
@click.argument("file", required=False)
@click.option("--show", type=click.IntRange(0, 1000), default=3, show_default=True, help="Samples|How many are shown as text.")
@click.option("--out", "target", metavar="FILE", help="Samples|Write the episodes as JSON Lines, which on_path reads back.")
@click.option("--off", is_flag=True, help="Samples|FILE holds OFF prompts, and these are shown.")
@click.option("--config", "path", metavar="FILE", help="Configuration|YAML file with a phase2 block.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE,...", help="Configuration|Any configuration key.")
@click.option("--debug", is_flag=True, help="Running|Show the traceback of an error.")
@short_options
def data_command(
    file: str | None,
    show: int,
    target: str | None,
    off: bool,
    path: str | None,
    overrides: tuple[str, ...],
    debug: bool,
    **options: str | None,
) -> None:
    """Show what the samples of FILE, or of --task, are to a model, without its weights.

    FILE holds episodes, or rows that episodes are built from: JSON Lines, a JSON list, CSV or Parquet (docs/data.md). Three
    episodes are shown as text with the kinds of their tokens, then counts, lengths in tokens, what cannot be used and why, and
    the command that runs them.
    """
    with report_errors(debug):
        name = "off_path" if off else "on_path"
        if file is not None and options[name] is not None:
            raise ConfigError(f"FILE {preview(file)} and --{name} {preview(options[name])} both name the samples; give one")
        with without_garbage_collection():
            from cedkv.cli.shown_samples import show_data

        options[name] = file or options[name]
        show_data(path, overrides, options, show, target, off, click.echo, sys.stdout.isatty())
