"""The schema: the shipped files, what is rejected and in which words, and that a resolved configuration stays as it is."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from cedkv.cli.click_ext import PHASE2_FLAGS
from cedkv.config.options import OPTIONS
from cedkv.config.resolve import leaf_keys, resolve
from cedkv.config.schema import KL_LIMIT, Phase2Config
from cedkv.core.errors import ConfigError
from cedkv.runs.manifest import write_config

CONFIGS = Path(__file__).parents[3] / "configs"
FIT = (
    "select.span_budget x select.span_len + select.keep_sink = 4 x 8 + 3 = 35 tokens cannot fit prefix_len = 34: raise "
    "prefix_len to 35 or more, or lower span_budget, span_len or keep_sink"
)


def rejection(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(None, overrides)
    return str(caught.value)


def test_default_file_is_the_defaults() -> None:
    assert resolve(CONFIGS / "phase2.yaml") == Phase2Config() == resolve()


def test_default_file_names_every_key() -> None:
    """A key that is missing there can only be found by reading the source."""
    tree = yaml.safe_load((CONFIGS / "phase2.yaml").read_text())["phase2"]
    named = {
        f"{name}.{leaf}" if isinstance(value, dict) else name
        for name, value in tree.items()
        for leaf in (value if isinstance(value, dict) else [""])
    }
    assert named == set(leaf_keys())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_are_valid_and_move_no_threshold(path: Path) -> None:
    """A file that relaxes a gate would make runs pass that cannot be compared with others."""
    assert resolve(path).thresholds == Phase2Config().thresholds


def test_quickstart_changes_the_model_alone() -> None:
    assert resolve(CONFIGS / "quickstart.yaml") == resolve(None, ["model.id=smollm2-135m"])


def test_leaf_keys_reach_every_field() -> None:
    assert {f"phase2.{key}" for key in leaf_keys()} == set(Phase2Config().dotted())
    assert len(leaf_keys()) > 40


def test_dotted_holds_the_resolved_values() -> None:
    dotted = resolve(None, ["select.mode=random_span", "layer_scope.injection=[0, 2]", "seed=7"]).dotted()
    assert dotted["phase2.select.mode"] == "random_span"
    assert dotted["phase2.layer_scope.injection"] == [0, 2]
    assert dotted["phase2.seed"] == 7
    assert dotted["phase2.data.on_path"] is None


def test_every_option_is_a_key() -> None:
    assert {key for key, _ in OPTIONS.values()} <= set(leaf_keys())
    assert len({key for key, _ in OPTIONS.values()}) == len(OPTIONS)
    assert set(PHASE2_FLAGS) <= set(OPTIONS)
    assert all(text for _, text in OPTIONS.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_takes_its_own_default(name: str) -> None:
    default = Phase2Config().dotted()[f"phase2.{OPTIONS[name][0]}"]
    assert resolve(None, (), {name: yaml.safe_dump(default).removesuffix("\n...\n").strip()}) == Phase2Config()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.allow_mock_fallback=true", "runtime.allow_mock_fallback = true is rejected: a verdict on a mock"),
        ("seed=-1", "phase2.seed: value -1 rejected: input should be greater than or equal to 0"),
        ("seed=true", "phase2.seed: value True rejected: input should be a valid integer"),
        ("seed=1.0", "phase2.seed: value 1.0 rejected: input should be a valid integer"),
        ("eval.on_samples=0", "phase2.eval.on_samples: value 0 rejected: input should be greater than or equal to 1"),
        ("eval.repro_runs=1", "phase2.eval.repro_runs: value 1 rejected: input should be greater than or equal to 2"),
        ("data.pairs=1", "phase2.data.pairs: value 1 rejected: input should be greater than or equal to 2"),
        ("eval.off_samples=six", "phase2.eval.off_samples: value 'six' rejected: input should be a valid integer"),
        ("eval.decoding=sampling", "phase2.eval.decoding: value 'sampling' rejected: input should be 'greedy'"),
        ("thresholds.on_gain_min=.nan", "phase2.thresholds.on_gain_min: value nan rejected: input should be a finite number"),
        (
            "thresholds.delta_on_min=1e999",
            "phase2.thresholds.delta_on_min: value inf rejected: input should be a finite number",
        ),
        ("thresholds.repro_acc_tol=-1", "phase2.thresholds.repro_acc_tol: value -1 rejected"),
        ("thresholds.nonzero_effect_over_floor_min=0.5", "value 0.5 rejected: input should be greater than or equal to 1"),
        ("runtime.device=gpu", "phase2.runtime.device: value 'gpu' rejected"),
        ("layer_scope.selection=top0", "phase2.layer_scope.selection: value 'top0' rejected"),
        ("layer_scope.selection=top101", "phase2.layer_scope.selection: value 'top101' rejected"),
        ("layer_scope.injection=[]", "phase2.layer_scope.injection: value [] rejected"),
        ("layer_scope.injection=[-1]", "value -1 rejected: input should be greater than or equal to 0"),
        ("model.id=null", "phase2.model.id: value None rejected: input should be a valid string"),
        ("select.mode=random_spam", "; did you mean 'random_span'?"),
        ("select.span_lenn=6", "unknown configuration key 'select.span_lenn'; did you mean 'select.span_len'?"),
        ("select_mode=random_span", "unknown configuration key 'select_mode'; did you mean 'select.mode'?"),
        ("mode=random_span", "unknown configuration key 'mode'; did you mean 'select.mode'?"),
        ("select=6", "unknown configuration key 'select'; did you mean"),
        ("prefix_len=34,select.keep_sink=3", FIT),
    ],
)
def test_rejected_with_value_rule_and_remedy(override: str, message: str) -> None:
    assert message in rejection(override)


def test_nothing_near_lists_all_keys() -> None:
    message = rejection("xyzzy=1")
    assert all(key in message for key in leaf_keys())


def test_all_problems_are_told_at_once() -> None:
    assert len(rejection("seed=-1", "eval.on_samples=0", "select.mode=best").splitlines()) == 3


@pytest.mark.parametrize("positive", ["prefix_len=35,select.keep_sink=3", "select.span_budget=8,select.span_len=8"])
def test_a_prefix_that_just_fits_is_accepted(positive: str) -> None:
    assert resolve(None, [positive]).prefix_len >= 35


def test_null_threshold_follows_the_dtype() -> None:
    for dtype, limit in KL_LIMIT.items():
        config = resolve(None, [f"runtime.torch_dtype={dtype}"])
        assert config.kl_limit("null_effect_kl_max") == limit
    assert resolve(None, ["thresholds.null_effect_kl_max=0"]).kl_limit("null_effect_kl_max") == 0.0


def test_resolved_configuration_is_frozen() -> None:
    config = Phase2Config()
    blocks = [config, *(value for value in vars(config).values() if isinstance(value, BaseModel))]
    assert len(blocks) > 8
    for block in blocks:
        field = next(iter(type(block).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(block, field, getattr(block, field))


def test_written_configuration_runs_again(tmp_path: Path) -> None:
    """Texts that YAML would read as something else must come back as texts."""
    config = resolve(
        None,
        ["model.id=123,model.revision=1e5,seed=9", "thresholds.source_cache_diff_max=1e-9", "layer_scope.selection=[0,3]",
         'data.on_path="a, #b: \'ü\'.jsonl"'],
    )  # fmt: skip
    write_config(config, tmp_path)
    assert resolve(tmp_path / "config.yaml") == config
    assert (config.model.id, config.data.on_path) == ("123", "a, #b: 'ü'.jsonl")
