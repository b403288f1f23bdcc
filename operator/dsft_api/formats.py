"""The data formats: which task a row serves, what it holds, and which of its tokens may be trained. Pure facts."""

from dataclasses import dataclass
from typing import Literal

from dsft_api.spec.identity import DataFormat, Task

ColumnKind = Literal["text", "label", "messages"]
LossOn = Literal["assistant", "completion", "all"]


@dataclass(frozen=True)
class Format:
    """One data format: its task, its columns (by attribute of `Columns`), and the `lossOn` it allows, default first."""

    task: Task
    columns: tuple[tuple[str, ColumnKind], ...]
    loss_on: tuple[LossOn, ...] = ()


FORMATS: dict[DataFormat, Format] = {
    "classification": Format("sequence-classification", (("text", "text"), ("label", "label"))),
    "pair": Format("sequence-classification", (("text", "text"), ("text_pair", "text"), ("label", "label"))),
    "text": Format("causal-lm", (("text", "text"),), ("all",)),
    "prompt_completion": Format("causal-lm", (("prompt", "text"), ("completion", "text")), ("completion", "all")),
    "messages": Format("causal-lm", (("messages", "messages"),), ("assistant", "all")),
}
