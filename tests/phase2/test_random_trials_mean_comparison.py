"""The random arm: its figure is the mean over trials, its draws depend on seed, trial and sample and on nothing else."""

import numpy as np
import pytest

from cedkv.checks.base import CheckResult as Check
from cedkv.config.schema import Phase2Config, SelectBlock
from cedkv.core.seeding import rng_for
from cedkv.core.values import Evidence
from cedkv.metrics_phase2 import run_metrics
from cedkv.selectors.base import SelectionTask
from tests.support import making
from tests.support.making import select

BLOCK = SelectBlock(span_len=2, span_budget=3, min_span_distance=3)
DEMO = making.kinds("diad" * 16)


def draw(seed: int, trial: int, sample_id: str) -> tuple[int, ...]:
    task = SelectionTask(BLOCK, DEMO, Evidence(np.zeros(len(DEMO))), rng_for(seed, "random", trial, sample_id))
    return select("random_span", task).kept_tokens


def versus(correct_select: list[bool], correct_random: list[list[bool]]) -> Check:
    """The check on three times these samples: fewer than six resolve nothing."""
    on = 3 * [making.on(correct_select=s, correct_random=r) for s, r in zip(correct_select, correct_random, strict=True)]
    checks = making.gate_b(Phase2Config(), on, [making.off()])
    (found,) = [c for c in checks if c.name == "select_vs_random"]
    return found


def test_mean_and_spread_over_trials_by_hand() -> None:
    """Three samples, two trials with accuracies 1/3 and 1: not the accuracy of a vote, nor of the first trial."""
    on = [
        making.on(correct_random=[True, True]),
        making.on(correct_random=[False, True]),
        making.on(correct_random=[False, True]),
    ]
    metrics = run_metrics(on, [])
    assert metrics["phase2_on_acc_student_random_mean"] == pytest.approx(2 / 3)
    assert metrics["phase2_on_acc_student_random_std"] == pytest.approx(1 / 3)


def test_single_trial_has_no_spread() -> None:
    metrics = run_metrics([making.on(correct_random=[True]), making.on(correct_random=[False])], [])
    assert metrics["phase2_on_acc_student_random_mean"] == 0.5
    assert metrics["phase2_on_acc_student_random_std"] == 0.0


def test_no_trials_no_figure() -> None:
    """Phase 1.5 draws no trials; a mean of 0 would be an accuracy, and select would beat it."""
    metrics = run_metrics([making.on(correct_random=[], kl_random_teacher=[])], [])
    assert metrics["phase2_on_acc_student_random_mean"] is None
    assert metrics["phase2_on_acc_student_random_std"] is None
    assert metrics["phase2_rel_kl_to_teacher_random"] is None


@pytest.mark.parametrize(
    ("correct_select", "correct_random", "verdict"),
    [
        ([True, True], [[True, False], [False, True]], "pass"),
        ([True, False], [[True, False], [False, True]], "pass"),  # as many as the mean: not worse
        ([False, False], [[True, False], [False, False]], "fail"),
        ([True, False], [[True, True], [True, False]], "fail"),  # beats the second trial alone
        ([True, False], [[], []], "insufficient"),
    ],
)
def test_select_is_held_against_the_mean(correct_select: list[bool], correct_random: list[list[bool]], verdict: str) -> None:
    assert versus(correct_select, correct_random).verdict == verdict


def test_check_shows_both_accuracies() -> None:
    found = versus([True, False], [[True, True], [True, False]])
    assert (found.observed, found.limit, found.relation, found.n) == (0.5, 0.75, ">=", 6)


def test_same_draw_again() -> None:
    assert draw(42, 1, "on-3") == draw(42, 1, "on-3")


def test_trials_samples_and_seeds_differ() -> None:
    """Trials that repeat one draw would make a mean over trials of a single one."""
    assert len({draw(42, trial, "on-3") for trial in range(20)}) >= 18
    assert len({draw(42, 0, f"on-{k}") for k in range(20)}) >= 18
    assert len({draw(seed, 0, "on-3") for seed in range(20)}) >= 18


def test_sample_is_drawn_alike_in_any_order_and_company() -> None:
    """One generator passed from sample to sample would tie a draw to the batch it is in."""
    ids = [f"on-{k}" for k in range(8)]
    forward = {name: draw(42, 2, name) for name in ids}
    backward = {name: draw(42, 2, name) for name in reversed(ids)}
    assert forward == backward
    assert draw(42, 2, "on-5") == forward["on-5"]


def test_purposes_do_not_share_draws() -> None:
    """Select mode random_span must not repeat the random arm's first trial, or it would tie with its own baseline."""
    one, other = (rng_for(42, purpose, 0, "on-0").integers(1 << 62) for purpose in ("select", "random"))
    assert one != other


@pytest.mark.parametrize(("left", "right"), [((1, "a", 2, "3"), (1, "a", 23, "")), ((1, "a", 0, "x"), (1, "a0", 0, "x"))])
def test_digest_keeps_its_parts_apart(left: tuple[int, str, int, str], right: tuple[int, str, int, str]) -> None:
    assert rng_for(*left).integers(1 << 62) != rng_for(*right).integers(1 << 62)


def test_digest_is_stable_over_versions() -> None:
    """A run of last year can be drawn again: Python's own ``hash`` would change with every process."""
    assert rng_for(42, "random", 0, "on-42-00000").bit_generator.random_raw() == 14787215269896131482
