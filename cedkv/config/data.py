"""The ``data`` block of the configuration: where ON episodes and OFF prompts come from, and what counts as an answer."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from cedkv.config.extensions import TASKS
from cedkv.config.fields import Block, Count, Text, check_text, filled_params, name_in

TaskName = Annotated[str, AfterValidator(name_in(TASKS))]


def _with_line_breaks(value: Any) -> Any:
    r"""Return a template in which ``\n`` and ``\t``, as a shell passes them on, are a line break and a tab."""
    return value.replace("\\n", "\n").replace("\\t", "\t") if isinstance(value, str) else value


def _check_template(template: str) -> str:
    """Return the template if it names ``{input}``, then ``{output}``, each once."""
    check_text(template.replace("\n", " ").replace("\t", " "))
    if template.count("{input}") != 1 or template.count("{output}") != 1:
        raise PydanticCustomError(
            "template", "a template has {{input}} and {{output}} once each, as 'Q: {{input}}\\nA: {{output}}\\n\\n'"
        )
    if template.index("{output}") < template.index("{input}"):
        raise PydanticCustomError(
            "template", "{{output}} comes before {{input}}, but a query ends where its answer begins; turn them round"
        )
    return template


def _as_text(value: Any) -> Any:
    """Return a mapping with keys and values as text: a label may be a number."""
    if not isinstance(value, dict):
        return value
    return {str(key): str(word) if isinstance(word, int | float) else word for key, word in value.items()}


def _as_texts(value: Any) -> Any:
    """Return a list with its numbers as text: an id may be a number."""
    return [str(item) if type(item) is int else item for item in value] if isinstance(value, list) else value


Template = Annotated[
    str, Field(min_length=1, max_length=4096), BeforeValidator(_with_line_breaks), AfterValidator(_check_template)
]
Names = Annotated[dict[Text, Text], BeforeValidator(_as_text)]


class DataBlock(Block):
    """Source of ON episodes and OFF prompts, and what counts as an answer."""

    on_path: Text | None = None
    off_path: Text | None = None
    off_format: Literal["prompt", "document"] | None = None
    off_length: Count = 64
    task: TaskName = "symbol_lookup"
    params: dict[str, JsonValue] = Field(default_factory=dict)
    pairs: Annotated[int, Field(ge=2, le=10_000)] = 8
    demo_tokens: Count | None = None
    fields: Names = Field(default_factory=dict)
    template: Template | None = None
    format: Literal["text", "chat"] = "text"
    shots: Annotated[int, Field(ge=1, le=10_000)] = 8
    shots_from: Text | None = None
    balance: bool = False
    verbalizer: Names | Literal["symbols"] | None = None
    answer: Literal["single", "first", "whole"] = "single"
    unusable: Literal["refuse", "skip"] = "refuse"
    sample_ids: Annotated[list[Text], Field(min_length=1), BeforeValidator(_as_texts)] | None = None

    @property
    def source(self) -> str:
        """Where ON episodes come from: the name of the file, or of the task that generates them."""
        return self.task if self.on_path is None else PurePath(self.on_path).name

    @model_validator(mode="after")
    def _check_one_source(self) -> Self:
        if self.on_path is not None and self.task != "symbol_lookup":
            raise ValueError(
                f"data.task = {self.task} generates ON episodes and data.on_path = {self.on_path} names a file of them; leave "
                "one of the two out"
            )
        object.__setattr__(self, "params", filled_params(TASKS, self.task, self.params, "data.params"))
        return self
