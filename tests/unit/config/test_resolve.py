"""Files, overrides and options: how they are read, which one wins, and what is not readable."""

from pathlib import Path

import pytest

from cedkv.config.resolve import resolve
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "own.yaml"


def changed(*overrides: str, **options: str) -> dict[str, object]:
    default = Phase2Config().dotted()
    found = resolve(None, overrides, options).dotted()
    return {key.removeprefix("phase2."): value for key, value in found.items() if value != default[key]}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed=7"], {"seed": 7}),
        (["seed=7,eval.on_samples=3"], {"seed": 7, "eval.on_samples": 3}),
        (["seed=7", "eval.on_samples=3"], {"seed": 7, "eval.on_samples": 3}),
        ([" seed = 7 , eval.on_samples = 3 "], {"seed": 7, "eval.on_samples": 3}),
        (["phase2.seed=7"], {"seed": 7}),
        (["seed=1,seed=7"], {"seed": 7}),
        (["seed=1", "seed=7"], {"seed": 7}),
        (["layer_scope.selection=[1,2],seed=7"], {"layer_scope.selection": [1, 2], "seed": 7}),
        (["layer_scope.selection=top50"], {"layer_scope.selection": "top50"}),
        (['data.on_path="a,b=c.jsonl",seed=7'], {"data.on_path": "a,b=c.jsonl", "seed": 7}),
        (["data.on_path='a]b.jsonl',seed=7"], {"data.on_path": "a]b.jsonl", "seed": 7}),
        (["data.on_path=a=b.jsonl"], {"data.on_path": "a=b.jsonl"}),
        (["thresholds.on_gain_min=1e-4"], {"thresholds.on_gain_min": 1e-4}),
        (["thresholds.on_gain_min=-1"], {"thresholds.on_gain_min": -1}),
        (["thresholds.keep_all_kl_max=.5"], {"thresholds.keep_all_kl_max": 0.5}),
        (["runtime.fail_on_gate=true"], {"runtime.fail_on_gate": True}),
        (["data.on_path=null"], {}),
    ],
)
def test_overrides(overrides: list[str], expected: dict[str, object]) -> None:
    assert changed(*overrides) == expected


@pytest.mark.parametrize(
    "text", ["123", "1e-4", "true", "2024-01-01", "a #b", "#b", "o'neil", "[a]", "a: b", "0x10", "a: b: c", "[a"]
)
def test_text_stays_text(text: str) -> None:
    """A model folder named 123, a revision 1e5, a path with " #" in it: YAML's reading of them is not what was meant."""
    assert changed(f"model.id={text}") == {"model.id": text}
    assert changed(model_revision=text) == {"model.revision": text}


def test_a_template_is_text() -> None:
    template = "Q: {input}\nA: {output}\n\n"
    assert changed(template=r"Q: {input}\nA: {output}\n\n") == {"data.template": template}
    assert changed(template=template) == {"data.template": template}


def test_ids_may_be_numbers() -> None:
    assert changed("data.sample_ids=[7, a]") == {"data.sample_ids": ["7", "a"]}


