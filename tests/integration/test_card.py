"""What a card asks of the code, tried on a stand-in for one: no operation on two devices, and few waits for it in a unit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from cedkv.conditions import Condition
from cedkv.config.schema import KL_LIMIT
from cedkv.core.errors import NumericsError
from cedkv.core.values import Record
from cedkv.eval_phase2 import run_units
from cedkv.inference import distributions, off
from cedkv.inference.batch import silent
from cedkv.inference.distributions import finite_by_the_end, require_finite
from cedkv.kv.transfers import download, to_lists
from cedkv.models import devices
from cedkv.models.loading import LanguageModel
from cedkv.runs.devices import largest_differences
from cedkv.runs.rehearsal import counting
from cedkv.tasks.load import Samples, load_samples
from cedkv.units import plan_samples
from tests.support import card, tiny

SMALL = ("eval.on_samples=4", "eval.off_samples=4", "eval.gate_a_samples=1", "runtime.batch_size=4")
GATHERED = ("prefix.kv_source=gather", "prefix.boundary_replay=2", "eval.lds_masks=2")
OF_CHECKS = ("checks/", "inference/prefix_store.py", "models/fingerprint.py")
"""Where Gate A's checks and what they alone call wait."""
OF_ALL_CHECKS = 40
"""Waits in the checks themselves at most, whose unit has one sample of Gate A: one or two a check, none a layer."""
WAITS = {
    "a mask is looked at by transformers, once a pass": ("transformers masking_utils.py", None),
    "results and finite checks are fetched, of the unit, its repetition, Gate A's batches and checks": ("kv/transfers.py", 16),
    "whether base's answers go on, every eighth token": ("inference/off.py", 1),
    "KL of OFF prompts, and along their answers for the checks": ("eval_phase2.py", 2),
}
"""What makes the host wait in a unit of one condition, however many samples, layers and tokens -> file, how often at most."""


def unit(folder: Path, device: str, *own: str) -> tuple[LanguageModel, tuple[Samples, list[Condition]]]:
    config, lm = tiny.load(folder, *SMALL, f"runtime.device={device}", *own)
    return lm, (load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary), [Condition("run", config)])


def records(lm: LanguageModel, work: tuple[Samples, list[Condition]]) -> list[Record]:
    samples, conditions = work
    units = plan_samples(conditions, samples, "2")
    assert len(units) == 1
    return [record for _, found in run_units(lm, conditions, samples, units, "2", silent) for record in found["run"]]


@pytest.mark.parametrize("own", [(), pytest.param(GATHERED, marks=pytest.mark.slow)], ids=["prefill", "gather"])
def test_all_of_a_unit_is_on_the_card_and_hardly_waited_for(llama_folder: Path, own: tuple[str, ...]) -> None:
    on_cpu = records(*unit(llama_folder, "cpu", *own))
    with card.stand_in():
        lm, work = unit(llama_folder, "cuda", *own)
        with card.counting_waits() as waits, counting(lm.model) as count:
            found = records(lm, work)
    difference = largest_differences({"run": on_cpu}, {"run": found})
    assert difference["tokens"] == difference["selections"] == 0
    assert max(difference["kl"], difference["logprob"]) < 1e-4
    if own:
        return
    by_file: Counter[str] = Counter()
    for (where, _), times in waits.items():
        if not where.startswith(OF_CHECKS):
            by_file[where.partition(":")[0]] += times
    limits = {file: count.passes if most is None else most for file, most in WAITS.values()}
    assert {file: times for file, times in by_file.items() if times > limits.get(file, 0)} == {}
    assert sum(times for (where, _), times in waits.items() if where.startswith("checks/")) <= OF_ALL_CHECKS


def test_more_samples_do_not_make_more_waits(llama_folder: Path) -> None:
    """Of a unit's own passes: none is per sample, per layer or per token."""
    counts = []
    with card.stand_in():
        for n in (2, 4):
            sizes = (f"eval.on_samples={n}", f"eval.off_samples={n}", "runtime.batch_size=8")
            lm, work = unit(llama_folder, "cuda", *sizes)
            with card.counting_waits() as waits:
                records(lm, work)
            own = {where: n for (where, _), n in waits.items() if not where.startswith(("transformers", *OF_CHECKS))}
            counts.append(own)
    assert counts[0] == counts[1]


