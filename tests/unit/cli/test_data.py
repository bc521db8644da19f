"""``python -m cedkv data``: what samples look like, without weights, and the command that runs them."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cedkv.cli import app
from cedkv.cli.shown_samples import WIDTH, run_command
from cedkv.config.resolve import resolve
from cedkv.tasks.load import load_samples
from tests.support import tiny

COLOURS = ("red", "blue")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights."""
    return tiny.save_without_weights(tmp_path_factory.mktemp("model"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.csv"
    path.write_text("text,label\n" + "".join(f"w{i},{COLOURS[i % 2]}\n" for i in range(20)))
    return path


def show(model: Path, *arguments: str) -> Result:
    sizes = "eval.on_samples=6,eval.off_samples=8,prefix_len=24,select.span_len=4,select.span_budget=3,data.pairs=4"
    return CliRunner().invoke(app.main, ["data", *arguments, "--model_id", str(model), "--device", "cpu", "--set", sizes])


def facts(result: Result) -> dict[str, str]:
    return {line[:11].strip(): line[11:] for line in result.output.splitlines() if line[:1] != " " and len(line) > 11}


def test_rows_of_a_file(model: Path, own: Path) -> None:
    result = show(model, str(own), "--show", "2", "--shots", "4")
    assert result.exit_code == 0, result.output
    said = facts(result)
    assert said["source"] == f"{own} (20 rows, shots=4, seed=42)"
    assert said["columns"] == "input: text, output: label"
    assert said["samples"] == "6 ON samples"
    assert sum(int(part.rpartition(" ")[2]) for part in said["labels"].split(", ")) == 6
    assert said["answer"] == "1 / 1 / 1 tokens (least / median / most)"
    assert said["evidence"].endswith("another query in 6, shots in 6")
    assert result.output.count("--- row-") == 2
    assert result.output.count("=> ' red' (1 token)") + result.output.count("=> ' blue' (1 token)") == 2


def test_marks_stand_below_the_tokens_they_mark(model: Path) -> None:
    """Each token's mark is as long as the token; capitals are the gold pair, which holds the answer."""
    result = show(model, "--task", "symbol_lookup", "--show", "1")
    assert result.exit_code == 0, result.output
    lines = result.output.partition("=>")[0].splitlines()[1:]
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    assert all(len(text) == len(marks) for text, marks in pairs)
    golden = "".join(text for text, marks in pairs if any(mark.isupper() for mark in marks))
    answer = result.output.partition("=> ' ")[2].partition("'")[0]
    assert golden.endswith(f"Symbol: {answer}\u23ce\u23ce")
    assert set("".join(marks for _, marks in pairs)) <= set("bidaqBIDA-")
    (query,) = {text for text, marks in pairs[-2:] if marks.startswith("q") and text.startswith("Word")}
    assert query.rstrip("\u23ce") in golden, "the word that is asked for is the gold one"


def test_written_episodes_are_read_back_the_same(model: Path, own: Path, tmp_path: Path) -> None:
    result = show(model, str(own), "--out", str(tmp_path / "episodes.jsonl"), "--verbalizer", "symbols")
    assert result.exit_code == 0, result.output
    assert facts(result)["written"] == f"6 episodes to {tmp_path}/episodes.jsonl"
    first, again = (
        load_samples(tiny.config("x", f"data.on_path={path}", *more), tiny.tokenizer(), 1024, 500).on
        for path, more in ((own, ["data.verbalizer=symbols"]), (tmp_path / "episodes.jsonl", []))
    )
    assert again == first


def test_off_prompts(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "documents.txt"
    path.write_text("The moon.\n\nThe sea,\nand more.\n")
    result = show(model, str(path), "--off", "--show", "1")
    assert result.exit_code == 0, result.output
    assert "The moon." in result.output
    assert facts(result)["samples"].startswith("2 OFF prompts")
    assert facts(result)["note"] == f"{path} has 2 usable samples, fewer than eval.off_samples = 8: all of them are taken"
    assert f"data.off_path={path}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.csv"], r"Error: data.on_path = 'absent.csv' cannot be read"),
        (["{own}", "--on_path", "{own}"], "both name the samples; give one"),
        (["{own}", "--task", "symbol_lookup", "--pairs", "x"], "phase2.data.pairs: value 'x' rejected"),
        (["{own}", "--fields", "{input: a, output: b}"], "has no column 'a'"),
        (["{own}", "--off"], ""),
        (["{own}", "--off", "--out", "x.jsonl"], "--out writes episodes and --off shows OFF prompts"),
    ],
)
def test_errors(model: Path, own: Path, arguments: list[str], message: str, tmp_path: Path) -> None:
    result = show(model, *(argument.replace("{own}", str(own)) for argument in arguments))
    assert (result.exit_code, message in result.output) == (2 if message else 0, True), result.output
    assert not (tmp_path / "x.jsonl").exists()


