"""The pages of docs/ that are made from the code: ``python docs/reference.py`` writes them, ``--check`` says which are stale.

Gates, selectors and tasks come from their registries, the tree of modules from the first line of each docstring, settings from
the configuration's schema, and fields of records from their docstrings (``reference_settings.py``).
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from reference_settings import MADE, cell, configuration, with_records

from cedkv.checks.base import Check, MeasuredCheck, all_checks
from cedkv.checks.probe import ProbeCheck
from cedkv.config.data import DataBlock
from cedkv.config.extensions import SELECTORS, TASKS
from cedkv.config.schema import KL_LIMIT, Phase2Config
from cedkv.selectors.base import Selector, selector_class
from cedkv.tasks.base import GIVEN, Task, TaskRequest
from cedkv.testing import WordTokenizer

DOCS = Path(__file__).parent
PACKAGES = (
    *("core", "config", "metrics_phase2.py", "kv", "tasks", "selectors", "conditions.py", "models", "inference"),
    *("records.py", "recording.py", "checks", "units.py", "eval_phase2.py", "analysis", "report", "runs", "library"),
    *("cli", "testing.py"),
)
"""In the order of their imports."""
FLOW = "config, tasks, teacher's evidence, selection, placement, prefix, answers, records, checks, analysis, report, tracking"
_GATES = (
    "A check compares an observed value with a limit. A gate passes when each of its checks does; what cannot be decided, "
    "for want of samples or of a finite number, is `insufficient` and never a pass. Gate A asks whether the cache "
    "pipeline holds on this very model, Gate B whether the prefix helps and does no harm, the certificate whether this "
    "suite computes on the model what the model computes by itself. A precondition is part of no gate: where it does not hold, "
    "the gates say less than they seem to. The tag of a check is `gateA.name` or `gateB.name`, and of a precondition its name; "
    "a limit in code is a key of `thresholds`. Below each table: what is measured, why, and what the check cannot see."
)
_SELECTORS = (
    "`select.mode` names one. All choose from the same candidates under the same budget (`span_budget` spans of "
    "`span_len` tokens, starts `min_span_distance` apart), except those that say otherwise. A *reference* is compared "
    "with and never wins a comparison; an *oracle* is a reference that knows the answer. How to add one: "
    "[extending.md](extending.md)."
)
_WHEN = {
    "the best answers to a query, where a demo is solved examples": "`whole_shots` as in `configs/recommended.yaml` "
    "([Evidence](evidence.md))",
    "a demo that is plain text, without examples": "`attention_diversity_span`; `value_weighted_attention` where the model's "
    "output projection is known",
    "one prefix for many queries about a demo": "a choice that does not depend on the query: `replay`, `expected_attention`, "
    "`key_norm`, `lagkv`",
    "what the teacher's answer rests on, at any price": "`causal_drop_span`, `context_cite`; `span_drop` is the closed form, "
    "at the price of attention",
    "no attention to read at all": "`delimiter_span`, `key_norm`, `key_difference`",
    "a method of the literature under the same budget": "`snapkv`, `tova`, `accumulated_attention` (H2O), `lagkv`, `replay` "
    "(KVzip), `fitted_heads` (AT2)",
    "the least that a selector has to beat": "`random_span`, `stratified_random_span`, `sink_recent`, `wrong_demo`",
    "the most that it can reach": "`oracle_span`, `greedy_teacher`, `full_demo`",
}
_TASKS = (
    "`data.task` names one (`-P task=needle`), `data.params` has its parameters (`-P set='data.params={depth: 0.5}'`). No task "
    "needs a file. A demo is `data.pairs` shots long, or as many as fit `data.demo_tokens` tokens, up to thousands. "
    "`data.template` writes a shot in another way than shown here, and `data.format=chat` as two turns of the chat template. "
    "What is asked and answered occurs in no OFF prompt. Every episode is drawn from the seed and its own id: more samples "
    "leave the first ones as they are. Each has its shots, another query about the same demo, and gold, the shot that answers, "
    "but where the table says otherwise. How to add one: [extending.md](extending.md)."
)
_ARCHITECTURE = (
    "A package imports only packages above it in the tree; `make check` holds that (`[tool.importlinter]` in "
    "`pyproject.toml`). A request is read once (`runs.resolved`). The engine (`eval_phase2`) plans units and runs every "
    "arm of a unit; the journal keeps the records of finished units; `runs.publish` reads them once and writes everything "
    "else. The only file that touches the inside of a Hugging Face cache is `kv.cache`; the only ones that call "
    "`from_pretrained` are in `models`; the only one that imports mlflow is `runs.tracking`."
)


def main() -> int:
    """Write the pages, or with ``--check`` name those that are stale and return 1."""
    pages = {
        "gates.md": gates(),
        "selectors.md": selectors(),
        "tasks.md": tasks(),
        "architecture.md": architecture(),
        "configuration.md": configuration(),
        "outputs.md": with_records((DOCS / "outputs.md").read_text(encoding="utf-8")),
    }
    stale = [name for name, text in pages.items() if not _same(DOCS / name, text)]
    if "--check" in sys.argv[1:]:
        print("\n".join(f"docs/{name} is stale: run make docs" for name in stale))
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(pages[name], encoding="utf-8")
    return 0


def gates() -> str:
    """Return the page of all checks: meaning, measure, unit, limit, use."""
    checks = [check for check in all_checks() if type(check).__module__.startswith("cedkv.")]
    by_dtype = ", ".join(f"{limit:g} in {dtype}" for dtype, limit in KL_LIMIT.items())
    use = (
        f"*by dtype* is the KL limit for two mathematically identical computations: {by_dtype}. *floor*: the largest KL of the "
        "check is part of the numerical floor. *certificate*: the certificate measures it too, on a probe made of the model's "
        "own vocabulary."
    )
    parts = [f"# Gates and checks\n\n{MADE}\n{_paragraph(_GATES)}\n\n{_paragraph(use)}\n"]
    titles = {
        "Gate A: the plumbing": "A",
        "Gate B: the effect": "B",
        "Preconditions: what the gates rest on": "precondition",
        "Certificate only": None,
    }
    for title, gate in titles.items():
        rows = [_check_row(check) for check in checks if check.gate == gate]
        head = "| check | means | limit | unit | use |\n| --- | --- | --- | --- | --- |\n"
        parts.append(f"## {title}\n\n{head}" + "".join(rows) + _measures(checks, gate))
    return "\n".join(parts).rstrip() + "\n"


def _check_row(check: Check) -> str:
    use = []
    if isinstance(check, MeasuredCheck):
        use = [word for word, holds in (("floor", check.counts_to_floor), ("certificate", check.certified)) if holds]
    relation = "≤" if check.relation == "<=" else "≥"
    return f"| `{check.name}` | {cell(check.meaning)} | {relation} {_limit(check)} | {check.unit} | {', '.join(use)} |\n"


def _limit(check: Check) -> str:
    if check.threshold:
        value = getattr(Phase2Config().thresholds, check.threshold)
        of_floor = " × the numerical floor" if check.threshold.endswith("_over_floor_min") else ""
        return f"`{check.threshold}` ({'by dtype' if value is None else f'{value:g}'}){of_floor}"
    if isinstance(check, MeasuredCheck):
        return _in_float32([check.limit(Phase2Config.model_validate({"runtime": {"torch_dtype": d}})) for d in KL_LIMIT])
    if isinstance(check, ProbeCheck):
        return _in_float32([check.limit(dtype, limit) for dtype, limit in KL_LIMIT.items()])
    return "the random arm's accuracy"


def _in_float32(by_dtype: Sequence[float]) -> str:
    """Return a limit that the code fixes, given its values by dtype, float32 first."""
    return f"{by_dtype[0]:.4g}" + (" in float32" if len(set(by_dtype)) > 1 else "")


def _measures(checks: Sequence[Check], gate: str | None) -> str:
    """Return what is measured, why, and what is not seen, in the words of the docstrings below their first line.

    Raises:
        LookupError: a docstring lacks the reason, or what the check cannot see.
    """
    lines = []
    for check in checks:
        _, _, rest = (inspect.getdoc(type(check)) or "").partition("\n\n")
        text = " ".join(rest.split()).replace("``", "`")
        if "Why: " not in text or "Cannot see: " not in text:
            raise LookupError(f"{type(check).__name__}: say 'Why: ...' and 'Cannot see: ...' in its docstring")
        if check.gate == gate:
            text = text.replace("Why: ", "*Why*: ").replace("Cannot see: ", "*Cannot see*: ")
            lines.append(f"- **`{check.name}`**. {text}\n")
    return "\n" + "".join(lines)


def selectors() -> str:
    """Return the page of all selectors, grouped by whether they look at the query."""
    parts = [f"# Selectors\n\n{MADE}\n{_paragraph(_SELECTORS)}\n"]
    when = "".join(f"| {purpose} | {choice} |\n" for purpose, choice in _WHEN.items())
    parts.append(f"## Which one, and when\n\n| for | take |\n| --- | --- |\n{when}")
    names = list(SELECTORS.builtin)
    for title, aware in (("The choice depends on the query", True), ("The choice does not depend on the query", False)):
        rows = [_selector_row(name, selector_class(name)) for name in names if selector_class(name).query_aware is aware]
        head = "| name | role | keeps | needs besides attention | parameters |\n| --- | --- | --- | --- | --- |\n"
        parts.append(f"## {title}\n\n{head}" + "".join(rows))
    texts = {name: _formula(selector_class(name)) for name in names}
    return "\n".join(
        [*parts, "## Formulas and sources\n", *(f"**`{name}`**. {text}\n" for name, text in texts.items() if text)]
    )


def _formula(cls: type[Selector]) -> str:
    """Return what a selector's module says after its first sentence, one paragraph."""
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return _paragraph(" ".join(module.partition("\n\n")[2].split()))


