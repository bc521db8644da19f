"""Phase 2 on real weights, and all of its figures computed again by plain transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from cedkv.config.resolve import resolve
from cedkv.models import smollm2
from tests.oracle.outside import Plain, Rules
from tests.oracle.outside_run import compare
from tests.support.runs import run_phase2

pytestmark = pytest.mark.weights  # plain pytest skips it; RUN_HF_TESTS=1 opts in (tests/conftest.py)

SETTINGS = (
    "model.id=smollm2-135m", "runtime.device=cpu", "eval.on_samples=3", "eval.off_samples=3", "eval.n_random_trials=2",
    "eval.gate_a_samples=2",
)  # fmt: skip
PLAIN = Rules(span_len=8, span_budget=4, min_span_distance=8)


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain(smollm2.folder(None))


JUDGED = ("eval.lds_masks=8", "select.value_weighting=output_norm", "layer_scope.selection=mid33")
JUDGED_RULES = replace(PLAIN, lds_masks=8, value_weighted=True, selection_layers="mid33")


@pytest.mark.parametrize(
    ("overrides", "rules", "limit"),
    [((), PLAIN, 1e-4), (("prefix.kv_source=gather",), PLAIN, 3e-4), (JUDGED, JUDGED_RULES, 1e-4)],
    ids=["default", "gather", "judged"],
)
def test_real_weights_pass_gate_a_and_every_figure_is_found_again(
    store: str, plain: Plain, overrides: tuple[str, ...], rules: Rules, limit: float
) -> None:
    """Tokens, log-probabilities, KL in nats, scores, spans, and how good a score is. Gather rotates keys a second time."""
    results = run_phase2(resolve(None, [*SETTINGS, *overrides]), "2")
    (folder,) = Path("outputs").iterdir()
    run = mlflow.get_run(folder.name)
    assert run.info.status == "FINISHED"
    assert run.data.tags["gateA"] == "pass", [check for check in results.checks if check.verdict != "pass"]
    assert run.data.metrics["phase2_on_acc_teacher"] > run.data.metrics["phase2_on_acc_base"]

    found = compare(folder, plain, rules)
    assert found.problems == []
    assert found.compared > 470
    assert found.worst.pop("score") < 1e-5
    assert found.worst.pop("gold_coverage") == 0
    judged = {"log-odds", "lds", "comprehensiveness"} if rules.lds_masks else set()
    assert found.worst.keys() == {"logprob", "answer", "kl", "metric"} | judged
    assert max(found.worst.values()) < limit, found.worst
