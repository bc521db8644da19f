"""What is said of a run in words: on the console, and in its description in MLflow."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cedkv.analysis.results import ConditionResult
from cedkv.config.resolve import resolve
from cedkv.report.text import about_samples, beyond_limit, console, further_positions, markdown, measures, percent, run_name
from cedkv.tasks.load import Unusable
from tests.support import making

LEFT_OUT = (
    Unusable("ON", "answer is several tokens", 41, ("row-00003", "row-00007")),
    Unusable("ON", "too long", 1, ("row-00009",)),
    Unusable("OFF", "empty", 2, ()),
)


def run(**given: object) -> ConditionResult:
    (made,) = making.grid(({}, given))
    return made


def test_samples_left_out_are_counted_among_those_that_were_tried() -> None:
    assert about_samples(["people.csv gives 22 ON samples"], LEFT_OUT, 22, 128) == [
        "people.csv gives 22 ON samples",
        "41 of 64 ON samples left out: answer is several tokens (first: row-00003, row-00007, ...)",
        "1 of 64 ON samples left out: too long (first: row-00009)",
        "2 of 130 OFF prompts left out: empty",
    ]
    assert about_samples([], (), 22, 128) == []


def test_ids_of_samples_are_harmless_on_a_terminal() -> None:
    (line,) = about_samples([], [Unusable("ON", "a\nb", 1, ("\x1b[2J\u202e",))], 3, 3)
    assert line == r"1 of 4 ON samples left out: a b (first: \x1b[2J\u202e)"


def test_how_many_prompts_move_beyond_the_limit_stands_beside_p99() -> None:
    off = {"off": [0.1] * 127 + [1.5]}
    (found,) = making.grid(({}, off), n=128)
    assert beyond_limit(found) == "1 of 128 beyond 1 nat: at most 3.7 % (95 %)"
    found.results.metrics["phase2_off_over_limit_share"] = float("nan")
    assert beyond_limit(found) is None
    assert "OFF prompts" not in measures(found)


@pytest.mark.parametrize(("share", "text"), [(0.0231, "2.3 %"), (1.0, "100 %"), (0.00031, "0.031 %"), (0.0, "0 %")])
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_lines_of_what_was_measured() -> None:
    assert list(measures(run())) == ["accuracy", "OFF prompts"]
    assert further_positions(run().results) is None
    full = run(label_kl=0.25, off_extra=making.further(0.25, 0.75, changed=[0]))
    assert measures(full) == {
        "accuracy": "base 0   teacher 1   select 1   random 0 ± 0",
        "among labels": "base 0   teacher 1   select 1   random 0.5   KL ratio 0.25 (random 0.6)",
        "OFF prompts": "0 of 12 beyond 1 nat: at most 22 % (95 %)",
        "OFF answers": "KL at further positions: mean 0.5, p99 0.75 nats; greedy token changes at 50 %",
    }


def test_console_says_first_what_was_not_decided() -> None:
    undecided = run(teacher=False, off_extra=making.further(0.1, entropy=0.0))
    text = console(replace(undecided, notes=("short",), unusable=LEFT_OUT))
    reasons = text[text.index("gateA: ") :].splitlines()[1:]
    assert reasons[0].startswith("  teacher_gain does not hold: the teacher itself gains 0 on base (limit 0.1)")
    assert reasons[1].startswith("  off_entropy does not hold, off_delta_p99 is insufficient: base is all but certain")
    assert len(reasons) == 2
    assert re.search(r"^B +off_delta_p99 +0.01 +<= 1 +12 +insufficient$", text, re.MULTILINE)
    assert re.search(r"^precondition +teacher_gain +0 +>= 0.1 +12 +fail$", text, re.MULTILINE)
    assert re.search(r"^samples +short$", text, re.MULTILINE)
    assert re.search(r"^samples +41 of 54 ON samples left out: answer is several tokens", text, re.MULTILINE)
    assert "does not hold" not in console(run())


def test_description_says_what_was_not_decided_before_any_number() -> None:
    text = markdown(replace(run(teacher=False), unusable=LEFT_OUT))
    head = text[: text.index("Accuracy")]
    assert "**The teacher itself gains 0 on base" in head
    assert r"41 of 54 ON samples left out: answer is several tokens (first: row-00003, row-00007, ...)." in text
    assert "nothing about the selection" not in markdown(run())


def test_description_links_to_page_and_tables_and_says_first_what_fails() -> None:
    text = markdown(run(teacher=False))
    second = text.splitlines()[2]
    assert second == (
        "[page](report.html) · [ON samples](phase2_on_samples.json) · [OFF prompts](phase2_off_samples.json) · "
        "[report](report_phase2.json)"
    )
    rows = re.findall(r"^\| (\w+) \| (\w+) \|.*\| ([\w*]+) \|$", text, re.MULTILINE)[1:]
    assert [gate for gate, *_ in rows] == sorted((gate for gate, *_ in rows), key=["B", "precondition", "A"].index)
    assert ("precondition", "teacher_gain", "**fail**") in rows
    assert ("A", "null_effect", "pass") in rows
    assert "Accuracy: base 0 · teacher 0 · select 1 · random 0 ± 0  \n" in text, "markdown would fold spaces"


def test_a_run_is_named_by_its_samples_too() -> None:
    """The default task goes without saying."""
    named = [
        run_name(resolve(None, overrides), "2")
        for overrides in ([], ["data.task=needle"], ["data.on_path=folder/own file.csv", "prefix.kv_source=gather"])
    ]
    assert named == [
        "attention_diversity_span · compact · seed 42",
        "attention_diversity_span · compact · needle · seed 42",
        "attention_diversity_span · compact · gather · own file.csv · seed 42",
    ]
