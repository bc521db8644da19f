"""Hostile and careless input, more than 10,000 cases: each is accepted, or ends in one readable error with exit code 2.

Up to the point where a run would be made, everything is real: the commands, the files, the samples. Nothing is random from
one session to the next (``derandomize``), so that a case that fails fails again.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cedkv.config.options import COMPARISONS, OPTIONS
from cedkv.config.resolve import resolve
from cedkv.core.errors import DataError
from cedkv.tasks.episode_rows import read_episodes, read_prompts
from cedkv.tasks.rows import read_rows
from cedkv.tasks.tokenize import SampleTokenizer, tokenize_off, tokenize_on
from tests.support import tiny
from tests.support.hostile import (
    ARGUMENTS,
    BLOCKS,
    COMMANDS,
    KEYS,
    OWN_OPTIONS,
    TABLED_OPTIONS,
    anything,
    check,
    nothing_is_run,
    outcome,
    small_trees,
)

CASES = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
    phases=[Phase.generate],  # what a failing example says is short already
)
FEW, MANY, DISTINCT = 300, 4000, 0.4
"""Generated cases of a test: always, and where there is time (``slow``); the share of them that must be different."""
EXAMPLES = pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def generated(examples: int, case: Callable[[st.DataObject], Any]) -> None:
    """Try so many examples; ``case`` tries one and returns it, and most must be different.

    One case per example: of several in one, hypothesis repeats most.
    """
    cases = set()

    @settings(CASES, max_examples=examples)
    @given(st.data())
    def each(data: st.DataObject) -> None:
        cases.add(case(data))

    each()
    assert len(cases) >= DISTINCT * examples


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with nothing_is_run(tmp_path_factory.mktemp("hostile")):
        yield


@pytest.mark.parametrize("name", sorted(OWN_OPTIONS))
def test_every_option_with_every_text(name: str) -> None:
    """Every ``-P`` of every entry point; what a single run has too is tried there. What is rejected is named by its key."""
    keys = {**OPTIONS, **COMPARISONS.get(name, {})}
    for option in TABLED_OPTIONS[name]:
        for value in ARGUMENTS:
            check(name, f"--{option}={value}", names=keys[option][0].rsplit(".", 1)[-1] if option in OPTIONS else None)


def test_every_key_with_every_text() -> None:
    for key in KEYS:
        for value in ARGUMENTS:
            check("cedkv", "--set", f"{key}={value}")


def test_there_are_ten_thousand_cases() -> None:
    """In the two tables above, each different from the others; what is generated comes on top."""
    for values in (ARGUMENTS, KEYS, *TABLED_OPTIONS.values()):
        assert len(set(values)) == len(values)
    assert len(ARGUMENTS) * (len(KEYS) + sum(map(len, TABLED_OPTIONS.values()))) >= 10_000


@EXAMPLES
def test_options_and_overrides(examples: int) -> None:
    """Several at once, and names that are none."""

    def case(data: st.DataObject) -> Any:
        name = data.draw(st.sampled_from(sorted(OWN_OPTIONS)))
        keys = st.sampled_from(KEYS) | st.sampled_from(BLOCKS) | anything
        text = ",".join(f"{data.draw(keys)}={data.draw(anything)}" for _ in range(data.draw(st.integers(1, 3))))
        options = [option for option in OWN_OPTIONS[name] if option != "debug"]  # debug=1 asks for a traceback
        option = data.draw(st.sampled_from(options) | st.text(string.ascii_letters + "-_", min_size=1, max_size=9))
        value = data.draw(anything)
        arguments = [part.replace("\x00", "") for part in (f"--set={text}", f"--{option}={value}")]
        check(name, *arguments)
        return name, *arguments

    generated(examples, case)


def yaml_text(data: st.DataObject) -> str:
    """A configuration in which something is wrong, more often than not."""
    tree: Any = {"phase2": {"seed": 1, "prefix_len": 64, "model": {"id": "x"}, "select": {"span_len": 8}, "data": {"pairs": 8}}}
    for _ in range(data.draw(st.integers(0, 3))):
        block, _, leaf = data.draw(st.sampled_from(KEYS)).rpartition(".")
        where = tree["phase2"].setdefault(block, {}) if block else tree["phase2"]
        if isinstance(where, dict):
            where[data.draw(st.just(leaf) | anything)] = data.draw(small_trees)
    text = yaml.safe_dump(
        tree, allow_unicode=data.draw(st.booleans()), sort_keys=False, default_flow_style=data.draw(st.booleans())
    )
    at = data.draw(st.integers(0, len(text)))
    change = data.draw(st.sampled_from(["none", "none", "insert", "cut", "double"]))
    if change == "insert":
        return text[:at] + data.draw(anything) + text[at:]
    return {"none": text, "cut": text[:at], "double": text + text[at:]}[change]


@EXAMPLES
def test_configuration_files(examples: int) -> None:
    """Wrong values and keys, cut and doubled text, other encodings, line ends, and bytes that are no text."""

    def case(data: st.DataObject) -> bytes:
        text = yaml_text(data) if data.draw(st.integers(0, 4)) else data.draw(anything)
        text = text.replace("\n", data.draw(st.sampled_from(["\n", "\n", "\r\n", "\r"])))
        encoding = data.draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32-be"]))
        content = text.encode(encoding, "replace") if data.draw(st.integers(0, 9)) else data.draw(st.binary(max_size=40))
        Path("own.yaml").write_bytes(content)
        check("phase2_eval", "--config", "own.yaml", names="")
        return content

    generated(examples, case)


ON = {"demo_text": "Word: dax\nSymbol: red\n\n", "query_text": "Word: dax\nSymbol:", "answer_text": " red"}
OFF = {"prompt_text": "What is chess?"}
MORE = {
    "demo_kinds": [[0, 5, "delimiter"], [5, 9, "input"]],
    "gold": [5, 9],
    "other_query_text": "Word: lug\nSymbol:",
    "id": "a",
}


def json_line(data: st.DataObject, line: dict[str, Any]) -> str:
    line = dict(line)
    for _ in range(data.draw(st.integers(0, 2))):
        key = data.draw(st.sampled_from([*line, *MORE]) | anything)
        line[key] = data.draw(st.sampled_from(list(MORE.values())) | small_trees)
    text = json.dumps(line, ensure_ascii=data.draw(st.booleans()), default=str)
    at = data.draw(st.integers(0, len(text)))
    change = data.draw(st.sampled_from(["none", "none", "none", "insert", "cut", "double"]))
    if change == "insert":
        return text[:at] + data.draw(anything) + text[at:]
    return {"none": text, "cut": text[:at], "double": text + text[at:]}[change]


@EXAMPLES
def test_samples(tokenizer: Any, examples: int) -> None:
    """A line is read and tokenised, or rejected by file and number."""

    def case(data: st.DataObject) -> tuple[str, bytes]:
        kind = data.draw(st.sampled_from(["on", "off"]))
        text = json_line(data, ON if kind == "on" else OFF) + data.draw(st.sampled_from(["\n", "\r\n", "", "\n\n"]))
        content = text.encode(data.draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"])), "surrogatepass")
        Path("own.jsonl").write_bytes(content)
        try:
            rows = read_rows("own.jsonl", f"data.{kind}_path", lambda _: 1).rows
            if kind == "on":
                for episode in read_episodes(rows):
                    json.dumps(repr(tokenize_on(SampleTokenizer.of(tokenizer), episode)), ensure_ascii=False).encode()
            else:
                for sample_id, prompt in read_prompts(rows):
                    json.dumps(
                        repr(tokenize_off(SampleTokenizer.of(tokenizer), sample_id, prompt)), ensure_ascii=False
                    ).encode()
        except DataError as error:
            said = str(error)
            assert re.match(
                r"own\.jsonl:\d+: |own\.jsonl: (no rows|row 1)|data\.o\w+_path = 'own\.jsonl' cannot be read: |sample ", said
            ), said
            assert len(said) < 3000, said
        return kind, content

    generated(examples, case)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip(string.ascii_lowercase, string.ascii_lowercase[1:], strict=False)
)


@pytest.mark.parametrize("option", ["config", "on_path", "off_path"])
def test_what_is_no_file(option: str) -> None:
    """Nothing is waited for, and nothing without an end is read: a pipe nobody writes to, a device, a loop of links."""
    os.makedirs("folder", exist_ok=True)
    makers = {
        "pipe": lambda: os.mkfifo("pipe"),
        "loop": lambda: os.symlink("loop", "loop"),
        "dangling": lambda: os.symlink("no", "dangling"),
        "socket": lambda: socket.socket(socket.AF_UNIX).bind("socket"),
    }
    for name, make in makers.items():
        if not os.path.lexists(name):
            make()
    Path("big.yaml").write_text("#" * 200_000)
    Path("empty").write_text("")
    Path("secret").write_text("root:x:0:0\n")
    names = ["pipe", "loop", "dangling", "socket", "folder", "/dev/zero", "/dev/full", "/proc/self/mem", "absent", "x" * 300,
             "empty", "secret", "folder/../folder", "secret/x"] + (["big.yaml"] if option == "config" else [])  # fmt: skip
    for name in names:
        assert outcome("phase2_eval", f"--{option}", name)[0] == 2, name
        check("phase2_eval", f"--{option}", name, names=name[:40])


def test_yaml_that_would_grow_is_rejected() -> None:
    """Nine lines of aliases are gigabytes when expanded."""
    growing = [LAUGHS, f"phase2: {{model: {{id: x}}}}\n{LAUGHS}", "phase2: &a {seed: 1, model: *a}"]
    deep = ["phase2:\n  " + "[" * 9000, "phase2: " + "{a: " * 9000, "[" * 90_000]
    for text in (*growing, *deep, "phase2:\n" + "".join(f"  key{i}: 1\n" for i in range(5000))):
        Path("own.yaml").write_text(text)
        code, said = outcome("phase2_eval", "--config", "own.yaml")
        assert (code, len(said) < 5000) == (2, True), said[:500]
        check("phase2_eval", "--config", "own.yaml", names="own.yaml" if "key1" not in text else "key1")


TAGS = ("null", "bool", "int", "float", "str", "binary", "timestamp", "seq", "map", "set", "omap", "pairs", "value", "none")
TAGGED = ("x", "xy", "''", "'-'", "2024-99-99", "[a, b]", "[{a: 1, b: 2}]", "{a: 1}", "{=: [x]}", '"\\ud800"', '"\\UFFFFFFFF"')


@pytest.mark.parametrize("tag", TAGS)
def test_values_unlike_their_tags_are_rejected(tag: str) -> None:
    """PyYAML builds a value as its tag says and does not ask whether it can: as value, as key, in a file and in an override."""
    for value in TAGGED:
        tagged = f"!!{tag} {value}"
        for text in (f"seed: {tagged}", f"model: {tagged}", f"select: {{params: {{a: {tagged}}}}}", f"? {tagged}\n  : 1"):
            Path("own.yaml").write_text(f"phase2:\n  {text}\n")
            assert outcome("phase2_eval", "--config", "own.yaml")[0] == 2 or tag in ("map", "null"), tagged
            check("phase2_eval", "--config", "own.yaml", names="")
        check("phase2_eval", "--set", f"seed={tagged}")
        check("phase2_eval", "--set", f"select.params={{{tagged}: 1}}")


@pytest.mark.parametrize("text", ['"\\ud800": 1', 'model: {"\\ud800": 1}', 'select: {params: {"\\ud800": 1}}'])
def test_keys_with_half_a_character_are_rejected(text: str) -> None:
    Path("own.yaml").write_text(f"phase2: {{{text}}}")
    assert outcome("phase2_eval", "--config", "own.yaml")[0] == 2
    check("phase2_eval", "--config", "own.yaml", names="holds half a character")
    check("phase2_eval", "--set", "select.params.\udcff=1", names="holds half a character")


@pytest.mark.parametrize(
    "run_id", ["../../etc", "..", ".", "/etc", "a/b", "a\\b", "", " ", "-x", "a\nb", "x" * 70, "%2e%2e", "a..b", "absent"]
)
def test_run_ids_are_no_paths(run_id: str) -> None:
    for command in COMMANDS:
        code, said = outcome(command, f"--resume={run_id}")
        assert (code, "Error: " in said) == (2, True), said
        check(command, f"--resume={run_id}")


@pytest.mark.parametrize(
    "value", ["http://user:pa55word@host/x", "//user:pa55/word@host", "hf_" + "Aa0" * 12, "x?access_token=pa55word"]
)
@pytest.mark.parametrize("option", ["model_id", "model_revision", "on_path", "off_path"])
def test_credentials_in_a_configuration_are_rejected_and_not_repeated(option: str, value: str) -> None:
    """A configuration is stored with every run: in parameters, files and the report."""
    code, said = outcome("phase2_eval", f"--{option}", value, "--debug")
    assert code == 2
    assert "credentials" in said
    assert not [word for word in ("pa55", "Aa0Aa0") if word in said]


def test_a_traceback_is_for_who_asks() -> None:
    for arguments in (["--set", "seed=x"], ["--config", "absent"], ["--on_path", "/dev/zero"], ["--resume", "../x"]):
        assert "Traceback" not in outcome("phase2_eval", *arguments)[1]
        code, said = outcome("phase2_eval", *arguments, "--debug")
        assert (code, said.count("Traceback (most recent call last)")) == (2, 1), said


def test_numbers_in_yaml_are_what_they_look_like() -> None:
    """YAML 1.1 reads 010 as 8 and 1:30 as 90."""
    for text in ("010", "1:30", "0x10", "0b11"):
        code, said = outcome("phase2_eval", "--seed", text)
        assert code == 2
        assert f"phase2.seed: value '{text}' rejected" in said
    assert resolve(None, ["seed=1_000", "thresholds.on_gain_min=1e-3", "select.span_len=+6"]).seed == 1000
    with pytest.raises(Exception, match="finite"):
        resolve(None, ["thresholds.on_gain_min=.nan"])
    assert math.isclose(resolve(None, ["thresholds.on_gain_min=-.5"]).thresholds.on_gain_min, -0.5)
