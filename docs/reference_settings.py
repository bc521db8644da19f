"""Tables that ``reference.py`` makes of the configuration's schema and of the records' field docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cedkv.checks.base import all_checks
from cedkv.config.options import OPTIONS
from cedkv.config.schema import Phase2Config

ROOT = Path(__file__).parents[1]
MADE = "<!-- made by `make docs`; edit the code it is made from -->\n"
_RECORDS = re.compile(r"(<!-- records: (\w+) -->\n).*?(<!-- /records -->\n)", re.DOTALL)
_CONFIGURATION = """\
`configs/phase2.yaml` spells out the same defaults. A file of yours holds what differs: `-P config=my.yaml`, `--config
my.yaml`. `-P` takes the short names (`-P select_mode=snapkv`), and with `-P set='select.span_len=6,eval.off_samples=32'` any
key; so do `--set` on the command line, and keywords of the library. Named options go over `set`, and `set` over the file. A
misspelled name is an error with the nearest valid one. The run itself has the names `config`, `set`, `phase` (`1.5`: Gate A
alone), `resume` and `debug`. Lists of comparisons: [Comparing](comparing.md).
"""
_ENVIRONMENT = """\
## Environment variables

| variable | meaning |
| --- | --- |
| `CEDKV_OUTPUTS` | folder of runs, absolute or from the working folder on; unset: `outputs` |
| `CEDKV_CERTIFICATES` | folder of certificates and head weights; unset: in the cache (`model.cache_dir`) |
| `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `MLFLOW_EXPERIMENT_ID` | where runs are logged ([MLflow](mlflow.md)) |
| `MLFLOW_RUN_ID` | set by `mlflow run`: the run that is taken over |
| `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`, `HF_ENDPOINT` | of the hub's client |
| `HTTP_PROXY`, `HTTPS_PROXY`, `NO_PROXY` | clients of MLflow and the hub ([MLflow is away](reliability.md#mlflow-is-away)) |
"""


def configuration() -> str:
    """Return the page of all configuration keys: short name, values, default, meaning."""
    shorts = {key: name for name, (key, _) in OPTIONS.items()}
    remarks, schema = _remarks(), Phase2Config.model_json_schema()
    blocks: dict[str, str] = {}
    for dotted, default in Phase2Config().dotted().items():
        key = dotted.removeprefix("phase2.")
        block, _, name = key.rpartition(".")
        properties = schema["$defs"][_class_of(schema, block)]["properties"] if block else schema["properties"]
        short = f"`{shorts[key]}`" if key in shorts else "–"
        cells = (f"`{key}`", short, _values(properties[name], schema), f"`{_written(default)}`", _meaning(key, remarks))
        blocks.setdefault(block, "")
        blocks[block] += f"| {' | '.join(cells)} |\n"
    head = "| key | `-P` name | values | default | meaning |\n| --- | --- | --- | --- | --- |\n"
    titled = [f"## {block}\n\n{_about(schema, block)}\n\n{head}{rows}" for block, rows in blocks.items() if block]
    return f"# Configuration\n\n{MADE}\n{_CONFIGURATION}\n" + "\n".join([f"{head}{blocks['']}", *titled, _ENVIRONMENT])


def _class_of(schema: Mapping[str, Any], block: str) -> str:
    reference: str = schema["properties"][block]["$ref"]
    return reference.rpartition("/")[2]


def _about(schema: Mapping[str, Any], block: str) -> str:
    """Return the first sentence of a block's docstring."""
    text: str = schema["$defs"][_class_of(schema, block)]["description"]
    return text.partition("\n\n")[0].replace("``", "`")


def _remarks() -> dict[str, str]:
    """Return the comment of each key of ``configs/phase2.yaml`` that has one."""
    remarks, blocks = {}, []
    for line in (ROOT / "configs" / "phase2.yaml").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"( *)(\w+):(.*?)(?: # (.*))?$", line):
            indent, name, _, remark = match.groups()
            blocks = [*blocks[: len(indent) // 2], name]
            if remark:
                remarks[".".join(blocks[1:])] = remark.strip()
    return remarks


def _meaning(key: str, remarks: Mapping[str, str]) -> str:
    """Return what a key means: the checks that it is the limit of, its remark in the file, or its option's help.

    Raises:
        LookupError: none of them says it.
    """
    checks = [check for check in all_checks() if f"thresholds.{getattr(check, 'threshold', None)}" == key]
    helps = dict(OPTIONS.values())
    limits = "limit of " * bool(checks) + ", ".join(f"`{check.name}`" for check in checks)
    texts = [text for text in (limits, remarks.get(key) or helps.get(key, "")) if text]
    if not texts:
        raise LookupError(f"{key} has no meaning: give it a remark in configs/phase2.yaml")
    return cell("; ".join(texts))


def _values(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return which values a key takes, out of its JSON schema."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_values(part, schema) for part in field["anyOf"]))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = field["type"]
    if kind in ("integer", "number"):
        least, most = field.get("minimum"), field.get("maximum")
        if least is None:
            return str(kind)
        return f"{kind} ≥ {least}" if most is None or most > 10**9 else f"{kind} {least} to {most:,}"
    return {"string": "text", "boolean": "true, false", "null": "null", "object": "mapping", "array": "list"}[kind]


def _written(default: Any) -> str:
    """Return a default as YAML writes it."""
    return yaml.safe_dump(default, default_flow_style=True, width=1000).partition("\n")[0]


def with_records(page: str) -> str:
    """Return a page with the table of each record class that it names in a marker ``records: OnRecord``."""
    tables = _record_tables()
    return _RECORDS.sub(lambda match: f"{match[1]}{tables[match[2]]}{match[3]}", page)


def record_classes() -> list[str]:
    """Return the names of all record classes."""
    return list(_record_tables())


def _record_tables() -> dict[str, str]:
    """Return a table of fields for each class of ``records.py``; fields of a base class come first.

    Raises:
        LookupError: a field has no docstring.
    """
    module = ast.parse((ROOT / "cedkv" / "records.py").read_text(encoding="utf-8"))
    rows: dict[str, str] = {}
    for made in module.body:
        if isinstance(made, ast.ClassDef):
            inherited = "".join(rows.get(ast.unparse(base), "") for base in made.bases)
            rows[made.name] = inherited + "".join(
                _field_row(made.name, field, after)
                for field, after in zip(made.body, [*made.body[1:], None], strict=True)
                if isinstance(field, ast.AnnAssign)
            )
    return {name: f"| field | type | meaning |\n| --- | --- | --- |\n{text}" for name, text in rows.items()}


def _field_row(record: str, field: ast.AnnAssign, after: ast.stmt | None) -> str:
    name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
    if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
        raise LookupError(f"records.{record}.{name} has no docstring")
    optional = kind.startswith("NotRequired[")
    kind = kind.removeprefix("NotRequired[").removesuffix("]" if optional else "").replace("'", '"').replace(" | ", " or ")
    meaning = " ".join(str(after.value.value).split())
    return f"| `{name}` | `{kind}`{' (not always)' if optional else ''} | {cell(meaning)} |\n"


def cell(text: str) -> str:
    """Return text of a docstring for a cell of a markdown table."""
    return text.replace("``", "`").replace("|", r"\|")
