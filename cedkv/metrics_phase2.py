"""Run metrics from sample records, as pure functions; formulas in ``docs/metrics.md``.

A metric without samples is None, never 0 and never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from cedkv.core.values import Record


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, or None where there are no values."""
    numbers = [float(value) for value in values]
    return float(np.mean(numbers)) if numbers else None


def difference(left: float | None, right: float | None) -> float | None:
    """Return ``left - right``, or None where either is None."""
    return None if left is None or right is None else left - right


def p99(values: Sequence[float]) -> float | None:
    """Return the 99th percentile by ``method="higher"``: an observed value, never a smaller interpolated one.

    The result is NaN where any value is not finite, because a NaN in the last hundredth, or sorted to the front, would not
    show; None where there are no values.
    """
    if not len(values):
        return None
    return float(np.percentile(values, 99, method="higher")) if np.isfinite(values).all() else math.nan


def median(values: Sequence[float]) -> float | None:
    """Return the median; NaN where any value is not finite, None where there are no values."""
    if not len(values):
        return None
    return float(np.median(values)) if np.isfinite(values).all() else math.nan


def share_above(values: Sequence[float], limit: float | None) -> float | None:
    """Return the share of values above a limit; NaN where any value is not finite, None without values or limit."""
    if limit is None or not len(values):
        return None
    return float(np.mean(np.asarray(values) > limit)) if np.isfinite(values).all() else math.nan


def upper_bound(share: float | None, n: int) -> float | None:
    """Return the one-sided upper 95 % bound of a share that was seen in n draws (Clopper and Pearson 1934).

    None of 128 bounds it at 0.0231, none of 299 at 0.00997. NaN where the share is not finite, None where there is none.
    """
    if share is None or not math.isfinite(share):
        return share
    from scipy.stats import binomtest

    test = binomtest(round(share * n), n, alternative="less")
    return float(test.proportion_ci(confidence_level=0.95, method="exact").high)


def relative_kl(student_teacher: Sequence[float], base_teacher: Sequence[float]) -> float | None:
    """Return mean KL(student || teacher) / (mean KL(base || teacher) + 1e-6).

    The result is NaN where any KL is not finite, because an infinite denominator would make every student close to the teacher;
    None where there are no samples.
    """
    if not student_teacher or not base_teacher:
        return None
    if not (np.isfinite(student_teacher).all() and np.isfinite(base_teacher).all()):
        return math.nan
    return float(np.mean(student_teacher) / (np.mean(base_teacher) + 1e-6))


