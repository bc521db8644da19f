"""Every step of inference gives on a card what it gives on the CPU: caches, prefixes, answers, evidence, texts, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cedkv.conditions import Condition
from cedkv.core.errors import NumericsError
from cedkv.core.values import OnSample, Span
from cedkv.eval_phase2 import run_units
from cedkv.inference.ablation import answer_odds, causal_drops
from cedkv.inference.batch import Batch, silent
from cedkv.inference.distributions import kl
from cedkv.inference.evidence import read_batch, read_evidence
from cedkv.inference.head_weights import fit, fitted_scores, random_masks
from cedkv.inference.off import read_off_base
from cedkv.inference.prefix import encode
from cedkv.inference.prefix_store import load_prefix, save_prefix
from cedkv.inference.quality import comprehensiveness, gold_mass
from cedkv.kv.cache import KVPrefix, assemble, gather
from cedkv.kv.key_scores import key_scores
from cedkv.kv.positioning import place
from cedkv.kv.readings import KeyDifference, KeyNorm, LagRelative
from cedkv.kv.rope import RopeLayout, mean_rotation, rerotate_keys
from cedkv.library.models import load_model
from cedkv.library.selecting import select_kv
from cedkv.models.fingerprint import prefix_fingerprint
from cedkv.tasks.load import load_samples
from cedkv.units import plan_samples
from tests.gpu.conftest import overrides
from tests.support import tiny

pytestmark = pytest.mark.gpu


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def test_keys_and_values_as_on_the_cpu(device: str) -> None:
    """Rotation, gathering, padding, hiding, row selection and readings of a cache, on the same numbers."""
    keys, values = drawn(2, 2, 24, 16), drawn(2, 2, 24, 16).flip(0)
    halves = RopeLayout(torch.tensor([1.0, 0.1, 0.01]))
    layouts = (halves, RopeLayout(torch.tensor([0.5, 0.2]), "neighbours", 4))
    placements = [place((0, 3, 4, 9), 24, "compact", "null_pad", 6), place((2, 5), 20, "compact", "null_pad", 6)]

    def made(where: str) -> list[torch.Tensor]:
        k, v = keys.to(where), values.to(where)
        demo = KVPrefix((k, k), (v, v), torch.ones(2, 24, dtype=torch.bool, device=where), torch.tensor([24, 20], device=where))
        prefix = assemble(*gather(demo, [1, 0], placements, layouts), placements)
        picked = prefix.rows([1, 0, 1]).hide([[(0, 2)], [], [(1, 2)]])
        readings = [KeyNorm(), KeyDifference(), LagRelative(4, 2)]
        turned = rerotate_keys(k, torch.arange(48, device=where).reshape(2, 24) - 20, halves)
        return [
            turned,
            mean_rotation(torch.arange(5, device=where), halves, 16),
            *picked.keys, *picked.values, picked.visible, picked.query_start,
            *(key_scores(reading, k[0], v[0]) for reading in readings),
        ]  # fmt: skip

    for one, other in zip(made(device), made("cpu"), strict=True):
        assert one.device.type == device
        assert torch.allclose(one.cpu().float(), other.float(), atol=1e-5)


@pytest.fixture(scope="module")
def batches(device: str, llama_folder: Path) -> tuple[Batch, Batch]:
    """A batch of samples on the device, and the same on the CPU."""
    made = []
    for where in (device, "cpu"):
        config, lm = tiny.load(llama_folder, *overrides(where, "select.mode=value_weighted_attention"))
        samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
        made.append(read_batch(lm, [config], list(samples.on), None, silent, keep=range(len(samples.on))))
    return made[0], made[1]


def test_evidence_as_on_the_cpu(batches: tuple[Batch, Batch], llama_folder: Path) -> None:
    """Scores of tokens, spans hidden, masked answers, attention to gold tokens, comprehensiveness."""
    config = tiny.config(llama_folder, "select.mode=value_weighted_attention", "select.causal_drop_advisory=true")
    found: list[dict[str, np.ndarray]] = []
    for batch in batches:
        masks = random_masks(batch.samples[1], 5, 4)
        spans = [evidence_spans(sample) for sample in batch.samples]
        mass = gold_mass(batch, tiny.config(llama_folder))
        assert mass is not None
        found.append(
            {
                "scores": np.concatenate([evidence.scores for evidence in read_evidence(batch, config)]),
                "causal drops": np.array(list(causal_drops(batch, config, 0).values())),
                "log odds": answer_odds(batch, 1)(masks),
                "comprehensiveness": np.array(comprehensiveness(batch, spans, silent)),
                "gold mass": mass.total.double().numpy().ravel(),
            }
        )
    far = {name: np.abs(on_cpu - found[0][name]).max() for name, on_cpu in found[1].items()}
    # Scores have no unit, here up to 29, and two kernels of one CPU differ by 2e-4 in them; the others are nats and shares.
    assert np.allclose(found[0].pop("scores"), found[1].pop("scores"), rtol=1e-4, atol=1e-4), far
    assert all(far[name] < 1e-4 for name in found[1]), far


def evidence_spans(sample: OnSample) -> tuple[Span, ...]:
    return (Span(3, 6, 0.0), Span(len(sample.demo_token_ids) - 4, len(sample.demo_token_ids) - 1, 0.0))


def test_answers_to_off_prompts_as_on_the_cpu(batches: tuple[Batch, Batch]) -> None:
    prompts, names = [[5, 6, 7], list(range(20, 45)), [9]], ["a", "b", "c"]
    here, on_cpu = (read_off_base(batch.lm, prompts, names, 6) for batch in batches)
    assert here.tokens == on_cpu.tokens
    assert (here.logprobs.cpu() - on_cpu.logprobs).abs().max() < 1e-4
    assert here.entropy().cpu().tolist() == pytest.approx(on_cpu.entropy().tolist(), abs=1e-4)


@pytest.mark.parametrize(("source", "replay"), [("prefill", 0), ("gather", 0), ("gather", 2)])
def test_a_prefix_is_stored_and_comes_back_to_the_card(
    batches: tuple[Batch, Batch], tmp_path: Path, source: str, replay: int
) -> None:
    """Every bit of it; made on the card, it is near to the CPU's."""
    made = []
    for batch in batches:
        lm, samples = batch.lm, batch.samples
        placements = [place((2, 3, 7, 8, 9), len(s.demo_token_ids), "compact", "null_pad", 8) for s in samples]
        rows = range(len(samples))
        made.append(encode(lm, source, samples, placements, batch.teacher.demo, rows, replay))
    here, on_cpu = made
    for one, other in zip(here.keys + here.values, on_cpu.keys + on_cpu.values, strict=True):
        assert torch.allclose(one.cpu(), other, atol=1e-3)
    path, lm = tmp_path / "prefix.safetensors", batches[0].lm
    save_prefix(here, placements, prefix_fingerprint(lm), path)
    again = load_prefix(path, placements, prefix_fingerprint(lm), lm.device)
    for one, other in zip((*again.keys, *again.values, again.visible), (*here.keys, *here.values, here.visible), strict=True):
        assert one.device.type == lm.device.type
        assert torch.equal(one, other)


