"""``python -m benchmarks``: every measure, one table, ``outputs/bench.json``.

python -m benchmarks                  all, in about half an hour on two quiet cores
python -m benchmarks naive forward    these alone; nothing is written
python -m benchmarks --docs           put the figures of outputs/bench.json into docs/performance.md
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from benchmarks.common import ROOT, Row, failed
from benchmarks.machine import describe

MEASURES = ("overheads", "shared", "forward", "checks", "naive", "against_kvpress", "grid", "growth", "dtype", "gpu", "ray")
"""Those that start commands have their turn while this process is small."""
OUT, PAGE = ROOT / "outputs" / "bench.json", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- make bench: figures -->\n", "<!-- end of figures -->\n"


def measured(name: str) -> list[Row]:
    """The rows of a measure; one that breaks off is a row that does not hold, so that the others have their turn."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        found: list[Row] = importlib.import_module(f"benchmarks.{name}").rows()
    except Exception as error:
        found = [failed(name, error)]
    print(table(found), f"({time.perf_counter() - started:.0f} s)", sep="\n", file=sys.stderr, flush=True)
    return found


def table(rows: list[Row]) -> str:
    """Figures, targets and verdicts, aligned."""
    cells = [("value", "target", "holds", "figure"), *((*_cells(row), row["name"]) for row in rows)]
    widths = [max(len(cell[i]) for cell in cells) for i in range(3)]
    return "\n".join("  ".join([*(cell[i].ljust(widths[i]) for i in range(3)), cell[3]]) for cell in cells)


def _cells(row: Row) -> tuple[str, str, str]:
    verdict = {True: "yes", False: "NO", None: "-"}[row["holds"]]
    return "-" if row["value"] is None else f"{row['value']:g}", row["target"] or "-", verdict


def to_page(path: Path, page: Path) -> None:
    """Replace the figures between the marks of the page by those of a finished ``make bench``."""
    found = json.loads(path.read_text())
    machine, versions = found["machine"], found["versions"]
    lines = ["| figure | value | target | holds |", "| --- | --- | --- | --- |"]
    lines += [f"| {row['name']} | {' | '.join(_cells(row))} |" for row in found["rows"]]
    kind = f"{machine['cores']} cores of an {machine['architecture'].replace('_', '-')} machine ({machine['processor']}, " \
           f"{machine['torch_capability']})"  # fmt: skip
    lines += ["", f"{found['date']}, {kind}, {found['threads']} torch threads, torch {versions['torch']}, transformers "
              f"{versions['transformers']}, load when it began {machine['load_before'][0]:g}."]  # fmt: skip
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Exit code 1 when a measure failed; a target that is not reached is a figure, and no error."""
    if arguments == ["--docs"]:
        to_page(OUT, PAGE)
        return 0
    if set(arguments) - set(MEASURES):
        print(f"{' '.join(arguments)}: a measure is one of {', '.join(MEASURES)}", file=sys.stderr)
        return 2
    about = describe()
    rows = [row for name in arguments or MEASURES for row in measured(name)]
    print(table(rows))
    if not arguments:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps({"rows": rows, **about}, indent=1, allow_nan=False) + "\n")
        print(f"written to {OUT.relative_to(ROOT)}")
    return int(any(" failed: " in row["name"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
