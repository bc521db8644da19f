"""``mlflow run . -e phase2_eval``: every ``-P name=value`` arrives here as ``--name value``."""

from __future__ import annotations

from typing import Any

from cedkv.cli.environment import explained_imports

with explained_imports():
    import click

    from cedkv.cli.app import execute, request_of
    from cedkv.cli.click_ext import GroupedCommand, program, run_options, short_options


@click.command(cls=GroupedCommand, context_settings={"max_content_width": 110})
@click.option("--phase", type=click.Choice(["1.5", "2"]), help="What to run|2 (default): everything. 1.5: Gate A alone.")
@run_options
@short_options
def main(**parameters: Any) -> None:
    """Evaluate base, teacher, select and random arms on one model: Gates A and B, one MLflow run."""
    execute(request_of("phase2", parameters), parameters["debug"])


if __name__ == "__main__":
    program(main, "phase2_eval")