def test_heads_are_fitted_as_on_the_cpu(device: str, llama_folder: Path) -> None:
    agreement = []
    for where in (device, "cpu"):
        config, lm = tiny.load(llama_folder, *overrides(where, "select.mode=fitted_heads", "eval.on_samples=9"))
        samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
        (score,) = fitted_scores([config])
        agreement.append(fit(lm, [config], samples.on, "", score))
    assert agreement[0].weights == [pytest.approx(row, abs=1e-3) for row in agreement[1].weights]


def test_text_is_generated_behind_a_prefix(device: str, llama_folder: Path) -> None:
    demo = "Word: dax\nSymbol: red\n\nWord: wug\nSymbol: blue\n\n"
    queries = ["Word: wug\nSymbol:", "Word: dax\nSymbol:"]
    texts = []
    for where in (device, "cpu"):
        lm = load_model(llama_folder, device=where, **{"model.chat_template": False})
        prefix = select_kv(lm, demo, queries, "attention_diversity_span", span_len=4, span_budget=2)
        drawn = prefix.generate(8, do_sample=True, seed=3, top_p=0.9, top_k=40)
        texts.append([prefix.generate(8), "".join(prefix[0].stream(max_new_tokens=8)), len(drawn)])
    assert texts[0] == texts[1]


def test_numbers_that_are_not_finite_name_their_sample(device: str, llama_folder: Path) -> None:
    """Through a whole unit: the first sample, in the order of passes, and what of it is not a number."""
    config, lm = tiny.load(llama_folder, *overrides(device))
    samples = load_samples(config, lm.tokenizer, lm.capabilities.max_positions, lm.vocabulary)
    conditions = [Condition("run", config)]
    units = plan_samples(conditions, samples, "2")
    last = samples.on[-1]
    (token, *_) = set(last.query_token_ids) - {t for s in samples.on[:-1] for t in (*s.teacher_ids, *s.base_ids)} or [None]
    if token is None:
        pytest.fail("the samples share all tokens; take others")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[token] = float("nan")
    with pytest.raises(NumericsError, match=rf"logits of 1 of 4 samples are not finite \(first: {last.sample_id}\)"):
        list(run_units(lm, conditions, samples, units, "2", silent))


def test_distributions_are_compared_as_on_the_cpu(device: str) -> None:
    one, other = drawn(3, 500).log_softmax(-1), drawn(3, 500).flip(0).log_softmax(-1)
    assert torch.allclose(kl(one.to(device), other.to(device)).cpu(), kl(one, other), rtol=1e-5)
