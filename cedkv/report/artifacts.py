"""The JSON files of ``outputs/{run_id}/``: report, selection, prefixes, Gate A's observations, texts of the tokens shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from cedkv.analysis.results import ConditionResult, verdict_word
from cedkv.config.schema import Phase2Config
from cedkv.core.errors import DataError
from cedkv.core.files import JsonLists, json_lists, write_json
from cedkv.core.values import Record

SELECTION, PREFIXES, PLUMBING = "phase2_selection.json", "phase2_prefix_meta.json", "phase2_plumbing.json"
RUNTIME, TOKEN_TEXTS, HEAD_WEIGHTS = "hf_runtime_meta.json", "phase2_token_texts.json", "head_weights.json"
CERTIFICATE = "certificate.json"
_OFF_KEYS = ("sample_id", "prompt_text", "token_ids", "state_of")


def modes(config: Phase2Config) -> dict[str, str]:
    """Return how prefixes are made; the same in configuration, report and artifacts."""
    return {
        "select_mode": config.select.mode,
        "positioning_mode": config.injection.positioning_mode,
        "padding_mode": config.prefix.padding_mode,
        "kv_source": config.prefix.kv_source,
    }


class SelectionFiles:
    """Writes what was selected, sample by sample, while a condition's records are read: two artifacts.

    ``phase2_selection.json`` is enough to compute every figure again with plain transformers; ``phase2_prefix_meta.json``
    has the slots of every prefix.
    """

    def __init__(self, folder: Path, run_id: str, config: Phase2Config) -> None:
        self._folder, self._stack = folder / "artifacts", ExitStack()
        self._selection: JsonLists | None = None
        self._prefixes: JsonLists | None = None
        self._off: list[Record] = []
        shared = {"run_id": run_id, **modes(config), "prefix_len": config.prefix_len}
        self._heads: tuple[Record, Record] = (dict(shared), {**shared, "injection_layers": config.layer_scope.injection})
        self._injection = config.layer_scope.injection

    def __enter__(self) -> SelectionFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            selection, _ = self._open(None)
            selection.begin("off")
            for record in self._off:
                selection.add(record)
        self._stack.__exit__(kind, error, traceback)

    def add_on(self, on: Record, selection: Record) -> None:
        """Add an ON sample."""
        selections, prefixes = self._open(selection)
        selections.add({name: value for name, value in selection.items() if name != "type"})
        slots, kept = selection["prefix_slots"], len(selection["kept_tokens"])
        prefixes.add(
            {
                "sample_id": selection["sample_id"],
                "slots": slots,
                "kept": kept,
                "null": slots - kept,
                "key_positions": selection["key_positions"],
                "query_start": selection["query_start"],
                "demo_tokens": len(selection["demo_token_ids"]),
            }
        )

    def add_off(self, off: Record) -> None:
        """Add an OFF prompt."""
        self._off.append({key: off[key] for key in _OFF_KEYS})

    def _open(self, first: Record | None) -> tuple[JsonLists, JsonLists]:
        """Return the open files; their heads say which BOS token the first sample begins with."""
        if self._selection is None or self._prefixes is None:
            has_bos = first is not None and first["token_kinds"][0] == "bos"
            bos = first["demo_token_ids"][0] if first is not None and has_bos else None
            head = {**self._heads[0], "bos_token_id": bos, "injection_layers": self._injection}
            self._selection = self._stack.enter_context(json_lists(self._folder / SELECTION, head))
            self._prefixes = self._stack.enter_context(json_lists(self._folder / PREFIXES, self._heads[1]))
            self._selection.begin("on")
            self._prefixes.begin("prefixes")
        return self._selection, self._prefixes


def write_report(
    folder: Path, result: ConditionResult, sources: Mapping[str, str], runtime: Mapping[str, Any], seconds: Mapping[str, float]
) -> None:
    """Write ``report_phase2.json`` and Gate A's observations.

    Args:
        sources: where ON and OFF samples come from.
        runtime: facts about model, device and versions (``hf_runtime_meta.json``).
        seconds: wall time by stage.
    """
    config, records, results = result.config, result.records, result.results
    judged = [{**asdict(check), "verdict": check.verdict} for check in results.checks]
    write_json(
        folder / "report_phase2.json",
        {
            "run_id": result.run_id,
            "phase": results.phase,
            "verdicts": {name: verdict_word(value) for name, value in results.verdicts.items()},
            **modes(config),
            "n_on": len(records.on),
            "n_off": len(records.off),
            "n_random_trials": config.eval.n_random_trials,
            "sources": sources,
            "samples": {"notes": result.notes, "unusable": [asdict(left_out) for left_out in result.unusable]},
            "undecided": results.undecided,
            "gates": [row for row in judged if row["gate"] != "precondition"],
            "preconditions": [row for row in judged if row["gate"] == "precondition"],
            "numerical_floor": results.floor,
            "metrics": results.metrics,
            "comparisons": results.comparisons,
            "seconds": seconds,
            "runtime": runtime,
            "config": config.model_dump(),
        },
    )
    plumbing, repro = _without_type(records.plumbing), _without_type(records.repro)
    write_json(folder / "artifacts" / PLUMBING, {"run_id": result.run_id}, {"plumbing": plumbing, "repro": repro})


class TokenTexts:
    """The text of tokens by their id: of a tokenizer while a run has one, of a file afterwards."""

    def __init__(self, texts: dict[int, str], decode: Callable[[int], str] | None = None) -> None:
        """Create the texts; ``decode`` gives those that are not known yet, None where there is no tokenizer."""
        self._texts, self._decode = texts, decode

    def __call__(self, token: int) -> str:
        """Return a token's text. Raises DataError: it is not stored, and there is no tokenizer."""
        if token not in self._texts:
            if self._decode is None:
                raise DataError(f"token {token} has no text in {TOKEN_TEXTS}: the file was damaged or edited")
            self._texts[token] = self._decode(token)
        return self._texts[token]

    def save(self, folder: Path, tokens: Iterable[int]) -> None:
        """Store the texts of these tokens with a run."""
        texts = {str(token): self(token) for token in sorted(set(tokens))}
        write_json(folder / "artifacts" / TOKEN_TEXTS, {"tokens": texts})

    @classmethod
    def load(cls, *folders: Path) -> TokenTexts:
        """Return the texts that were stored with runs. Raises DataError: there are none, or they cannot be read."""
        return cls({token: text for folder in folders for token, text in cls._read(folder / "artifacts" / TOKEN_TEXTS).items()})

    @staticmethod
    def _read(path: Path) -> dict[int, str]:
        try:
            tokens = json.loads(path.read_text(encoding="utf-8"))["tokens"]
            return {int(token): str(text) for token, text in tokens.items()}
        except FileNotFoundError:
            raise DataError(
                f"{path} is not there: the run was made by a version of cedkv that did not store what tokens look like, so its "
                "page can be rendered by that version alone"
            ) from None
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{path} cannot be read: {error}; it was damaged or edited") from None


def read_artifact(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of a run's artifact that is a JSON object. Raises DataError: it cannot be read."""
    path = folder / "artifacts" / name
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; it was damaged or removed") from None
    return {name: value for name, value in content.items() if name != "schema_version"}


def _without_type(records: Iterable[Mapping[str, Any]]) -> Iterable[Record]:
    return ({key: value for key, value in record.items() if key != "type"} for record in records)


def read_runtime(folder: Path) -> dict[str, Any]:
    """Return model, device and versions of a run. Raises DataError: its file was damaged or removed."""
    return read_artifact(folder, RUNTIME)
