"""The certificate: a sound model is certified, an unsound one rejected, and the result is kept for this very model.

Planted faults and the findings that fail on them are in ``tests/mutation``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cedkv.checks import certificate, probe
from cedkv.checks.certificate import ROTATION, certificate_checks, certify
from cedkv.cli.app import main
from cedkv.core.errors import ModelError
from cedkv.kv import attention
from cedkv.library.models import load_model
from cedkv.models.fingerprint import fingerprint
from tests.mutation.planted.attention import scaled_scores
from tests.support import tiny
from tests.support.runs import run_phase2


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(certificate.FOLDER, str(tmp_path / "certificates"))
    return tmp_path / "certificates"


NAMES = {getattr(check, "observation", check.name) for check in certificate_checks()}


def made(folder: Path) -> certificate.Certificate:
    _, lm = tiny.load(folder)
    return certify(lm, fingerprint(lm), None)


def test_a_sound_model_is_certified_far_within_its_limits(model_folder: Path) -> None:
    found = made(model_folder)
    assert found.certified
    assert {each.name for each in found.findings} == NAMES
    assert all(each.observed is not None and each.observed <= each.limit / 2 for each in found.findings)
    assert found.fault is not None
    assert found.fault > 0.1, "a fault would not show"


def test_kept_for_this_very_model_and_no_other(llama_folder: Path, tmp_path: Path, own_store: Path) -> None:
    """Found again for the same weights; not for a changed weight, another dtype, or a changed configuration."""
    folder = tiny.save(tmp_path / "model")
    _, lm = tiny.load(folder)
    first = certificate.ensure_certificate(lm, fingerprint(lm), None)
    (path,) = own_store.iterdir()
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1000'))
    again = certificate.ensure_certificate(lm, fingerprint(lm), None)
    assert again.seconds > 1000, "measured again"
    assert again.findings == first.findings
    path.write_text("damaged")
    assert certificate.ensure_certificate(lm, fingerprint(lm), None).seconds < 1000

    _, other = tiny.load(tiny.save(folder, seed=1))
    certificate.ensure_certificate(other, fingerprint(other), None)
    lm.model.config.rope_parameters["rope_theta"] = 5e5
    certificate.ensure_certificate(lm, fingerprint(lm), None)
    _, half = tiny.load(folder, "runtime.torch_dtype=bfloat16")
    certificate.ensure_certificate(half, fingerprint(half), None)
    assert len(list(own_store.iterdir())) == 4


def test_a_rotation_that_fails_stands_only_against_those_that_need_it(llama_folder: Path) -> None:
    found = made(llama_folder)
    wrong = replace(found, findings=tuple(replace(f, observed=1.0) if f.name == ROTATION else f for f in found.findings))
    moving = tiny.config(llama_folder, "prefix.kv_source=gather")
    assert wrong.failed([moving]) == wrong.failed([]) == [ROTATION]
    assert wrong.failed([tiny.config(llama_folder)]) == []
    assert wrong.failed([tiny.config(llama_folder), moving]) == [ROTATION]
    nothing = replace(found, findings=tuple(replace(f, observed=None) for f in found.findings))
    assert len(nothing.failed([])) == len(NAMES), "what was not measured is no pass"


def test_a_fault_that_could_hide_in_rounding_is_said(llama_folder: Path) -> None:
    found = made(llama_folder)
    assert "may hide below" not in found.table()
    assert "may hide below 0.0001 nats: rounding in float32" in replace(found, fault=1e-5).table()


def test_an_indifferent_model_gets_limits_that_can_fail(tmp_path: Path) -> None:
    """Weights as small as untrained ones: a position error moves the answer by less than the usual limit."""
    found = made(tiny.save(tmp_path, initializer_range=0.02))
    assert found.fault is not None
    assert found.fault < 1e-3
    assert found.certified
    assert next(f for f in found.findings if f.name == "left_alone").limit <= max(found.fault / 10, 1e-10)


def test_exit_codes_and_json(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 certified, 3 a check failed, 2 rejected before weights."""
    target = tmp_path / "figures.json"

    def run(folder: Path) -> tuple[int, str, dict[str, Any]]:
        given = ["certify", "--model-id", str(folder), "--device", "cpu", "--json", str(target)]
        done = CliRunner().invoke(main, given)
        return done.exit_code, done.output, json.loads(target.read_text())

    code, output, content = run(llama_folder)
    assert (code, content["certified"]) == (0, True)
    assert "rotary positions (default), GQA, 1024 positions" in output
    assert {each["name"]: each["observed"] <= each["limit"] for each in content["findings"]} == dict.fromkeys(NAMES, True)
    with monkeypatch.context() as planted:
        scaled_scores(planted)
        code, output, content = run(llama_folder)
    assert (code, content["certified"]) == (3, False)
    assert "not certified: left_alone" in output
    from transformers import MambaConfig

    MambaConfig().save_pretrained(tmp_path / "mamba")
    code, output, content = run(tmp_path / "mamba")
    assert (code, content["certified"]) == (2, False)
    assert "names no attention layers" in content["refused"]
    assert content["refused"] in output