def run_metrics(on: Sequence[Record], off: Sequence[Record], off_delta_limit: float | None = None) -> dict[str, float | None]:
    """Return the metrics of a run by their MLflow names.

    Args:
        on, off: sample records of ON samples and OFF prompts.
        off_delta_limit: ``thresholds.off_delta_p99_max`` in nats, beyond which OFF prompts are counted; None counts none.
    """
    trials = len(on[0]["correct_random"]) if on else 0
    random = [float(np.mean([record["correct_random"][trial] for record in on])) for trial in range(trials)]
    base = mean(record["correct_base"] for record in on)
    teacher = mean(record["correct_teacher"] for record in on)
    select = mean(record["correct_select"] for record in on)
    random_mean = mean(random)
    base_teacher = [record["kl_base_teacher"] for record in on]
    labelled = [record for record in on if "kl_select_teacher_labels" in record]
    select_labels = [record["kl_select_teacher_labels"] for record in labelled]
    base_labels = [record["kl_base_teacher_labels"] for record in labelled]
    random_labels = [value for record in labelled for value in record["kl_random_teacher_labels"]]
    deltas_off = [record["phase2_delta_off_select"] for record in off]
    further_off = [value for record in off for value in record.get("further_kl", ())]
    over_limit = share_above(deltas_off, off_delta_limit)
    gap = difference(teacher, base)
    gain = difference(select, base)
    return {
        "phase2_on_acc_base": base,
        "phase2_on_acc_teacher": teacher,
        "phase2_on_acc_student_select": select,
        "phase2_on_acc_student_random_mean": random_mean,
        "phase2_on_acc_student_random_std": float(np.std(random)) if trials else None,
        "phase2_on_gain_select": gain,
        "phase2_on_gain_teacher": gap,
        "phase2_gap_recovered": gain / gap if gap is not None and gain is not None and gap > 0 else None,
        "phase2_delta_on_mean_select": mean(record["phase2_delta_on_select"] for record in on),
        "phase2_answer_logprob_gain_mean": mean(record["phase2_answer_logprob_gain"] for record in on),
        "phase2_kl_base_teacher_mean": mean(base_teacher),
        "phase2_kl_select_teacher_mean": mean(record["kl_select_teacher"] for record in on),
        "phase2_rel_kl_to_teacher_select": relative_kl([record["kl_select_teacher"] for record in on], base_teacher),
        "phase2_rel_kl_to_teacher_random": relative_kl(
            [value for record in on for value in record["kl_random_teacher"]], base_teacher
        ),
        "phase2_on_acc_labels_base": mean(record["correct_base_labels"] for record in labelled),
        "phase2_on_acc_labels_teacher": mean(record["correct_teacher_labels"] for record in labelled),
        "phase2_on_acc_labels_student_select": mean(record["correct_select_labels"] for record in labelled),
        "phase2_on_acc_labels_student_random_mean": mean(v for record in labelled for v in record["correct_random_labels"]),
        "phase2_kl_base_teacher_labels_mean": mean(base_labels),
        "phase2_kl_select_teacher_labels_mean": mean(select_labels),
        "phase2_kl_random_teacher_labels_mean": mean(random_labels),
        "phase2_rel_kl_labels_select": relative_kl(select_labels, base_labels),
        "phase2_rel_kl_labels_random": relative_kl(random_labels, base_labels),
        "phase2_off_delta_mean_select": mean(deltas_off),
        "phase2_off_delta_p99_select": p99(deltas_off),
        "phase2_off_over_limit_share": over_limit,
        "phase2_off_over_limit_upper": upper_bound(over_limit, len(off)),
        "phase2_off_same_token_share": mean(record["same_token"] for record in off),
        "phase2_off_base_entropy_median": median([record["base_entropy"] for record in off if "base_entropy" in record]),
        "phase2_off_further_kl_mean": mean(further_off),
        "phase2_off_further_kl_p99": p99(further_off),
        "phase2_off_further_changed_share": mean(not same for record in off for same in record.get("further_same", ())),
        "phase2_attention_causal_drop_spearman": _rank_agreement(on),
        "phase2_gold_coverage_mean": mean(record["gold_coverage"] for record in on if "gold_coverage" in record),
        "phase2_gold_coverage_random_mean": mean(value for record in on for value in record.get("gold_coverage_random", ())),
        "phase2_lds_mean": mean(record["lds"] for record in on if "lds" in record),
        "phase2_comprehensiveness_mean": mean(r["comprehensiveness"] for r in on if "comprehensiveness" in r),
    }


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation (1904); None where a side is constant: its values have no ranks."""
    from scipy.stats import spearmanr

    return float(spearmanr(left, right).statistic) if len(set(left)) > 1 and len(set(right)) > 1 else None


def _rank_agreement(on: Sequence[Record]) -> float | None:
    """Return the mean over samples of Spearman's rank correlation between attention and causal drop of the candidates."""
    pairs = ((record.get("candidate_attention", []), record.get("candidate_causal_drop", [])) for record in on)
    return mean(correlation for pair in pairs if (correlation := spearman(*pair)) is not None)


def repro_accuracies(on: Sequence[Record], repeats: Sequence[Record]) -> list[float]:
    """Return the select arm's accuracy in the run itself, then in each repetition."""
    by_repeat: dict[int, list[bool]] = {0: [record["correct_select"] for record in on]}
    for record in repeats:
        by_repeat.setdefault(record["repeat"], []).append(record["correct_select"])
    return [float(np.mean(correct)) for _, correct in sorted(by_repeat.items()) if correct]


def largest(records: Sequence[Record], check: str) -> float | None:
    """Return a measured check's largest observation over samples; NaN where any is not finite, None where there are none."""
    values = [record[check] for record in records if check in record]
    if not values:
        return None
    return float(np.max(values)) if np.isfinite(values).all() else math.nan
