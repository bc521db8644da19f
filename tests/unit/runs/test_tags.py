"""Tags of a finished run, and what its journal's header says of its samples."""

from __future__ import annotations

import json
from dataclasses import replace

from cedkv.config.resolve import resolve
from cedkv.runs.sample_notes import notes_header, read_notes
from cedkv.runs.tags import condition_tags, config_tags, shared_tags
from cedkv.tasks.load import Samples, Unusable
from tests.support import making

LEFT_OUT = (Unusable("ON", "answer is several tokens", 41, ("row-00003",)), Unusable("OFF", "empty", 2, ()))


def test_a_run_says_what_it_is_of() -> None:
    """Of a model and of a file the last part; a parent says what all its conditions agree in."""
    hub = resolve(None, ["model.id=Qwen/Qwen2.5-1.5B-Instruct", "data.task=needle"])
    local = resolve(None, ["model.id=/models/own/", "data.on_path=folder/own file.csv", "select.mode=whole_shots"])
    other = resolve(None, ["model.id=Qwen/Qwen2.5-1.5B-Instruct", "data.task=needle", "select.mode=random_span"])
    of_hub = {"model": "Qwen2.5-1.5B-Instruct", "task": "needle", "selector": "attention_diversity_span"}
    assert config_tags([hub]) == of_hub
    assert config_tags([local]) == {"model": "own", "task": "own file.csv", "selector": "whole_shots"}
    assert config_tags([hub, other]) == {"model": "Qwen2.5-1.5B-Instruct", "task": "needle"}
    assert config_tags([hub, local]) == {}


def test_preconditions_and_samples_have_tags_of_their_own() -> None:
    (result,) = making.grid(({}, {"teacher": False, "off_extra": making.further(entropy=1.0)}))
    tags = condition_tags(replace(result, unusable=LEFT_OUT))
    assert (tags["teacher_gain"], tags["off_entropy"]) == ("fail", "pass")
    assert (tags["gateB"], tags["gateB.on_gain"], tags["gateA.null_effect"]) == ("pass", "pass", "pass")
    assert (tags["samples.on"], tags["samples.off"], tags["samples.unusable"]) == ("12", "12", "43")
    assert not [tag for tag in tags if "precondition" in tag]


def test_the_parent_has_what_its_conditions_share() -> None:
    one, other = making.grid(({}, {"teacher": False}), ({"select.mode": "delimiter_span"}, {"teacher": False}))
    assert shared_tags([one, other]) == {
        "teacher_gain": "fail",
        "samples.on": "12",
        "samples.off": "12",
        "samples.unusable": "0",
    }
    (taught,) = making.grid(({}, {}))
    assert shared_tags([one, taught])["teacher_gain"] == "differs: see the nested runs"


def test_a_header_gives_back_what_is_known_of_samples() -> None:
    samples = Samples((), (), "people.csv", "off", ("people.csv gives 22 ON samples",), LEFT_OUT)
    for name in ("samples", "word_pairs: samples"):
        stored = json.loads(json.dumps(notes_header(samples, name)))
        assert read_notes(stored, name) == (samples.notes, LEFT_OUT)
    assert read_notes({}) == ((), ())
