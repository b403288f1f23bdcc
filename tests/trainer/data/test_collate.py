"""Shapes, padding and counts of a micro-batch."""

import numpy as np
import torch

from dsft_trainer.data.collate import Collator
from dsft_trainer.data.tokens import IGNORED


def row(length, label=None, trained=None, types=False) -> dict[str, np.ndarray]:
    cells = {"input_ids": np.arange(1, length + 1, dtype=np.int32)}
    if types:
        cells["token_type_ids"] = np.ones(length, dtype=np.int32)
    if label is not None:
        return {**cells, "label": np.int64(label)}
    labels = cells["input_ids"].copy()
    labels[: length - (trained or length)] = IGNORED
    return {**cells, "labels": labels}


def test_rows_are_padded_to_a_multiple():
    batch = Collator(pad_token_id=9, task="causal-lm", max_length=512, pad_to_multiple_of=8)(
        [row(3), row(9, trained=2)]
    )
    assert batch.inputs["input_ids"].shape == batch.labels.shape == (2, 16)
    assert batch.inputs["input_ids"][0].tolist() == [1, 2, 3] + [9] * 13
    assert batch.inputs["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch.labels[0].tolist() == [1, 2, 3] + [IGNORED] * 13
    assert batch.labels[1].tolist() == [IGNORED] * 7 + [8, 9] + [IGNORED] * 7
    assert (batch.weight, batch.tokens) == (2 + 2, 12)
    assert {tensor.dtype for tensor in (*batch.inputs.values(), batch.labels)} == {torch.int64}


def test_padding_stays_within_the_longest_length():
    """A model has no positions beyond it."""
    batch = Collator(pad_token_id=0, task="causal-lm", max_length=12, pad_to_multiple_of=8)([row(12), row(3)])
    assert batch.labels.shape == (2, 12)


def test_labels_and_token_types_of_a_classifier():
    batch = Collator(pad_token_id=0, task="sequence-classification", max_length=512)(
        [row(3, 1, types=True), row(2, 0, types=True)]
    )
    assert batch.labels.tolist() == [1, 0]
    assert batch.inputs["token_type_ids"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (batch.weight, batch.tokens) == (2, 5)


def test_rows_that_do_not_count_are_ignored():
    valid = np.array([True, False])
    labelled = Collator(0, "sequence-classification", 512)([row(3, 1), row(2, 1)], valid)
    assert (labelled.labels.tolist(), labelled.weight, labelled.tokens) == ([1, IGNORED], 1, 3)
    causal = Collator(0, "causal-lm", 512)([row(3), row(4)], valid)
    assert (causal.weight, causal.tokens, (causal.labels[1] == IGNORED).all().item()) == (2, 3, True)
