"""Short names of configuration keys: the one table that maps a name to its key.

The MLflow entry points (``-P select_mode=...``) and the command line (``--phase2-select-mode``) are built from this table.
The module imports nothing heavy, so that ``--help`` answers at once.
"""

from typing import Literal

Phase = Literal["1.5", "2"]
"""1.5 runs Gate A alone, 2 runs everything."""

DEFAULT_CONFIG = "configs/phase2.yaml"
"""The ``config`` that MLproject passes where the user gives none."""

OPTIONS: dict[str, tuple[str, str]] = {
    "model_id": ("model.id", "hub id, local folder, GGUF file, or smollm2-135m"),
    "model_revision": ("model.revision", "branch, tag or commit of a hub model"),
    "trust_remote_code": ("model.trust_remote_code", "run code from the checkpoint; needs a full commit as revision"),
    "device": ("runtime.device", "auto, cpu, mps, cuda or cuda:N"),
    "device_map": ("runtime.device_map", "auto: spread a model over all devices, for one larger than a card"),
    "dtype": ("runtime.torch_dtype", "float32, bfloat16 or float16"),
    "batch_size": ("runtime.batch_size", "rows in one forward pass and ON samples in a unit, or auto"),
    "threads": ("runtime.threads", "torch threads of this process, or of each worker"),
    "workers": ("runtime.workers", "Ray workers: a number, or auto: one per card, else one per CPU; null: this process"),
    "ray_address": ("runtime.ray_address", "auto, host:port or ray://..; null: a cluster on this machine, for this run"),
    "shard": ("runtime.shard", "i/n, as 1/4: a part of the run's units; cedkv merge makes the run of all its shards"),
    "fail_on_gate": ("runtime.fail_on_gate", "exit with code 1 when a gate does not pass"),
    "system_metrics": ("runtime.system_metrics", "true: MLflow logs processor, memory, disk, network and cards of a run"),
    "max_on": ("eval.on_samples", "ON samples, at most"),
    "max_off": ("eval.off_samples", "OFF prompts, at most"),
    "off_tokens": ("eval.off_tokens", "further tokens of base's own answer to an OFF prompt that are compared; 0: none"),
    "repro_runs": ("eval.repro_runs", "how often the select arm runs, for repro_tolerance"),
    "n_random_trials": ("eval.n_random_trials", "trials of the random arm"),
    "lds_masks": ("eval.lds_masks", "span masks a sample for LDS, and comprehensiveness with it; 0: neither"),
    "prefix_len": ("prefix_len", "slots of the injected prefix"),
    "padding_mode": ("prefix.padding_mode", "null_pad or shrink_to_selected"),
    "kv_source": ("prefix.kv_source", "prefill or gather"),
    "boundary_replay": ("prefix.boundary_replay", "gather: first tokens of each kept span that are run again"),
    "positioning_mode": ("injection.positioning_mode", "compact or absolute"),
    "select_mode": ("select.mode", "how spans are chosen"),
    "span_len": ("select.span_len", "tokens in a span"),
    "span_budget": ("select.span_budget", "spans at most"),
    "min_span_distance": ("select.min_span_distance", "tokens between the starts of two spans, at least"),
    "center_policy": ("select.center_policy", "which token makes a span a candidate: start or center"),
    "keep_sink": ("select.keep_sink", "first demo tokens kept as attention sinks"),
    "query_window": ("select.query_window", "last query tokens whose attention is read, or all"),
    "row_pooling": ("select.row_pooling", "over query tokens: mean or max"),
    "head_pooling": ("select.head_pooling", "over heads: mean or max"),
    "layer_pooling": ("select.layer_pooling", "over layers: mean or max; with head_pooling=max the max over all heads"),
    "pooling_kernel": ("select.pooling_kernel", "mean over so many neighbouring tokens, odd; 1: none"),
    "value_weighting": ("select.value_weighting", "none, or output_norm: attention times ||W_o v||"),
    "null_query": ("select.null_query", "true: less the attention of a query without content"),
    "selection_layers": ("layer_scope.selection", "layers whose attention is read: topNN, midNN, all or a list"),
    "injection_layers": ("layer_scope.injection", "layers that see the prefix: topNN, midNN, all or a list"),
    "task": ("data.task", "generator of ON episodes, where on_path gives none"),
    "pairs": ("data.pairs", "shots of a generated demo"),
    "demo_tokens": ("data.demo_tokens", "tokens of a demo, about: as many shots as fit, instead of pairs or shots"),
    "on_path": ("data.on_path", "your own samples: JSONL (also .gz), a JSON list, CSV or Parquet; episodes, or rows"),
    "fields": ("data.fields", "which columns of the file are what: {input: question, output: answer}"),
    "template": ("data.template", "how a shot is written, e.g. 'Q: {input}\\nA: {output}\\n\\n'"),
    "data_format": ("data.format", "text, or chat: each shot a user's and an assistant's turn of the chat template"),
    "shots": ("data.shots", "shots of a demo that is built from rows"),
    "shots_from": ("data.shots_from", "file of rows that shots are drawn from; else the other rows of on_path"),
    "balance": ("data.balance", "true: as many shots of each label, as far as there are enough"),
    "verbalizer": ("data.verbalizer", "words for labels, {0: World, 1: Sports}, or symbols: random ones per episode"),
    "answer": ("data.answer", "single: one token; first: the answer's first token; whole: all tokens of the answer"),
    "unusable": ("data.unusable", "refuse, or skip samples that cannot be used"),
    "sample_ids": ("data.sample_ids", "ids of the samples to take: [a, b]"),
    "off_path": ("data.off_path", "your own OFF prompts, in the same formats, or plain documents"),
    "off_format": ("data.off_format", "prompt, or document: plain text, cut to off_length tokens; null: by the file"),
    "off_length": ("data.off_length", "tokens of an OFF document"),
    "seed": ("seed", "seed of every random draw"),
}
"""Short name -> (configuration key, help)."""

COMPARISONS: dict[str, dict[str, tuple[str, str]]] = {
    "ablate_selector": {
        "tasks": ("data.task", "generators of ON episodes: every other list on each of them"),
        "select_modes": ("select.mode", "selectors, or all"),
        "span_budgets": ("select.span_budget", "spans at most"),
        "span_lens": ("select.span_len", "tokens in a span"),
        "keep_sinks": ("select.keep_sink", "first demo tokens kept"),
        "selection_scopes": ("layer_scope.selection", "layers whose attention is read"),
        "query_windows": ("select.query_window", "last query tokens whose attention is read, or all"),
        "row_poolings": ("select.row_pooling", "mean, max: over query tokens"),
        "head_poolings": ("select.head_pooling", "mean, max: over heads"),
        "layer_poolings": ("select.layer_pooling", "mean, max: over layers"),
        "pooling_kernels": ("select.pooling_kernel", "odd widths of the mean over neighbouring tokens"),
        "value_weightings": ("select.value_weighting", "none, output_norm"),
        "null_queries": ("select.null_query", "false, true: less the attention of a query without content"),
    },
    "compare_positioning": {
        "positioning_modes": ("injection.positioning_mode", "compact, absolute"),
        "padding_modes": ("prefix.padding_mode", "null_pad, shrink_to_selected"),
        "kv_sources": ("prefix.kv_source", "prefill, gather"),
        "boundary_replays": ("prefix.boundary_replay", "first tokens of each kept span that are run again, e.g. 0,2,4,8"),
        "keep_sinks": ("select.keep_sink", "first demo tokens kept; 0,4 by default"),
    },
}
"""Comparison -> its list options: name -> (configuration key, help)."""
