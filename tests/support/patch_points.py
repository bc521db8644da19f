"""Where tests replace a part of the package: whoever moves or renames one of these functions changes this file alone.

A point is a name and the owners (modules, classes) in which the name is looked up when it is called. A function that several
modules have imported by name has several owners; a point names only those in which a test means to replace it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PretrainedConfig

from cedkv import eval_phase2, recording
from cedkv.checks import consistency, probe, probe_checks, rotation, stored
from cedkv.cli import app
from cedkv.config.extensions import POSITIONING as POSITIONING_MODES
from cedkv.inference import ablation, evidence, forward, head_weights, student, teacher
from cedkv.inference import prefix as prefix_module
from cedkv.kv import attention, cache, readers
from cedkv.models import cpu, loading
from cedkv.runs import connection, lifecycle, merge, pipeline, prepare, publish, timeouts
from cedkv.runs.journal import Journal
from cedkv.tasks import texts


@dataclass(frozen=True)
class PatchPoint:
    """A name, and every owner in which a test replaces it."""

    name: str
    owners: tuple[Any, ...]

    @property
    def real(self) -> Any:
        """What stands there now, in the first owner."""
        return getattr(self.owners[0], self.name)

    def replace(self, value: Any, patch: pytest.MonkeyPatch | None = None) -> None:
        """Put ``value`` there until ``patch`` undoes it; without ``patch`` for good, as in a forked process that ends soon."""
        for owner in self.owners:
            if patch is None:
                setattr(owner, self.name, value)
            else:
                patch.setattr(owner, self.name, value)

    def wrap(self, patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
        """Replace the function by ``change(real, *arguments)``; a method's first argument is its object."""
        for owner in self.owners:
            real = getattr(owner, self.name)
            patch.setattr(owner, self.name, lambda *args, _real=real, **named: change(_real, *args, **named))


def point(name: str, *owners: Any) -> PatchPoint:
    return PatchPoint(name, owners)


# models
LOAD_MODEL = point("load", loading)
PROCESSOR = point("processor", cpu)
DETECT_ROPE_LAYOUTS = point("detect_rope_layouts", loading)
CONFIG_CONTENT = point("get_config_dict", PretrainedConfig)

# forward passes
FORWARD_WITH_PREFIX = point("forward_with_prefix", forward)
LAST_LOGITS = point("last_logits", forward)
LAST_LOGITS_WITH_TEACHER = point("last_logits", forward, teacher)
LOG_SOFTMAX = point("log_softmax", forward, consistency)
READ_CACHE = point("read_cache", forward)
LEFT_PADDED = point("left_padded", forward)
LEFT_PADDED_TEACHER = point("left_padded", teacher)
LEFT_PADDED_ARMS = point("left_padded", forward, teacher)
LEFT_PADDED_INCREMENTAL = point("left_padded", consistency)
HIDDEN_PREFIX = point("HiddenPrefix", forward)
PROBE_LOGPROBS = point("next_token_logprobs", probe, probe_checks)

# the teacher and its attention
READ_TEACHER = point("read_teacher", evidence)
COLLECT_READINGS = point("reading", teacher._Collector)
FIT_HEADS = point("fit", head_weights)
READ_QUERIES = point("read_queries", evidence)
ROWS_READ = point("_counts", readers)
VALUE_NORMS = point("value_norms", readers)
READ_ATTENTION = point("observe", readers.AttentionReader)
ATTENTION_ROWS = point("attention_rows", attention)
ROW_CHUNK = point("ROW_CHUNK", attention, readers)
SDPA_FORWARD = point("sdpa_attention_forward", attention)
SCALED_DOT_PRODUCT = point("scaled_dot_product_attention", attention)

# prefixes: K/V, positions, rotation, files
PREFILL = point("prefill", prefix_module)
GATHER = point("gather", prefix_module)
REPLAY_BOUNDARIES = point("replay_boundaries", prefix_module)
ASSEMBLE = point("assemble", student, prefix_module)
ASSEMBLE_GATHERED = point("assemble", student)
ASSEMBLE_EVERYWHERE = point("assemble", student, prefix_module, consistency)
FRESH_CACHE = point("fresh_cache", cache.KVPrefix)
ROTATE_KEYS = point("rerotate_keys", cache)
ROTATE_KEYS_CHECKED = point("rerotate_keys", rotation)
ROTATE_KEYS_EVERYWHERE = point("rerotate_keys", cache, rotation)
SAVE_PREFIX = point("save_prefix", stored)
POSITIONING = POSITIONING_MODES._loaded
"""Positioning mode -> the function that places by it; ``monkeypatch.setitem`` replaces one."""

# the arms
READ_SAMPLES = point("read_batch", eval_phase2)
EVIDENCE = point("read_evidence", student)
CHOOSE = point("choose", student)
SELECTED = point("select", student.Students)
ENCODE = point("_encode", student)
REQUIRE_FITS = point("require_fits", student)
ANSWER = point("answer", student)
STUDENT_LOGPROBS = point("next_token_logprobs", student)
ABLATION_LOGPROBS = point("next_token_logprobs", ablation)
SELECT = point("select_tokens", student)
OFF_PROMPTS = point("_off_select", eval_phase2)
BASE_LOGPROBS = point("next_token_logprobs", eval_phase2)
OFF_BASE = point("read_off_base", eval_phase2)
ANSWERS = point("answers", eval_phase2)
REPRO_RECORDS = point("repro_records", eval_phase2)
OFF_RECORDS = point("_off_records", eval_phase2)
RECORDED_KL = point("kl", recording)
RECORDED_OFF_KL = point("kl", eval_phase2)

# runs
RUN = point("run", pipeline)
MERGE = point("merge", merge)
LOAD_SAMPLES = point("load_fitting", prepare)
EVALUATE = point("evaluate", pipeline)
REPORT_CONDITION = point("report_condition", publish)
OPEN_SPEC = point("open_spec", pipeline)
END_ON_SIGNALS = point("_end_on_signals", app)
MLFLOW_ATTEMPT = point("attempt", connection.Connection)
MLFLOW_CALL = point("call", connection.Connection)
MAX_SEARCH = point("MAX_SEARCH", texts)
MLFLOW_HTTP_SETTINGS = point("_http", timeouts)
TRACKING_FAULT = point("fault", lifecycle.ActiveRun)
JOURNAL_APPEND = point("append", Journal)
JOURNAL_WRITE = point("_write", Journal)


def without_mlflow(patch: pytest.MonkeyPatch) -> None:
    """Runs leave their folder and log nothing."""
    MLFLOW_ATTEMPT.replace(lambda *_, **__: None, patch)
    TRACKING_FAULT.replace(None, patch)
