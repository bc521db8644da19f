"""Gold coverage, LDS and comprehensiveness of a finished run, computed again from its files; nothing of ``cedkv``.

A token is hidden from the query alone, in one uncached pass over demo and query: the demo's own tokens still see it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from tests.oracle.outside import Plain, Rules

if TYPE_CHECKING:
    from tests.oracle.outside_run import Comparison

Judged = dict[str, float]


def check_quality(
    found: Comparison, plain: Plain, record: dict[str, Any], chosen: dict[str, Any], teacher: np.ndarray, rules: Rules
) -> Judged:
    """Compute how good one sample's selection and scores are; return the numbers that it has, by their key in the record.

    Args:
        teacher: log-probabilities after demo + query.
    """
    name, own = chosen["sample_id"], chosen["prefix_of"] == chosen["sample_id"]
    judged: Judged = {}
    if "gold_tokens" in chosen:
        gold = range(*chosen["gold_tokens"])
        if own:
            judged["gold_coverage"] = sum(token in chosen["kept_tokens"] for token in gold) / len(gold)
        by_trial = [sum(token in trial["kept_tokens"] for token in gold) / len(gold) for trial in chosen["random"]]
        found.same(f"{name} coverage of random spans", record["gold_coverage_random"], by_trial)
    found.same(f"{name} gold coverage", record.get("gold_coverage"), judged.get("gold_coverage"))
    if rules.lds_masks and own:
        if (score := check_masks(found, plain, chosen, teacher, rules)) is not None:
            judged["lds"] = score
        spans = {token for span in chosen["spans"] for token in range(span["start"], span["end"])}
        without = plain.logprobs_without(chosen["demo_token_ids"], chosen["query_token_ids"], spans)
        judged["comprehensiveness"] = teacher[chosen["answer_token_id"]] - without[chosen["answer_token_id"]]
    found.same(f"{name} numbers", {key for key in ("gold_coverage", "lds", "comprehensiveness") if key in record}, set(judged))
    for key in record.keys() & judged.keys():
        found.number(key, record[key], judged[key])
    return judged


def check_masks(found: Comparison, plain: Plain, chosen: dict[str, Any], teacher: np.ndarray, rules: Rules) -> float | None:
    """Compute the answers under every mask, and their rank correlation with the scores of what is visible."""
    name, demo, first = chosen["sample_id"], chosen["demo_token_ids"], int(chosen["token_kinds"][0] == "bos")
    pieces = [range(at, min(at + rules.span_len, len(demo))) for at in range(first, len(demo), rules.span_len)]
    answer = chosen["lds_token_id"]
    found.token(f"{name} LDS", answer, teacher)
    found.same(f"{name} masks", len(chosen["lds_visible"]), rules.lds_masks)
    sums = []
    for numbers, recorded in zip(chosen["lds_visible"], chosen["lds_log_odds"], strict=True):
        visible = {token for number in numbers for token in pieces[number]}
        logprobs = plain.logprobs_without(demo, chosen["query_token_ids"], set(range(first, len(demo))) - visible)
        found.number("log-odds", recorded, logprobs[answer] - math.log(-math.expm1(logprobs[answer])))
        sums.append(math.fsum(chosen["scores"][token] for token in visible if token > 0))
    if chosen["scores_of"] != "selector" or len(set(sums)) == 1 or len(set(chosen["lds_log_odds"])) == 1:
        return None
    return float(spearmanr(sums, chosen["lds_log_odds"]).statistic)


def check_means(found: Comparison, metrics: dict[str, float | None], judged: list[Judged]) -> None:
    """Compute the means over the samples that have a number."""
    for key in ("gold_coverage", "lds", "comprehensiveness"):
        values = [of_sample[key] for of_sample in judged if key in of_sample]
        recorded = metrics[f"phase2_{key}_mean"]
        found.same(f"{key} is a metric", recorded is not None, bool(values))
        if recorded is not None and values:
            found.number("metric", recorded, float(np.mean(values)))
