"""The size of a run's units on a card, tried on the stand-in: found once, recorded, and kept when the run is resumed."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from cedkv.core.errors import RunInterrupted
from cedkv.models.opening import open_spec
from cedkv.models.sizes import model_sizes
from cedkv.runs.journal import NAME, read_header
from cedkv.runs.manifest import find_resumable
from cedkv.runs.outputs import OUTPUTS
from cedkv.runs.plan_text import about_units
from cedkv.runs.planning import plan_run
from cedkv.runs.prepare import prepare
from cedkv.runs.resolved import resolve_inputs
from cedkv.runs.unit_sizes import find_sizes
from tests.support import card, tiny
from tests.support import patch_points as points
from tests.support.runs import run_phase2
from tests.support.shards import run_it, shard_of

MANY = (
    "runtime.device=cuda", "runtime.batch_size=auto", "eval.on_samples=6", "eval.off_samples=2", "eval.gate_a_samples=1",
    "eval.n_random_trials=1",
)  # fmt: skip


@pytest.mark.usefixtures("store")
def test_found_once_recorded_and_kept(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card has room for four samples when the run starts and for all when it is resumed; the plan says both."""
    config = tiny.config(llama_folder, *MANY)
    inputs, spec = resolve_inputs("phase2", config), open_spec(config, anywhere=True)
    work, sizes = prepare(inputs, spec), model_sizes(spec, "float32")
    assert sizes.weight_bytes is not None
    free = bisect_left(range(1 << 32), 4, key=lambda free: find_sizes(work, sizes, free).groups[0].unit_size)
    finished: list[str] = []

    def interrupt(real: Any, journal: Any, unit: str, *rest: Any) -> None:
        if finished:
            raise RunInterrupted("no space left")
        finished.append(unit)
        real(journal, unit, *rest)

    with card.stand_in(free):
        with monkeypatch.context() as patch:
            points.JOURNAL_APPEND.wrap(patch, interrupt)
            with pytest.raises(RunInterrupted):
                run_phase2(config)
        assert "units of at most 4 ON samples, by 0.0 GB that are free on cuda" in capsys.readouterr().err
    (folder,) = OUTPUTS.iterdir()
    before = read_header(folder / NAME)
    assert (before["unit_size"], len(before["units"]), finished) == (4, 2, before["units"][:1])
    with card.stand_in():
        run_phase2(config, resumed=find_resumable(folder.name))
        assert "units of at most" not in capsys.readouterr().err
        roomy = plan_run(inputs, lambda _: None)
    assert read_header(folder / NAME) == before
    assert json.loads((folder / "run.json").read_text())["params"]["unit_size"] == "4"
    run = mlflow.get_run(folder.name)
    assert (run.info.status, run.data.params["unit_size"]) == ("FINISHED", "4")
    with card.stand_in(free + sizes.weight_bytes):
        narrow = plan_run(inputs, lambda _: None)
    for plan, size, units in ((roomy, 6, 1), (narrow, 4, 2)):
        assert (plan.unit_sizes, plan.tasks[0].unit_size, plan.total("units")) == ("found", size, units)
        assert f"at most: {size} (symbol_lookup), by the memory that is free on cuda now" in " ".join(about_units(plan))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # where there is a real card, too
    without = plan_run(inputs, lambda _: None)
    assert (without.unit_sizes, without.tasks[0].unit_size) == ("not known", 32)
    assert re.search(
        r"not known here, .* free on cuda; counted with at most 32 \(symbol_lookup\)", " ".join(about_units(without))
    )
    assert plan_run(inputs, lambda _: None, folder=folder).total("units") == 2, "the units that the run has had"


@pytest.mark.usefixtures("without_mlflow")
def test_shards_have_the_same_units_on_any_card(llama_folder: Path) -> None:
    """On a card without room for a single sample; the second shard has nothing to compute."""
    with card.stand_in(0):
        run_it("phase2", shard_of(tiny.config(llama_folder, *MANY), "2/2"))
    (folder,) = OUTPUTS.iterdir()
    header = read_header(folder / NAME)
    assert (header["unit_size"], header["units"]) == (32, ["unit/00000"])