def test_what_is_not_finite_is_named_when_the_unit_ends(llama_folder: Path) -> None:
    """The first of all, as on the CPU, though what follows from it has been computed meanwhile."""
    said = []
    for device in ("cpu", "cuda"):
        with card.stand_in():
            lm, work = unit(llama_folder, device)
            last = work[0].on[-1]
            others = {token for sample in work[0].on[:-1] for token in (*sample.teacher_ids, *sample.base_ids)}
            (token, *_) = [token for token in last.demo_token_ids if token not in others]
            with torch.no_grad():
                lm.model.get_input_embeddings().weight[token] = torch.nan
            with pytest.raises(NumericsError) as caught:
                records(lm, work)
            said.append(str(caught.value))
            assert f"teacher logits of 1 of 4 samples are not finite (first: {last.sample_id})" in said[-1]
    assert said[0] == said[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_of_a_card_is_enough_and_an_error_that_follows_from_it_comes_second(bad: float) -> None:
    with card.stand_in():
        values = torch.zeros(3, 2, 5, device="cuda")
        huge = torch.full((2, 8), 3e38, device="cuda")
        with finite_by_the_end():
            require_finite(values, "keys", list("abc"))
            require_finite(huge, "logits", list("de"))
            require_finite(values[:, :, :0], "nothing", list("abc"))
        values[1, 0, 3] = bad

        @finite_by_the_end()
        def fail_after_looking_at(keys: torch.Tensor) -> None:
            require_finite(huge, "logits", list("de"))
            require_finite(keys, "keys", list("abc"))
            raise ZeroDivisionError

        with pytest.raises(NumericsError, match=r"^keys of 1 of 3 samples .*first: b") as caught:
            fail_after_looking_at(values)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            fail_after_looking_at(torch.zeros_like(values))
        with pytest.raises(NumericsError, match="keys"):
            require_finite(values, "keys", list("abc"))


def test_many_results_are_one_wait() -> None:
    with card.stand_in(), card.counting_waits() as waits:
        here = [torch.arange(6).reshape(2, 3), torch.zeros(0, 4), torch.tensor([True, False]), torch.tensor(2.5)]
        there = [tensor.to("cuda", non_blocking=True) for tensor in here]
        for one, other in zip(download([*there, here[0]]), [*here, here[0]], strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
        assert to_lists({"a": there[0], "b": there[3]}) == {"a": [[0, 1, 2], [3, 4, 5]], "b": 2.5}
    assert sum(waits.values()) == 2


def test_two_devices_in_one_operation_are_an_error() -> None:
    """Or the stand-in would prove nothing."""
    with card.stand_in():
        one, other = torch.ones(3, device="cuda"), torch.ones(3)
        for wrong in (lambda: one + other, lambda: other[one.long()], lambda: torch.cat([one, other]), one.numpy):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        assert (one + 1).device == card.CARD
        assert (one + other.sum()).device == card.CARD
        assert one[other.long() - 1].cpu().tolist() == [1, 1, 1]


def test_on_cards_that_are_slow_at_float64_distributions_are_in_float32(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The floor is then that of float32's rounding, and far below its limit."""
    with card.stand_in():
        assert devices.sum_dtype.__wrapped__(card.CARD) == torch.float64  # of an H100
        for slow in ((7, 5), (8, 6), (8, 9), (10, 3), (12, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, slow=slow: slow)
            assert devices.sum_dtype.__wrapped__(card.CARD) == torch.float32
    for module in (distributions, off):
        monkeypatch.setattr(module, "sum_dtype", lambda _: torch.float32)
    floors = [record for record in records(*unit(llama_folder, "cpu")) if record["type"] == "plumbing"]
    floor = max(record[name] for record in floors for name in ("teacher_incremental", "batch_consistency") if name in record)
    assert 0 < floor < KL_LIMIT["float32"] / 10
