"""A finished run held against its recomputation from outside (``outside.py``).

Only what the run left behind is read: ``artifacts/phase2_selection.json`` and ``metrics.jsonl``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracle.outside import Plain, Rules, among, best_starts, divergence, labels, starts
from tests.oracle.outside_answers import After, check_answer, check_further
from tests.oracle.outside_quality import check_means, check_quality

NEAR_TIE = 1e-4
SCORED_BY_ATTENTION = ("attention_diversity_span", "entropy_gated_chunks", "whole_shots", "wrong_demo")
"""Selectors that rank tokens by the configured attention."""


@dataclass
class Comparison:
    """The largest deviation of each kind, what disagrees beyond any rounding, and how many values were compared."""

    worst: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    compared: int = 0

    def number(self, kind: str, recorded: float, computed: float) -> None:
        distance = abs(recorded - float(computed))
        self.worst[kind] = max(self.worst.get(kind, 0.0), math.inf if math.isnan(distance) else distance)
        self.compared += 1

    def same(self, what: str, recorded: Any, computed: Any) -> None:
        self.compared += 1
        if recorded != computed:
            self.problems.append(f"{what}: recorded {recorded}, computed {computed}")

    def token(self, what: str, recorded: int, logprobs: np.ndarray) -> None:
        """The greedy token; of two that are as good as tied, either will do."""
        self.compared += 1
        if logprobs.max() - logprobs[recorded] >= NEAR_TIE:
            self.problems.append(f"{what}: recorded token {recorded}, computed {logprobs.argmax()}")


def check_labels(
    found: Comparison, record: dict[str, Any], chosen: dict[str, Any], arms: dict[str, np.ndarray], randoms: list[np.ndarray]
) -> dict[str, float]:
    """KL and accuracy among the labels, which follow from the kinds of the demo's tokens; the KLs of base and select."""
    name, answer = chosen["sample_id"], chosen["answer_token_id"]
    known = labels(chosen["token_kinds"], chosen["demo_token_ids"], answer)
    found.same(f"{name} labels", chosen["label_token_ids"], known)
    restricted = {arm: [among(logprobs, known)] for arm, logprobs in arms.items()}
    restricted["random"] = [among(logprobs, known) for logprobs in randoms]
    kls = {}
    for arm, trials in restricted.items():
        recorded = record[f"correct_{arm}_labels"]
        for right, logprobs in zip(recorded if arm == "random" else [recorded], trials, strict=True):
            if np.ptp(np.sort(logprobs)[-2:]) >= NEAR_TIE:
                found.same(f"{name} {arm} correct among labels", right, known[logprobs.argmax()] == answer)
        if arm != "teacher":
            key = f"kl_{arm}_teacher_labels"
            kls[key] = [divergence(logprobs, restricted["teacher"][0]) for logprobs in trials]
            for value, computed in zip(record[key] if arm == "random" else [record[key]], kls[key], strict=True):
                found.number("kl", value, computed)
    return {key: values[0] for key, values in kls.items() if "random" not in key}


def check_state(
    found: Comparison, name: str, state: dict[str, Any], kinds: Sequence[str], run: dict[str, Any], rules: Rules
) -> None:
    """Spans are candidates, apart and within the budget; kept tokens, positions and slots follow from them."""
    begins = [span["start"] for span in state["spans"]]
    if not rules.free:
        found.same(f"{name} lengths", {span["end"] - span["start"] for span in state["spans"]}, {rules.span_len})
        found.same(f"{name} starts that are no candidates", set(begins) - set(starts(kinds, rules)), set())
        apart = all(after - before >= rules.min_span_distance for before, after in pairwise(begins))
        found.same(f"{name} apart and within the budget", apart and 1 <= len(begins) <= rules.span_budget, True)
    first = range((kinds[0] == "bos") + rules.keep_sink)
    kept = sorted(set(first).union(*(range(span["start"], span["end"]) for span in state["spans"])))
    found.same(f"{name} kept tokens", state["kept_tokens"], kept)
    compact = run["positioning_mode"] == "compact"
    found.same(f"{name} key positions", state["key_positions"], list(range(len(kept))) if compact else kept)
    found.same(f"{name} query start", state["query_start"], len(kept) if compact else len(kinds))
    slots = max(run["prefix_len"], len(kept)) if run["padding_mode"] == "null_pad" else len(kept)
    found.same(f"{name} slots", state["prefix_slots"], slots)