def _selector_row(name: str, cls: type[Selector]) -> str:
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    keeps = " ".join(module.partition("\n\n")[0].split())
    needs = ", ".join(sorted(cls.needs)) or "–"
    params = ", ".join(f"{field.name} = {field.default!r}" for field in fields(cls)) or "–"
    return f"| `{name}` | {cls.role} | {cell(keeps)} | {needs} | {params} |\n"


def tasks() -> str:
    """Return the page of all tasks: parameters, what an episode has, and an episode of each."""
    head = "| name | what is asked | parameters | lacks |\n| --- | --- | --- | --- |\n"
    rows, texts = "", ""
    for name in TASKS.builtin:
        cls: type[Task] = TASKS.get(name)
        asked = (inspect.getdoc(cls) or "").partition("\n\n")[0]
        params = ", ".join(_parameter(cls, field.name, field.default) for field in fields(cls)) or "–"
        lacks = ", ".join(sorted(GIVEN - cls().gives)) or "–"
        rows += f"| `{name}` | {cell(' '.join(asked.split()))} | {cell(params)} | {lacks} |\n"
        _, _, rest = (inspect.getdoc(sys.modules[cls.__module__]) or "").partition("\n\n")
        texts += f"\n## {name}\n\n{_paragraph(' '.join(rest.split()).replace('``', '`'))}\n\n{_episode(cls())}"
    return f"# Tasks\n\n{MADE}\n{_paragraph(_TASKS)}\n\n{head}{rows}{texts}"