def test_long_demos_are_shown_in_part(model: Path, tmp_path: Path) -> None:
    records = [[f"key{i}", COLOURS[i % 2]] for i in range(60)]
    row = {"ordered_kv_records": records, "key": "key30", "value": "red"}
    (tmp_path / "kv.json").write_text(json.dumps([row]))
    result = show(model, str(tmp_path / "kv.json"))
    assert result.exit_code == 0, result.output
    assert result.output.count("lines left out]") == 2
    assert all(f"key{i}: " in result.output for i in (0, 28, 30, 32, 59))
    assert "key20: " not in result.output


def test_text_that_a_terminal_would_obey(model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(
        json.dumps([{"text": f"\x1b[31m{i}\u202e" + "x" * 300, "label": "red"} for i in range(9)])
    )
    result = show(model, str(tmp_path / "own.json"), "--shots", "2")
    assert result.exit_code == 0, result.output
    assert not set("\x1b\u202e") & set(result.output)
    assert r"\x1b" in result.output
    assert max(map(len, result.output.partition("\nsource")[0].splitlines())) <= WIDTH + 6


def test_the_command_that_runs_it_is_of_the_same_configuration() -> None:
    options = {
        "model_id": "smollm2-135m", "max_on": "9", "on_path": "it's, a file.csv", "template": r"Q, {input}\nA: {output}\n",
        "verbalizer": "{0: World, 1: Sports}", "fields": "{input: a, output: b}",
    }  # fmt: skip
    overrides = ("seed=7,data.shots=3",)
    config = resolve(None, overrides, options)
    command = shlex.split(run_command(config, None, overrides, options, skips=True))
    assert command[:5] == ["python", "-m", "cedkv", "--phase", "2"]
    flags = dict(zip(command[5::2], command[6::2], strict=True))
    again = resolve(
        None,
        [value for flag, value in zip(command[5::2], command[6::2], strict=True) if flag == "--set"],
        {"model_id": flags["--phase2-model-id"], "max_on": flags["--phase2-max-on"]},
    )
    assert again == config.model_copy(update={"data": config.data.model_copy(update={"unusable": "skip"})})


def test_the_page_of_docs_works_as_it_stands(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of docs/data.md is written, and each command of it shows samples."""
    monkeypatch.chdir(tmp_path)
    page = (Path(app.__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = page.split("```")[1::2]
    name = page.split("```")[0::2]
    for before, block in zip(name, blocks, strict=False):
        language, _, text = block.partition("\n")
        if language in ("json", "csv", "text"):
            Path(before.rstrip().rpartition("`")[0].rpartition("`")[2]).write_text(text)
    commands = [line for block in blocks if block.startswith("sh\n") for line in block.splitlines() if " data " in line]
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command)
        assert words[:4] == ["python", "-m", "cedkv", "data"], command
        result = show(model, *words[4:])
        assert result.exit_code == 0, (command, result.output)
    shutil.rmtree(tmp_path, ignore_errors=True)
