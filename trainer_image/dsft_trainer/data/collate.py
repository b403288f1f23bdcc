"""Rows of tokens -> one padded batch of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dsft_api.spec.identity import Task
from dsft_trainer.data.indexed import Row
from dsft_trainer.data.tokens import IGNORED


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU.

    `inputs`: what the model's forward takes: `input_ids` and `attention_mask` int64 [batch, length], and
    `token_type_ids` where the tokenizer makes them; of packed rows `input_ids` and `position_ids`. `labels`: int64,
    [batch, length] for causal-lm (not yet shifted), [batch] for classification; IGNORED where nothing is learnt. `weight`:
    what the batch counts in the loss; `tokens`: its tokens without padding. Rows that are not valid count in neither.
    """

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor
    weight: int
    tokens: int


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to the longest of them, rounded up to `pad_to_multiple_of`, but never beyond `max_length`."""

    pad_token_id: int
    task: Task
    max_length: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Row], valid: NDArray[np.bool_] | None = None) -> Batch:
        """One batch of the rows, in their order. `valid` marks those that count (see `eval_batches`)."""
        counts = np.ones(len(rows), dtype=bool) if valid is None else valid
        lengths = np.array([len(row["input_ids"]) for row in rows])
        multiple = self.pad_to_multiple_of
        width = min(-(-int(lengths.max()) // multiple) * multiple, self.max_length)
        inputs = {"input_ids": _pad(rows, "input_ids", width, self.pad_token_id)}
        if "position_ids" in rows[0]:
            # transformers keeps packed rows apart by their positions, but only where there is no attention mask. Padding at
            # position 0 is a row of its own.
            inputs["position_ids"] = _pad(rows, "position_ids", width, 0)
        else:
            inputs["attention_mask"] = (np.arange(width) < lengths[:, None]).astype(np.int64)
        if "token_type_ids" in rows[0]:
            inputs["token_type_ids"] = _pad(rows, "token_type_ids", width, 0)
        if self.task == "causal-lm":
            labels = _pad(rows, "labels", width, IGNORED)
            labels[~counts] = IGNORED
            weight = int((labels[:, 1:] != IGNORED).sum())
        else:
            labels = np.where(counts, [row["label"] for row in rows], IGNORED)
            weight = int(counts.sum())
        return Batch(
            inputs={name: torch.from_numpy(values) for name, values in inputs.items()},
            labels=torch.from_numpy(labels),
            weight=weight,
            tokens=int(lengths[counts].sum()),
        )


def _pad(rows: Sequence[Row], name: str, width: int, filler: int) -> NDArray[np.int64]:
    padded = np.full((len(rows), width), filler, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row[name])] = row[name]
    return padded
