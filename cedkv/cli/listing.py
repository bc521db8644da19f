"""``cedkv list``: what a configuration can name, one line each: selectors, tasks, models, checks."""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import MISSING, fields
from importlib.resources import files
from typing import Any

import click

from cedkv.cli.click_ext import GroupedCommand, report_errors
from cedkv.config.extensions import SELECTORS, TASKS
from cedkv.core.registry import Registry

Row = dict[str, Any]
"""Column -> value; the text shows the columns that a kind names in ``KINDS``, ``--json`` shows all."""


def _selectors() -> list[Row]:
    from cedkv.selectors.base import query_kind, selector_class

    rows = []
    for name in SELECTORS.names():
        cls = selector_class(name)
        # one built-in selector a file: what it chooses is said there, the class says how
        described = sys.modules[cls.__module__] if SELECTORS.provider(name) is None else cls
        rows.append(
            {
                "name": name,
                "role": cls.role,
                "query": query_kind(cls),
                "parameters": _parameters(cls),
                "provider": _provider(SELECTORS, name),
                "summary": _first_sentence(described),
            }
        )
    return rows


def _tasks() -> list[Row]:
    return [
        {
            "name": name,
            "parameters": _parameters(cls),
            "provider": _provider(TASKS, name),
            "summary": _first_sentence(cls),
        }
        for name, cls in ((name, TASKS.get(name)) for name in TASKS.names())
    ]


def _models() -> list[Row]:
    rows: list[Row] = json.loads((files("cedkv.models") / "families.json").read_text("utf-8"))["families"]
    return rows


def _checks() -> list[Row]:
    from cedkv.checks.base import CHECKS, all_checks

    return [
        {
            "name": check.key,
            "relation": check.relation,
            "unit": check.unit,
            "provider": _provider(CHECKS, check.key),
            "summary": check.meaning.replace("``", ""),
        }
        for check in all_checks()
    ]


KINDS = {
    "selectors": (_selectors, ("name", "role", "query", "summary")),
    "tasks": (_tasks, ("name", "summary")),
    "models": (_models, ("family", "model_type", "verdict", "remarks")),
    "checks": (_checks, ("name", "summary")),
}
"""Kind -> its rows, and the columns that are shown as text."""


def _provider(registry: Registry[Any], name: str) -> str:
    return registry.provider(name) or "cedkv"


def _parameters(cls: type) -> dict[str, Any]:
    """Return name -> default of a dataclass's fields, None where it has no plain default."""
    return {field.name: None if field.default is MISSING else field.default for field in fields(cls)}


def _first_sentence(documented: Any) -> str:
    paragraph = " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())
    return re.split(r"(?<!et al)\. ", paragraph)[0].rstrip(".").replace("``", "")


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@click.command("list", cls=GroupedCommand)
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.option("--json", "as_json", is_flag=True, help="All columns, as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def list_command(kind: str, as_json: bool, debug: bool) -> None:
    """List what there is by name, one line each, with what other installed packages bring.

    \b
    selectors  names for select.mode
    tasks      names for data.task
    models     families that work, or are rejected before their weights are loaded, and why
    checks     what the gates and the certificate ask
    """
    with report_errors(debug):
        rows_of, columns = KINDS[kind]
        rows = rows_of()
        if as_json:
            click.echo(json.dumps(rows, indent=1, ensure_ascii=False, default=str))
        else:
            click.echo(_aligned([tuple(str(row[column]) for column in columns) for row in rows]))
