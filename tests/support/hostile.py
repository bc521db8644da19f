"""What tests/faults/test_hostile_input.py is made with: commands that stop where a run would be made, and texts to try."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import strategies as st

from cedkv.cli import app
from cedkv.config.options import COMPARISONS, OPTIONS
from cedkv.config.resolve import leaf_keys, to_yaml
from entrypoints import ablate_selector, compare_positioning, phase2_eval
from tests.support import patch_points as points

HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")
COMMANDS: dict[str, click.Command] = {
    "cedkv": app.main, "phase2_eval": phase2_eval.main, "ablate_selector": ablate_selector.main,
    "compare_positioning": compare_positioning.main,
}  # fmt: skip


class AcceptedError(BaseException):
    """A run would have been made."""

    def __init__(self, config: Any) -> None:
        self.config = config


@contextlib.contextmanager
def nothing_is_run(folder: Path) -> Iterator[None]:
    """In this folder, and where a run would be made the command is stopped."""

    def accepted(config: Any, *_: Any, **__: Any) -> None:
        raise AcceptedError(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        points.OPEN_SPEC.replace(accepted, patch)
        points.END_ON_SIGNALS.replace(list, patch)
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        yield


def outcome(command: str, *arguments: str) -> tuple[int, str]:
    """Exit code (0: accepted) and what was said."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            COMMANDS[command].main(list(arguments), prog_name=command)
    except AcceptedError as accepted:
        to_yaml(accepted.config).encode()
        return 0, ""
    except SystemExit as ended:
        return int(ended.code or 0), said.getvalue()
    raise AssertionError(f"{command} {arguments} came to no end")


def check(command: str, *arguments: str, names: str | None = None) -> None:
    """The command accepts its arguments, or rejects them as it should; ``names`` must occur in what is said."""
    code, said = outcome(command, *arguments)
    about = f"{command} {arguments!r}: {said!r}"
    assert code in (0, 2), about
    if code == 2:
        assert len(re.findall("^Error: ", said, re.MULTILINE)) == 1, about
        assert "Traceback" not in said, about
        assert not HIDDEN.search(said), about
        assert len(said) < 5000, about
        assert names is None or names in said, about
        assert len(said.partition("Error: ")[2].split()) >= 4, about
    assert not Path("outputs").exists(), about
    assert not Path("pwned").exists(), about


TEXTS = (
    "", " ", "\n", "\x00", "\x1b[2J\x1b]0;owned\x07", "\u202egnp.exe", "\u2066x\u2069", "\ufeff", "\ud800", "é\u0301",
    "🦙" * 50,
    "A" * 5000, "\t", "\r\n", "null", "~", "true", "yes", "on", "NO", "nan", ".nan", "inf", "-.inf", "1e999", "-1e999",
    "1e-400",
    "0", "-0", "-1", "1.5", "010", "0x10", "0b1", "0o17", "1_000", "1:30", "2024-01-01", "9" * 19, "9" * 400, "9" * 5000,
    "0x" + "f" * 5000, "1" + "0" * 60, "[]", "[[]]", "[0]", "[0, 0]", "[-1]", "[1.5]", "[" * 100, "{" * 100, "{}", "{a: 1}",
    "{a: {b: {c: 1}}}", "&a [*a]", "*a", "&a 1", "<<: {a: 1}", "{<<: {a: 1}}",
    "!!python/object/apply:os.system ['touch pwned']",
    "!!python/name:os.system", "!!binary aGk=", "!!binary '*'", "!!set {a}", "!!omap [a: 1]", "!!float nan", "!!int x",
    "!!str 1",
    "!!timestamp 2024-01-01", "!x y", "!<tag:x> y", "? [a]", "- a", "|", ">", ": ", "a: b: c", "@x", "`touch pwned`",
    "%x", "#",
    "# x", "a # b", "'", '"', "'a", "''", "\"\\ud800\"", "\"\\0\"", "\"\\x1b[31m\"", "--- 1", "1\n---\n2", "...",
    "$(touch pwned)",
    "; touch pwned", "| touch pwned", "&& touch pwned", "$HOME", "${IFS}", "%s%n", "{0.__class__}", "{{7*7}}",
    "<script>alert(1)</script>",
    "..", "../../etc/passwd", "/", "/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "~root", "file:///etc/passwd",
    "http://user:pa55word@host/x", "//user:pa55/word@host", "hf_" + "a" * 34, "https://host/x?access_token=pa55word",
    "a,b", ",", "=",
    "a=b", "--set", "-x", "--help", "all", "top0", "top25", "top101", "top-1", "auto", "cuda:99999999999", "cpu",
    "random_span",
    "random_spam", "x" * 64 + "=1",
)  # fmt: skip
ARGUMENTS = tuple(text for text in TEXTS if "\x00" not in text)  # the system passes no NUL in an argument
anything = st.sampled_from(ARGUMENTS) | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
small_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(TEXTS) | st.dates(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=6), inside, max_size=3),
    max_leaves=6,
)
KEYS = sorted(leaf_keys())
BLOCKS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
OWN_OPTIONS = {
    name: [
        *OPTIONS,
        *COMPARISONS.get(name, ()),
        *("config", "set", "resume", "debug"),
        *(["phase"] if name == "phase2_eval" else []),
    ]
    for name in COMMANDS
    if name != "cedkv"
}
"""Entry point -> the names of all its ``-P``."""
TABLED_OPTIONS = {name: OWN_OPTIONS[name] if name == "phase2_eval" else list(COMPARISONS[name]) for name in OWN_OPTIONS}
"""Entry point -> the ``-P`` that are tried with every text; what a single run has too is tried there."""