@pytest.mark.parametrize("text", ["", "seed", "=3", "seed=", "seed=1,", ",seed=1", "seed=1,,eval.on_samples=3"])
def test_malformed_override_shows_how(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^override '.*': expected key=value, as in set='select\.span_len=6"):
        resolve(None, [text])


@pytest.mark.parametrize("value", ["[1", "*other", "{1: ", '"open', "!!python/object:os.system x", "9" * 5000])
def test_unreadable_value_names_its_key(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^layer_scope\.selection = .*: not readable as a YAML value"):
        resolve(None, [f"layer_scope.selection={value}"])


def test_precedence(file: Path) -> None:
    """Defaults < file < overrides < options."""
    file.write_text("phase2: {seed: 1, select: {span_len: 5, mode: delimiter_span}, eval: {on_samples: 3}}")
    config = resolve(file, ["seed=2", "select.span_len=6"], {"seed": "3", "span_len": None})
    assert (config.seed, config.select.span_len, config.eval.on_samples) == (3, 6, 3)
    assert config.select.mode == "delimiter_span"
    assert config.select.span_budget == Phase2Config().select.span_budget


def test_override_can_mend_a_file(file: Path) -> None:
    """What is checked is the result: a contradiction in the file that an override removes is none."""
    file.write_text("phase2: {prefix_len: 16}")
    with pytest.raises(ConfigError, match="cannot fit prefix_len = 16"):
        resolve(file)
    assert resolve(file, ["select.span_budget=2"]).prefix_len == 16


@pytest.mark.parametrize("text", ["phase2:", "phase2: {}", "phase2: {seed: 42}  # the default"])
def test_file_may_leave_everything_out(file: Path, text: str) -> None:
    file.write_text(text)
    assert resolve(file) == Phase2Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected exactly one top-level block 'phase2:', found NoneType"),
        ("- 1", "expected exactly one top-level block 'phase2:', found list"),
        ("seed: 1", "expected exactly one top-level block 'phase2:', found ['seed']"),
        ("phase2: [1]", "expected exactly one top-level block 'phase2:'"),
        ("phase2: {}\nphase3: {}", "found ['phase2', 'phase3']"),
        ("phase2:\n  seed: 1\n  seed: 2", "key 'seed' appears twice"),
        ("phase2:\n  eval: {on_samples: 1}\n  eval: {off_samples: 1}", "key 'eval' appears twice"),
        ("phase2: {select: &a {}, prefix: *a}", "aliases (*name) are not used here"),
        ("phase2: {seed: [1", "not readable as YAML"),
        ("phase2:\n\tseed: 1", "not readable as YAML"),
        ("phase2: {seed: !!python/object:os.system 3}", "not readable as YAML"),
        ("--- {}\n--- {}", "not readable as YAML"),
        ("[" * 3000, "not readable as YAML"),
        ("phase2: {seed: 2024-13-01}", "not readable as YAML"),
        ("phase2: {select: 3}", "phase2.select: block 3 rejected"),
        ("phase2: {select: null}", "phase2.select: block None rejected"),
        ("phase2: {1: 2}", "keys should be strings"),
        ("phase2: {sedd: 3}", "unknown configuration key 'sedd'; did you mean 'seed'?"),
        ("phase2: {select: {mod: x}}", "unknown configuration key 'select.mod'; did you mean 'select.mode'?"),
        ("phase2: {selct: {mode: random_span}}", "unknown configuration key 'selct'; did you mean 'select."),
        ("phase2: {eval: {on_samples: '3'}}", "phase2.eval.on_samples: value '3' rejected: input should be a valid integer"),
        ("phase2: {model: {revision: 123}}", "phase2.model.revision: value 123 rejected: input should be a valid string"),
    ],
)
def test_file_that_cannot_be_used(file: Path, text: str, message: str) -> None:
    """An alias is rejected rather than expanded: nested ones grow to gigabytes."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(file)
    assert message in str(caught.value)


def test_problems_of_reading_name_the_file(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"phase2: {seed: \xff}")
    for path in (file, tmp_path, tmp_path / "absent.yaml", Path("a\0b")):
        with pytest.raises(ConfigError, match=r"^cannot read configuration .*; give the path of a YAML file"):
            resolve(path)


def test_block_that_is_no_block_cannot_be_overridden(file: Path) -> None:
    file.write_text("phase2: {select: 3}")
    with pytest.raises(ConfigError, match=r"phase2\.select: expected a block of keys, found 3"):
        resolve(file, ["select.mode=random_span"])


def test_number_with_an_exponent_in_a_file(file: Path) -> None:
    """YAML 1.1 reads ``1e-4`` as text, and everybody writes it."""
    file.write_text("phase2: {thresholds: {on_gain_min: 1e-4, source_cache_diff_max: 2.5E+1}}")
    limits = resolve(file).thresholds
    assert (limits.on_gain_min, limits.source_cache_diff_max) == (1e-4, 25.0)


def test_options_are_texts() -> None:
    """A number is an error with the text to give, not a traceback out of the parser."""
    with pytest.raises(ConfigError, match=r"option max_on = 24 is no text; options are read as a shell gives them: '24'"):
        resolve(options={"max_on": 24})  # type: ignore[dict-item]
    assert resolve(options={"max_on": "24"}).eval.on_samples == 24
    with pytest.raises(ConfigError, match=r"no option is named 'max_onn'; did you mean 'max_on'\?"):
        resolve(options={"max_onn": "24"})


def test_overrides_are_texts_or_one_text() -> None:
    assert resolve(overrides="seed=7,eval.on_samples=3").seed == 7
    for given in ([5], [None], [{"seed": 7}]):
        with pytest.raises(ConfigError, match=r"override .* is no text; write it as 'key=value'"):
            resolve(overrides=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [5, {"phase2": {"seed": 7}}, ["a.yaml"]])
def test_a_configuration_is_a_path(path: object) -> None:
    with pytest.raises(ConfigError, match=r"is not the path of a YAML file; give single keys as overrides"):
        resolve(path)  # type: ignore[arg-type]