def test_a_model_for_the_library_is_certified_on_demand(llama_folder: Path, own_store: Path) -> None:
    """Measured and kept, or rejected: also for a fault that only moved keys show, since selections may move them later."""
    assert load_model(llama_folder, device="cpu").vocabulary == 500
    assert not own_store.exists(), "a certificate is measured where it is asked for"
    load_model(llama_folder, device="cpu", certify=True)
    (kept,) = own_store.iterdir()
    content = json.loads(kept.read_text())
    next(check for check in content["findings"] if check["name"] == ROTATION)["observed"] = 1.0
    kept.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"is not certified: {ROTATION}\n"):
        load_model(llama_folder, device="cpu", certify=True)


def test_a_run_on_a_model_that_fails_is_rejected_or_tagged(
    llama_folder: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are in the run either way; by itself it fails, and where it is allowed it says so."""
    import mlflow

    scaled_scores(monkeypatch)
    with pytest.raises(ModelError, match=r"(?s)is not certified: left_alone.*allow_uncertified=true"):
        run_phase2(tiny.config(llama_folder), "1.5")
    run_phase2(tiny.config(llama_folder, "model.allow_uncertified=true"), "1.5")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("cedkv")
    assert experiment is not None
    allowed, rejected = client.search_runs([experiment.experiment_id], max_results=2)
    assert [run.data.tags["certificate"] for run in (allowed, rejected)] == ["uncertified"] * 2
    assert [run.info.status for run in (allowed, rejected)] == ["FINISHED", "FAILED"]
    for run in (allowed, rejected):
        assert any(f.path == "artifacts/certificate.json" for f in client.list_artifacts(run.info.run_id, "artifacts"))


def _rewritten(folder: Path, change: Callable[[dict[str, Any]], None], weights: Callable[[Any], Any] | None = None) -> Path:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    if weights is not None:
        tensors = weights(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


LIES: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "more layers": ("llama", lambda c: c.update(num_hidden_layers=5), "are missing"),
    "fewer key heads": ("llama", lambda c: c.update(num_key_value_heads=1), "another shape"),
    "a wider head": ("llama", lambda c: c.update(head_dim=32), "another shape"),
    "another vocabulary": ("llama", lambda c: c.update(vocab_size=600), "another shape"),
    "fewer layers": ("llama", lambda c: c.update(num_hidden_layers=3), "weights_without_place"),
    "no bias": ("qwen2", lambda c: c.update(model_type="llama", architectures=["LlamaForCausalLM"]), "weights_without_place"),
    "no norm of q and k": ("qwen3", lambda c: c.update(model_type="llama"), "weights_without_place"),
}


@pytest.mark.parametrize(("architecture", "change", "reason"), LIES.values(), ids=LIES.keys())
def test_a_configuration_that_contradicts_its_weights_is_rejected(
    tmp_path: Path, architecture: str, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    folder = _rewritten(tiny.save(tmp_path, architecture), change)
    with pytest.raises(ModelError, match=reason):
        made(folder).check([tiny.config(folder)])


def test_a_configuration_that_ties_what_the_checkpoint_has_apart_changes_nothing(tmp_path: Path) -> None:
    """transformers keeps the two apart, and so do the numbers."""
    _, lm = tiny.load(tiny.save(tmp_path))
    _, tied = tiny.load(_rewritten(tmp_path, lambda content: content.update(tie_word_embeddings=True)))
    assert torch.equal(tied.model.lm_head.weight, lm.model.lm_head.weight)
    assert certify(tied, fingerprint(tied), None).certified


def test_damaged_weights_are_not_certified(tmp_path: Path) -> None:
    """A NaN in one weight of the last layer."""

    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.3.self_attn.q_proj.weight"][0, 0] = float("nan")
        return tensors

    folder = _rewritten(tiny.save(tmp_path), lambda _: None, damage)
    found = made(folder)
    assert not found.certified
    assert "not finite" in str(found.broke)


@pytest.mark.parametrize(("values", "worst"), [([0.0, math.nan, 1.0], math.nan), ([], math.nan), ([0.5, 2.0, 1.0], 2.0)])
def test_a_nan_among_the_samples_is_the_worst(values: list[float], worst: float) -> None:
    """Python's max would keep whichever came first; and nothing observed must not pass either."""
    assert probe.worst(values) == pytest.approx(worst, nan_ok=True)


def test_attention_that_is_not_finite_is_not_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lm = tiny.load(tiny.save(tmp_path))
    attention_rows = attention.attention_rows
    monkeypatch.setattr(attention, "attention_rows", lambda *args: attention_rows(*args) * math.nan)
    certificate_ = certify(lm, fingerprint(lm), None)
    verdicts = {finding.name: finding.verdict for finding in certificate_.findings}
    assert verdicts["attention_rows"] == "insufficient"
    assert not certificate_.certified
