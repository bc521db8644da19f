"""Whole runs on a card: the CPU's answers and selections, its figures within float32's limit, gates by their stated rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cedkv.analysis.results import Results, collect
from cedkv.checks.base import RunRecords
from cedkv.checks.gates import judge_gate
from cedkv.config.schema import KL_LIMIT
from cedkv.core.values import Record
from cedkv.runs.devices import largest_differences
from cedkv.runs.journal import NAME, read_journal
from cedkv.runs.outputs import OUTPUTS
from tests.gpu.conftest import overrides
from tests.support import patch_points, tiny
from tests.support.runs import run_phase2

pytestmark = pytest.mark.gpu
SAME = 1e-4
"""Largest difference of a KL or a log-probability, in nats: the limit of float32. Seen on a CPU between two kernels: 5e-6."""
WAYS = {
    "prefill": (),
    "gather": ("prefix.kv_source=gather", "prefix.boundary_replay=2", "select.keep_sink=2"),
    "absolute": ("injection.positioning_mode=absolute", "prefix.padding_mode=shrink_to_selected"),
    "some layers": ("layer_scope.injection=[0,2]",),
    "judged": ("eval.lds_masks=4", "select.causal_drop_advisory=true"),
}


def differ(one: dict[str, list[Record]], other: dict[str, list[Record]]) -> dict[str, float]:
    found = largest_differences(one, other)
    assert found["tokens"] == found["selections"] == 0
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_the_cpu_s(device: str, llama_folder: Path, way: str) -> None:
    on_cpu = tiny.records(llama_folder, *overrides("cpu", *WAYS[way]))
    found = differ({"run": on_cpu}, {"run": tiny.records(llama_folder, *overrides(device, *WAYS[way]))})
    assert max(found["kl"], found["logprob"]) < SAME


@pytest.mark.parametrize("family", ["Qwen3", "Gemma 2", "gpt-oss"])
def test_so_it_is_where_attention_is_another(device: str, family_folders: dict[str, Path], family: str) -> None:
    on_cpu, here = (tiny.records(family_folders[family], *overrides(where)) for where in ("cpu", device))
    assert differ({"run": on_cpu}, {"run": here})["kl"] < 1e-3


def test_every_selector_chooses_what_it_chooses_on_the_cpu(device: str, llama_folder: Path) -> None:
    grid = {mode: (f"select.mode={mode}",) for mode in tiny.MODES}
    least = ("eval.on_samples=2", "eval.off_samples=2", "eval.gate_a_samples=1", "eval.n_random_trials=1")
    on_cpu, here = (tiny.grid_records(llama_folder, grid, *overrides(where, *least)) for where in ("cpu", device))
    assert max(differ(on_cpu, here)["kl"], differ(on_cpu, here)["logprob"]) < SAME


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gate_a_by_the_rule_of_its_dtype(device: str, llama_folder: Path, dtype: str) -> None:
    """Computations that are one on paper differ by rounding; the effect of a prefix must be ten times that floor."""
    own = overrides(device, f"runtime.torch_dtype={dtype}", "runtime.batch_size=4")
    config, records = tiny.config(llama_folder, *own), collect(tiny.records(llama_folder, *own))
    run = RunRecords(config, records.on, records.off, records.plumbing, records.repro)
    assert run.floor is not None
    assert run.floor <= KL_LIMIT[dtype]
    verdicts = {check.name: check.verdict for check in judge_gate("A", run)}
    assert verdicts["nonzero_effect"] == "pass"
    assert {name for name, verdict in verdicts.items() if verdict == "fail"} == set()


def test_units_by_a_card_s_memory_give_the_cpu_s_records(
    device: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two units on the CPU, of 32 samples and of 4; one on a card."""
    patch_points.without_mlflow(monkeypatch)
    sizes = ("runtime.batch_size=auto", "eval.on_samples=36", "eval.gate_a_samples=1", "eval.n_random_trials=1")
    found = []
    for name, where in (("one", "cpu"), ("other", device)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run_phase2(tiny.config(llama_folder, *overrides(where, *sizes)))
        (folder,) = OUTPUTS.iterdir()
        header, journal = read_journal(folder / NAME, ["run"])
        assert (header["unit_size"], len(header["units"])) == ((36, 1) if where == "cuda" else (32, 2))
        records = [record for record in journal.records("run") if record["type"] in ("sample", "selection")]
        found.append({"run": sorted(records, key=lambda of: (of["type"], of.get("kind", ""), of["sample_id"]))})
    assert len(found[0]["run"]) == 2 * 36 + 4
    difference = differ(*found)
    assert max(difference["kl"], difference["logprob"]) < SAME


@pytest.mark.usefixtures("store")
def test_a_run_from_start_to_end_says_where_it_ran(device: str, llama_folder: Path) -> None:
    results: Results = run_phase2(tiny.config(llama_folder, *overrides(device)))
    assert results.verdicts["gateA"]
    (meta,) = Path("outputs").glob("*/artifacts/hf_runtime_meta.json")
    facts = json.loads(meta.read_text())
    assert facts["device"].split(":")[0] == device
    assert facts["tf32"] is False
    (journal,) = Path("outputs").glob("*/journal*")
    assert f'"runtime.device":"{device}"' in journal.read_text()