def compare(folder: Path, plain: Plain, rules: Rules) -> Comparison:
    """Compute every arm of every sample of a finished run, and its metrics; ``folder`` is the run's output folder."""
    run = json.loads((folder / "artifacts" / "phase2_selection.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    samples = {line["sample_id"]: line for line in lines if line["type"] == "sample"}
    states = {chosen["sample_id"]: chosen for chosen in run["on"]}
    found, mine, judged, moved = Comparison(), [], [], []

    def student(tokens: list[int], demo: list[int], placed: dict[str, Any]) -> After:
        state = plain.state(demo, placed["kept_tokens"], placed["key_positions"], run["kv_source"])

        @cache
        def after(given: tuple[int, ...]) -> np.ndarray:
            with plain.prefix_seen_by(plain.scope(run["injection_layers"]), len(placed["kept_tokens"])):
                return plain.after(tokens, given, placed["query_start"], state)

        return lambda given: after(tuple(given))

    for chosen in run["on"]:
        name, demo, query, kinds = (chosen[k] for k in ("sample_id", "demo_token_ids", "query_token_ids", "token_kinds"))
        record, answer = samples[name], chosen["answer_token_id"]
        owner = states[chosen.get("prefix_of", name)]  # whose demo the prefix is of
        if chosen["scores_of"] == "attention" or run["select_mode"] in SCORED_BY_ATTENTION:
            largest = max(1.0, *map(abs, chosen["scores"]))  # attention is below 1; times ||W_o v|| it need not be
            for recorded, computed in zip(chosen["scores"], plain.attention(demo, query, rules), strict=True):
                found.number("score", recorded / largest, computed / largest)
        if run["select_mode"] == "attention_diversity_span":
            recorded = [span["start"] for span in chosen["spans"]]
            found.same(f"{name} spans", recorded, best_starts(kinds, chosen["scores"], rules))
        check_state(found, f"{name} select", chosen, owner["token_kinds"], run, rules)
        for placed in chosen["random"]:
            check_state(found, f"{name} random {placed['trial']}", placed, kinds, run, replace(rules, free=False))

        prompts, whole = {"base": demo[: kinds[0] == "bos"] + query, "teacher": demo + query}, chosen["answer_token_ids"]
        found.same(f"{name} first token", whole[0], answer)
        afters: dict[str, After] = {arm: partial(plain.after, prompt) for arm, prompt in prompts.items()}
        afters["select"] = student(query, owner["demo_token_ids"], chosen)
        base, teacher, select = (afters[arm](())[0] for arm in ("base", "teacher", "select"))
        right = {}
        for arm, logprobs in (("base", base), ("teacher", teacher), ("select", select)):
            found.token(f"{name} {arm}", record[f"token_{arm}"], logprobs)
            generated = plain.generate(prompts[arm], len(whole)) if arm in prompts else None
            recorded = record[f"correct_{arm}"], record[f"answer_logprob_{arm}"]
            right[arm] = check_answer(found, f"{name} {arm}", afters[arm], whole, *recorded, generated)
            for top in record["topk"][arm]:
                found.number("logprob", top["logprob"], logprobs[top["token_id"]])
        behind_random = [student(query, demo, placed) for placed in chosen["random"]]
        randoms = [after(())[0] for after in behind_random]
        of_labels = check_labels(found, record, chosen, {"base": base, "teacher": teacher, "select": select}, randoms)
        for trial, (random, token) in enumerate(zip(randoms, record["token_random"], strict=True)):
            found.token(f"{name} random {trial}", token, random)
            recorded = record["correct_random"][trial], record["answer_logprob_random"][trial]
            check_answer(found, f"{name} random {trial}", behind_random[trial], whole, *recorded, None)
            found.number("kl", record["kl_random_teacher"][trial], divergence(random, teacher))
            found.number("kl", record["kl_random_base"][trial], divergence(random, base))
        pairs = {
            "kl_base_teacher": (base, teacher),
            "kl_select_teacher": (select, teacher),
            "phase2_delta_on_select": (select, base),
        }
        kls = {key: divergence(*pair) for key, pair in pairs.items()}
        for key, value in kls.items():
            found.number("kl", record[key], value)
        gain = right["select"] - right["base"]
        found.number("answer", record["phase2_answer_logprob_gain"] / len(whole), gain / len(whole))
        mine.append(kls | of_labels)
        judged.append(check_quality(found, plain, record, chosen, teacher, rules))

    for prompt in run["off"]:
        name, tokens, placed = prompt["sample_id"], prompt["token_ids"], states[prompt["state_of"]]
        alone = plain.logprobs(tokens)
        owner = states[placed.get("prefix_of", prompt["state_of"])]
        behind = student(tokens[run["bos_token_id"] is not None :], owner["demo_token_ids"], placed)
        under = behind(())[0]
        check_further(found, plain, samples[name], tokens, behind, rules.off_tokens)
        found.token(f"{name} base", samples[name]["token_base"], alone)
        found.token(f"{name} select", samples[name]["token_select"], under)
        moved.append(divergence(under, alone))
        found.number("kl", samples[name]["phase2_delta_off_select"], moved[-1])
    found.same("samples", set(samples), {entry["sample_id"] for entry in run["on"] + run["off"]})

    metrics = lines[-1]["metrics"]
    check_means(found, metrics, judged)
    means = {key: float(np.mean([kls[key] for kls in mine])) for key in mine[0]}
    found.number("metric", metrics["phase2_delta_on_mean_select"], means["phase2_delta_on_select"])
    relative = means["kl_select_teacher"] / (means["kl_base_teacher"] + 1e-6)
    found.number("metric", metrics["phase2_rel_kl_to_teacher_select"], relative)
    relative = means["kl_select_teacher_labels"] / (means["kl_base_teacher_labels"] + 1e-6)
    found.number("metric", metrics["phase2_kl_select_teacher_labels_mean"], means["kl_select_teacher_labels"])
    found.number("metric", metrics["phase2_rel_kl_labels_select"], relative)
    for arm, metric in (("base", "base"), ("teacher", "teacher"), ("select", "student_select")):
        right = np.mean([samples[chosen["sample_id"]][f"correct_{arm}_labels"] for chosen in run["on"]])
        found.number("metric", metrics[f"phase2_on_acc_labels_{metric}"], float(right))
    found.number("metric", metrics["phase2_off_delta_p99_select"], sorted(moved)[math.ceil(0.99 * (len(moved) - 1))])
    return found
