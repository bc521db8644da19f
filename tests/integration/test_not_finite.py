"""A number that is not finite ends in an error that names the sample and what it is, or in a gate that does not pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cedkv.analysis.paired import gap_recovered, holm, interval, n_needed, sign_flip
from cedkv.analysis.results import Records, decide
from cedkv.checks.gates import all_pass
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import NumericsError
from tests.support import making, tiny
from tests.support import patch_points as points

BAD = (math.nan, math.inf, -math.inf)
DECISIVE = {
    "on": ("kl_base_teacher", "kl_select_teacher", "phase2_delta_on_select"),
    "off": ("phase2_delta_off_select",),
    "plumbing": tuple(name for name, value in making.plumbing().items() if isinstance(value, float)),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in DECISIVE.items() for name in names])
def test_one_number_among_many_keeps_a_run_from_passing(kind: str, name: str, bad: float) -> None:
    n, config = 20, Phase2Config()
    made = {"on": making.on, "off": making.off, "plumbing": making.plumbing}
    records: dict[str, Any] = {key: [make(sample_id=f"{key}-{i}") for i in range(n)] for key, make in made.items()}
    repeats = making.repeats(records["on"], config.eval.repro_runs)
    assert decide(config, Records(**records, repro=repeats), "2").verdicts["phase2"]
    for at in (0, n // 2, n - 1):
        spoiled = {key: [dict(record) for record in of] for key, of in records.items()}
        spoiled[kind][at][name] = bad
        found = decide(config, Records(**spoiled, repro=repeats), "2")
        assert not found.verdicts["phase2"]
        assert not all_pass(found.checks)


def spoiled_row(what: Callable[..., Any], bad: float) -> Callable[..., Any]:
    """The function, with the first row of its result replaced."""

    def spoiled(*given: Any, **named: Any) -> Any:
        found = what(*given, **named)
        for tensor in found if isinstance(found, tuple) else [found]:
            for part in tensor if isinstance(tensor, tuple) else [tensor]:
                part[0] = bad
        return found

    return spoiled


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (points.LAST_LOGITS, "logits of"),
        (points.ATTENTION_ROWS, "token scores of"),
        (points.READ_CACHE, "keys of"),
        (points.GATHER, "of kept tokens of"),
        (points.ROTATE_KEYS, "keys of kept tokens of"),
    ],
    ids=lambda value: value.name if isinstance(value, points.PatchPoint) else "",
)
def test_what_is_computed_is_looked_at(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, function: points.PatchPoint, said: str, bad: float
) -> None:
    function.replace(spoiled_row(function.real, bad), monkeypatch)
    with pytest.raises(NumericsError, match=rf"{said} .*first: \w+-"):
        tiny.records(llama_folder, "prefix.kv_source=gather")


def test_weights_that_are_not_finite_end_in_an_error(tmp_path: Path) -> None:
    """One word's embedding is damaged: the sample that has the word is named."""
    model = tiny.model("llama")
    model.model.embed_tokens.weight.data[300:] = torch.nan
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(NumericsError, match="samples are not finite"):
        tiny.records(tmp_path)


@pytest.mark.parametrize("bad", BAD)
def test_statistics_decide_nothing_from_them(bad: float) -> None:
    values = [1.0, 2.0, bad, 4.0]
    assert interval(values, 0, "x") == (None, None)
    assert n_needed(values) is None
    (p, good), untouched = sign_flip([values, [1.0, 2.0, 3.0, 4.0]], 0), sign_flip([[1.0, 2.0, 3.0, 4.0]], 0)
    assert math.isnan(p)
    assert good == untouched[0]
    assert not holm([p, 0.001])[0] < 0.05
    on = [making.on(correct_teacher=bad), making.on(), making.on()]
    assert gap_recovered(on, 0)["value"] is None