def _parameter(cls: type[Task], name: str, default: object) -> str:
    """Return a parameter as the configuration writes it: ``symbols: colours (or words)``."""
    hint = get_type_hints(cls)[name]
    others = [value for value in get_args(hint) if value != default] if get_origin(hint) is Literal else []
    written = (
        {None: "null", True: "true", False: "false"}.get(default, default) if isinstance(default, bool | None) else default
    )
    return f"`{name}: {written}`" + (f" (or {', '.join(f'`{value}`' for value in others)})" if others else "")


def _episode(task: Task) -> str:
    """Return the first episode of a task, with gold marked by ``>``."""
    data = DataBlock(pairs=5)
    episode = next(iter(task.episodes(TaskRequest(1, 42, data, WordTokenizer(), frozenset(), {}))))
    start, end = episode.gold or (0, 0)
    marked = [
        ("> " if start <= line.start() < end and line.group().strip() else "  ") + line.group()
        for line in re.finditer(r"[^\n]*\n", episode.demo_text)
    ]
    demo = "".join(marked).replace("  \n", "\n")
    query = textwrap.indent(episode.query_text, "  ")
    return f"```text\n{demo.rstrip()}\n\n{query}  [answer:{episode.answer_text}]\n```\n"


def architecture() -> str:
    """Return the tree of modules with the first sentence of each docstring, packages in the order of their imports."""
    root = DOCS.parent / "cedkv"
    rows: list[tuple[str, str]] = []
    for name in PACKAGES:
        path = root / name
        if path.suffix:
            rows.append((name, _first_sentence(path)))
            continue
        rows.append((f"{name}/", _first_sentence(path / "__init__.py")))
        inside = [module for module in sorted(path.rglob("*.py")) if module.name != "__init__.py"]
        rows += [(f"    {module.relative_to(path).as_posix()}", _first_sentence(module)) for module in inside]
    width = max(len(name) for name, _ in rows) + 2
    tree = "\n".join(name.ljust(width) + text for name, text in rows)
    flow = "\n".join(f"    {line}" for line in textwrap.wrap(FLOW.replace(", ", " -> "), 116))
    return f"# Architecture\n\n{MADE}\nData goes one way:\n\n{flow}\n\n{_paragraph(_ARCHITECTURE)}\n\n```text\n{tree}\n```\n"


def _first_sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0].split())
    return re.split(r"(?<!et al)\. ", text)[0].rstrip(".").replace("``", "")


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 130, break_long_words=False, break_on_hyphens=False)


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
