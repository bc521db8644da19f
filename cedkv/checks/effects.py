"""Checks that are decided from a run's records: that the prefix has an effect at all (Gate A), that it helps (Gate B), and that
the run can say so (preconditions).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from cedkv.checks.base import Check, CheckResult, Gate, RunRecords
from cedkv.checks.resolution import LEAST_DIFFERING, accuracy_resolution, mean_resolution, tail_resolution
from cedkv.core.text import number
from cedkv.core.values import Record
from cedkv.metrics_phase2 import mean, repro_accuracies

LEAST_FLOOR = 1e-12
"""Stands in for a floor of 0 nats (both sides came out the same to the last bit), which no effect at all would reach."""


def _effect_limit(run: RunRecords) -> float | None:
    """Return the smallest KL that counts as an effect: ``nonzero_effect_over_floor_min`` times the numerical floor."""
    factor = run.config.thresholds.nonzero_effect_over_floor_min
    return None if run.floor is None else max(run.floor, LEAST_FLOOR) * factor


class NonzeroEffect(Check):
    """The selected prefix moves the output by a multiple of the numerical floor.

    Mean KL(select || base) over ON samples, in nats.

    Why: a prefix that never reaches the attention would pass every check of equality. Cannot see: whether the effect is of
    any use; that is Gate B.
    """

    gate, name, unit, relation, threshold = "A", "nonzero_effect", "nats", ">=", "nonzero_effect_over_floor_min"

    def judge(self, run: RunRecords) -> CheckResult:
        effect = mean(record["phase2_delta_on_select"] for record in run.on)
        return self.result(effect, _effect_limit(run), len(run.on))


class ReproTolerance(Check):
    """Repetitions of the select arm in reshuffled batches answer as many samples.

    Largest minus smallest accuracy over the run and its repetitions. A repetition selects again from what the teacher's passes
    of the run gave, and runs prefixes and answers again; ``batch_consistency`` and ``attention_alone`` compare these passes
    with batches of one. A missing repetition decides nothing.

    Why: an answer must not depend on which other samples are in its batch. Cannot see: what is wrong in every repetition
    alike, and changes that move no greedy token.
    """

    gate, name, unit, threshold = "A", "repro_tolerance", "accuracy", "repro_acc_tol"

    def judge(self, run: RunRecords) -> CheckResult:
        complete = len(run.repro) == len(run.on) * (run.config.eval.repro_runs - 1)
        accuracies = repro_accuracies(run.on, run.repro)
        drift = max(accuracies) - min(accuracies) if accuracies and complete else None
        return self.result(drift, run.config.thresholds.repro_acc_tol, len(run.on) if complete else 0)


class RandomIsAnother(Check):
    """Random spans other than the selected ones change the output by another KL.

    Largest |KL(random || base) - KL(select || base)| over trials that keep other tokens than select does.

    Why: the baseline must not be the select arm under another name. Cannot see: whether random spans are drawn uniformly.
    """

    gate, name, unit, relation, threshold = "A", "random_is_another", "nats", ">=", "nonzero_effect_over_floor_min"

    def judge(self, run: RunRecords) -> CheckResult | None:
        if not any(record["correct_random"] for record in run.on):
            return None
        moved = [abs(kl - record["phase2_delta_on_select"]) for record in run.on for kl in _other_randoms(record)]
        return self.result(float(np.max(moved)) if moved else None, _effect_limit(run), len(moved))


def _other_randoms(record: Record) -> list[float]:
    """Return KL(random || base) of the trials that keep other tokens than select does."""
    trials = zip(record.get("kl_random_base", []), record.get("random_same", []), strict=True)
    return [value for value, same in trials if not same]


class MetricCheck(Check):
    """A metric of the run against a limit; a check of Gate B unless it says otherwise.

    metric: name of the observed metric.
    """

    gate: ClassVar[Gate | None] = "B"
    metric: ClassVar[str]

    def limit(self, run: RunRecords) -> float | None:
        """Return the limit that the configuration sets."""
        return float(getattr(run.config.thresholds, self.threshold))

    def worst(self, run: RunRecords) -> float | None:
        """Return the worst that could have been observed in this run; None where there is no bound."""
        return None

    def resolution(self, run: RunRecords) -> str:
        """Return ``CheckResult.resolves``; empty where nothing is known."""
        return ""

    def judge(self, run: RunRecords) -> CheckResult:
        n, limit, worst = self.n(run), self.limit(run), self.worst(run)
        result = replace(self.result(run.metrics[self.metric], limit, n), resolves=self.resolution(run))
        if result.verdict == "pass" and worst is not None and replace(result, observed=worst).verdict == "pass":
            why = f"no outcome could have failed: {number(worst)} is the worst, and the limit is {number(limit)}"
            return replace(result, decides=False, note=why)
        return result

    def n(self, run: RunRecords) -> int:
        """Return the number of samples."""
        return len(run.on)


class AccuracyCheck(MetricCheck):
    """A metric that compares the accuracy of two arms, paired over ON samples.

    A difference that no outcome on n samples makes significant is not resolved: a pass is then ``insufficient``.
    """

    def resolution(self, run: RunRecords) -> str:
        return accuracy_resolution(len(run.on))

    def judge(self, run: RunRecords) -> CheckResult:
        result = super().judge(run)
        if result.verdict == "pass" and len(run.on) < LEAST_DIFFERING:
            return replace(result, decides=False, note=f"{result.resolves}; evaluate more (eval.on_samples, -P max_on)")
        return result


class OnGain(AccuracyCheck):
    """Select answers more ON samples than base.

    Why: it is what the prefix is for. Cannot see: whether it is the content of the spans that helps: any example shows the
    form of an answer (``select_vs_random``, accuracy among labels).
    """

    name, unit, relation = "on_gain", "accuracy", ">="
    metric, threshold = "phase2_on_gain_select", "on_gain_min"

    def worst(self, run: RunRecords) -> float | None:
        base = run.metrics.get("phase2_on_acc_base")
        return None if base is None else -base


class OffDeltaP99(MetricCheck):
    """The prefix leaves OFF prompts alone.

    99th percentile (an observed value) of KL(select || base) over OFF prompts. Where ``off_entropy`` does not hold, a small
    one is ``insufficient``; a large one still fails.

    Why: a prefix that disturbs everything may help too. Cannot see: harm to prompts unlike these, and further into the
    answer (``phase2_off_further_kl_p99``); none of 128 beyond the limit still allows 2.3 % of all.
    """

    name, unit = "off_delta_p99", "nats"
    metric, threshold = "phase2_off_delta_p99_select", "off_delta_p99_max"

    def n(self, run: RunRecords) -> int:
        return len(run.off)

    def resolution(self, run: RunRecords) -> str:
        return tail_resolution(len(run.off))

    def judge(self, run: RunRecords) -> CheckResult:
        result = super().judge(run)
        entropy = OffEntropy().judge(run)
        if entropy is None or entropy.verdict == "pass" or result.verdict != "pass":
            return result
        return replace(result, decides=False, note=entropy.note)


class DeltaOn(MetricCheck):
    """The prefix has an effect on ON samples.

    Mean KL(select || base) over ON samples.

    Why: what is no effect cannot help. Cannot see: its direction.
    """

    name, unit, relation = "delta_on", "nats", ">="
    metric, threshold = "phase2_delta_on_mean_select", "delta_on_min"

    def worst(self, run: RunRecords) -> float | None:
        return 0.0

    def resolution(self, run: RunRecords) -> str:
        return mean_resolution(np.mean, [record["phase2_delta_on_select"] for record in run.on])


class RelKlToTeacher(MetricCheck):
    """Select is nearer to the teacher than base is.

    Mean KL(select || teacher) over mean KL(base || teacher) + 1e-6.

    Why: the prefix stands for the demonstration, so it has to move the answer to where the demonstration does. Cannot see:
    whether the teacher is right (``teacher_gain``).
    """

    name, unit = "rel_kl_to_teacher", "ratio"
    metric, threshold = "phase2_rel_kl_to_teacher_select", "rel_kl_to_teacher_max"

    def resolution(self, run: RunRecords) -> str:
        pairs = ([record[name] for record in run.on] for name in ("kl_select_teacher", "kl_base_teacher"))
        return mean_resolution(lambda select, base: float(select.mean() / (base.mean() + 1e-6)), *pairs)


class SelectVsRandom(AccuracyCheck):
    """Select answers at least as many ON samples as random spans.

    The limit is the random arm's accuracy, mean over trials. Where neither answers a sample, nothing is compared.

    Why: a choice has to be worth more than chance at the same cost. Cannot see: whether a difference is more than luck: it
    is no test; the paired comparisons of the report are.
    """

    name, unit, relation = "select_vs_random", "accuracy", ">="
    metric = "phase2_on_acc_student_select"

    def limit(self, run: RunRecords) -> float | None:
        return run.metrics["phase2_on_acc_student_random_mean"]

    def worst(self, run: RunRecords) -> float | None:
        select = run.metrics.get("phase2_on_acc_student_select")
        return 0.0 if select == 0 else None  # random spans might have answered more than select does


class TeacherGain(AccuracyCheck):
    """The teacher answers more ON samples than base.

    It is the gain in accuracy.

    Why: the select arm must gain as much, so where the teacher does not, the gates say nothing about the selection. Cannot
    see: whether the teacher learns the content of the examples or their form (accuracy among labels).
    """

    gate, name, unit, relation = "precondition", "teacher_gain", "accuracy", ">="
    metric, threshold = "phase2_on_gain_teacher", "on_gain_min"

    def judge(self, run: RunRecords) -> CheckResult:
        result = super().judge(run)
        if result.verdict != "fail":
            return result
        gain, limit, base = result.observed, result.limit, run.metrics["phase2_on_acc_base"]
        if base is not None and limit is not None and base > 1 - limit:
            reason = f"base answers {number(base)} of the samples without any demonstration"
        else:
            reason = "this model does not learn this task from the demonstration"
        return replace(
            result,
            note=f"the teacher itself gains {number(gain)} on base (limit {number(limit)}): {reason}, so the verdict says "
            "nothing about the selection",
        )


class OffEntropy(Check):
    """Base is uncertain of the next token of most OFF prompts.

    Median entropy of base. It applies where records hold the entropy.

    Why: where base is certain (a chat template that forces the first token), any prefix leaves the next token as it is, and
    its KL shows no harm. Cannot see: how certain base is further into its answer.
    """

    gate, name, unit, relation, threshold = "precondition", "off_entropy", "nats", ">=", "off_entropy_min"

    def judge(self, run: RunRecords) -> CheckResult | None:
        n = sum("base_entropy" in record for record in run.off)
        if n == 0:
            return None
        median = run.metrics["phase2_off_base_entropy_median"]
        result = self.result(median, run.config.thresholds.off_entropy_min, n)
        if result.verdict == "pass":
            return result
        return replace(
            result,
            note=f"base is all but certain of the next token of most OFF prompts (median entropy {number(result.observed)} "
            f"nats, limit {number(result.limit)}), so its KL shows no harm there: give OFF prompts as plain text "
            "(model.chat_template=false), other arguments of the template (model.template_kwargs={enable_thinking: false}), or "
            "documents (data.off_path), and look at the further positions",
        )
