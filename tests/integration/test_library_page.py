"""docs/library.md: its Python runs as it stands, on a small model in place of the one it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import cedkv

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
NAMED = '"smollm2-135m"'


def test_every_block_of_the_page_runs(llama_folder: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one session, as a reader pastes them."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 9
    assert sum(NAMED in block for block in blocks) == 2
    session: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace(NAMED, repr(str(llama_folder))), PAGE.name, "exec"), session)
        if "said" in session and "said_is_greedy" not in session:
            prefix, lm = session["prefix"], session["lm"]
            text = lm.tokenizer.decode([*prefix.query_ids(), *session["said"]], skip_special_tokens=True)
            assert text == prefix.query + prefix.generate(max_new_tokens=5)
            session["said_is_greedy"] = True
    assert session["said_is_greedy"]
    assert len(session["run"].on) == 4
    assert len(session["compared"].conditions) == 2
    assert capsys.readouterr().out


def test_the_page_names_what_is_public() -> None:
    names = re.search(r"## Names\n\n(.*?)\. Errors", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert names is not None
    listed = set(re.findall(r"`(\w+)`", names[1]))
    library = {name for module, public in cedkv._PUBLIC.items() if module.startswith("cedkv.library") for name in public}
    assert listed == library
