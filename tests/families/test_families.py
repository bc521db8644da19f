"""Every family of the table: certified and run end to end, or rejected before weights; package and page say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
import yaml
from transformers import AutoModelForCausalLM

from cedkv.analysis.results import collect
from cedkv.checks.base import RunRecords
from cedkv.checks.certificate import FOLDER
from cedkv.checks.gates import judge_gate
from tests.families.models import END, FAMILIES, PAGE, ROOT, START, Family, Row, judged, markdown, written
from tests.support import tiny

WORKING = [family for family in FAMILIES if family.rejected is None]
EVERYDAY = ("Llama, rope YaRN", "Llama, one key head", "Mistral, with windows", "Mixtral", "Gemma 3 (text)", "Phi-3, longrope",
            "GPT-NeoX (Pythia)", "GLM", "SmolLM3", "nanochat", "gpt-oss", "GPT-2")  # fmt: skip
"""One of each kind of positions, attention and layers; the others are ``slow``."""
REJECTED = [family for family in FAMILIES if family.rejected is not None]


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=f.name, marks=() if f.name in EVERYDAY else pytest.mark.slow) for f in WORKING],
)
def test_certified_and_run(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate holds; then a small evaluation, keys moved where they can be, passes the whole of Gate A."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "certificates"))
    folder = tmp_path / "model"
    row, lm, found = judged(family, folder)
    assert found is not None
    assert lm is not None
    assert found.certified, found.table()
    assert found.fault is not None
    assert found.fault > 1e-4, "a fault would not show"
    assert_written(row)
    moving = "gather" if found.can["gather, compact"] is None else "prefill"
    overrides = [f"prefix.kv_source={moving}", "eval.on_samples=2", "eval.off_samples=2", "eval.gate_a_samples=2",
                 "eval.n_random_trials=1", "layer_scope.injection=[1,2,3]"]  # fmt: skip
    records = collect(tiny.records(folder, *overrides))
    run = RunRecords(tiny.config(folder, *overrides), records.on, records.off, records.plumbing, records.repro)
    checks = judge_gate("A", run)
    assert {check.name for check in checks if check.verdict != "pass"} == set()
    assert ("rotation_equivariance" in {check.name for check in checks}) is (lm.rope_layouts is not None)


def test_certified_where_the_output_projection_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BitNet normalises what it projects: its value norms mean nothing, are not compared and decide nothing."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "certificates"))
    bitnet, llama = ({f.name: f for f in FAMILIES}[name] for name in ("BitNet", "Llama"))
    for family, known in ((bitnet, False), (llama, True)):
        _, _, found = judged(family, tmp_path / family.name)
        assert found is not None
        assert found.certified, found.table()
        assert ("value_norms" in {finding.name for finding in found.findings}) is known


@pytest.mark.parametrize("family", REJECTED, ids=[family.name for family in REJECTED])
def test_rejected_before_weights_are_loaded(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    row, lm, _ = judged(family, tmp_path)
    assert lm is None
    assert str(family.rejected) in row["remarks"]
    assert_written(row)


def test_the_table_has_these_families_and_no_others() -> None:
    assert [row["family"] for row in written()["families"]] == [family.name for family in FAMILIES]
    assert set(EVERYDAY) < {family.name for family in WORKING}


def test_the_page_has_the_packages_table() -> None:
    assert PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0] == markdown(written()["families"])


def test_the_table_is_of_the_pinned_transformers() -> None:
    dependencies = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    (pip,) = (each["pip"] for each in dependencies if isinstance(each, dict))
    assert f"transformers=={written()['transformers']}" in pip, "python -m tests.families.models writes the table anew"


def assert_written(row: Row) -> None:
    """The table has the row. It is of one version of transformers; under another the verdict is the same, not every reason."""
    found = {each["family"]: each for each in written()["families"]}[row["family"]]
    if transformers.__version__ != written()["transformers"]:
        row, found = ({**each, "remarks": ""} for each in (row, found))
    assert row == found, "python -m tests.families.models writes the table anew"
