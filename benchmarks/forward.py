"""The engine against the forward limit: the tokens that must go through the model, each once, in bare forward calls.

Which tokens must: for each ON sample the query alone, demo + query, the kept tokens and the query of the select arm and of
every random trial, those that keep the same tokens once, and behind every query the answer without its last token; for OFF
prompts what they all begin with (a chat template's head) once alone and once under each prefix, and the rest of each prompt
twice, with base's own answer to it behind. Gate A's checks and repetitions run tokens again on purpose, so neither side has
them here; what they add is another measure (``checks``). What base's own answers add is a row of its own: decoding them takes
passes of one token that wait for each other, for which bare calls know no limit. Chance beginnings that rows have in common are
not counted as shared.

The limit has no mask, no cache, no padding (rows of a call have their mean length) and nothing after the logits. It runs on
the engine's own model, so with the same matrix products; where those are not torch's own (``cedkv/models/cpu.py``), another
row says how much faster they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.common import Row, engine, loaded, median_ratio, paired, part, quickstart, results_only, row, seconds
from cedkv.config.schema import Phase2Config
from cedkv.core.values import Record
from cedkv.models import cpu
from cedkv.models.loading import LanguageModel
from cedkv.tasks.load import Samples

PAIRS, SAMPLES = 3, 32
BUDGETS = (512, 1024, 2048)
"""Tokens of a call, among which the best is looked for."""


def rows(pairs: int = PAIRS, samples: int = SAMPLES) -> list[Row]:
    """Wall time of the engine over that of the bare calls."""
    lm, every = loaded()
    config, some = results_only(quickstart("eval.off_tokens=0")), part(every, 0, samples)
    ratio, lengths, budget, speed = against_limit(lm, config, some, BUDGETS, pairs)
    tokens = sum(lengths)
    found = [row(f"engine over forward limit, wall time ({tokens:,} tokens; best call {budget})", ratio, "<= 1.08")]
    found.append(row("forward limit, tokens a second", speed))
    if lm.meta["matmul"] != "torch":
        some_of = lengths[::4]
        own = min(seconds(lambda: bare(lm, some_of, budget)) for _ in range(2))
        with cpu.torch_linear(lm.model):
            plain = min(seconds(lambda: bare(lm, some_of, budget)) for _ in range(2))
        found.append(row("torch's own matrix products over the engine's, forward limit", plain / own))
    answers = paired([lambda: engine(lm, results_only(quickstart()), some)], [lambda: engine(lm, config, some)])
    found.append(row("with base's own answers to OFF prompts (eval.off_tokens=8) over without", median_ratio(answers)))
    return found


def against_limit(
    lm: LanguageModel, config: Phase2Config, samples: Samples, budgets: Sequence[int], pairs: int
) -> tuple[float, list[int], int, float]:
    """The engine's time over the limit's, the lengths of the rows, the best call's tokens, and the limit's tokens a second."""
    lengths = needed(samples, engine(lm, config, samples))
    budget = min(budgets, key=lambda size: min(seconds(lambda: bare(lm, lengths[::4], size)) for _ in range(2)))
    times = paired([lambda: engine(lm, config, samples)] * pairs, [lambda: bare(lm, lengths, budget)] * pairs)
    return median_ratio(times), lengths, budget, sorted(sum(lengths) / limit for _, limit in times)[pairs // 2]


def needed(samples: Samples, records: Sequence[Record]) -> list[int]:
    """The lengths, ascending, of the rows that must go through the model for these records."""
    lengths = []
    chosen = {record["sample_id"]: record for record in records if record["type"] == "selection"}
    for sample in samples.on:
        record, after = chosen[sample.sample_id], len(sample.answer_token_ids) - 1
        query = len(sample.query_token_ids) + after
        lengths += [len(sample.base_ids) + after, len(sample.teacher_ids) + after]
        lengths += [len(kept) + query for kept in {tuple(state["kept_tokens"]) for state in (record, *record["random"])}]
    lengths += 2 * [len(record["further_token_ids"]) for record in records if record.get("kind") == "off"]
    for rows_, times in (([u.token_ids for u in samples.off], 1), ([u.student_ids for u in samples.off], len(samples.on))):
        head = _common(rows_)
        lengths += [head] * min(times, len(rows_)) + [len(ids) - head for ids in rows_]
    return sorted(length for length in lengths if length)


def _common(rows_: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((i for i, column in enumerate(zip(*rows_, strict=False)) if len(set(column)) > 1), min(map(len, rows_)))


@torch.inference_mode()
def bare(lm: LanguageModel, lengths: Sequence[int], budget: int) -> None:
    """Forward calls for rows of these lengths, ascending; which tokens does not matter to time."""
    ids = torch.arange(budget + max(lengths), device=lm.device) % 1000
    waiting = list(lengths)
    while waiting:
        count = max(1, sum((i + 1) * length <= budget for i, length in enumerate(waiting)))
        width = round(sum(waiting[:count]) / count)
        lm.model(input_ids=ids[: count * width].view(count, width), use_cache=False, logits_to_keep=1)
        del waiting[:count]
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
