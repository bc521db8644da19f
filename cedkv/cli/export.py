"""``python -m cedkv export``: a run's tables as CSV or Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from cedkv.cli.click_ext import GroupedCommand, report_errors


@click.command("export", cls=GroupedCommand)
@click.argument("run", metavar="RUN")
@click.option("--to", type=click.Choice(["csv", "parquet"]), default="csv", show_default=True, help="Format of the files.")
@click.option("--out", metavar="DIR", help="Where to write them; RUN_ID-csv or RUN_ID-parquet by default.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def export_command(run: str, to: Literal["csv", "parquet"], out: str | None, debug: bool) -> None:
    """Write a finished run's tables as files: CSV or Parquet.

    RUN is a folder (outputs/RUN_ID) or the id of a run that MLflow has. Tables: on, off, selections, metrics, checks and
    comparisons; of a comparison conditions too, and all of its conditions in each table, told apart by the first column.
    """
    with report_errors(debug):
        from cedkv.library.export import export
        from cedkv.library.runs import read_run

        found = read_run(run)
        for path in export(found, to, Path(out or f"{found.run_id}-{to}")):
            click.echo(path)
