"""Losses as sums, so that they can be weighted right over micro-batches and ranks.

A mean of means is wrong when micro-batches hold different numbers of trained tokens. Here each micro-batch gives the sum of
its negative log-likelihoods, and the step divides by the weight of the whole global batch, which every rank knows from the
data set without asking.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional

from dsft_api.spec.identity import Task
from dsft_trainer.data.collate import Batch
from dsft_trainer.data.tokens import IGNORED
from dsft_trainer.engine import Engine

BatchLoss = Callable[[Batch], torch.Tensor]
"""The summed loss of one micro-batch, for backward. Collective."""


def classification_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over rows. logits: [batch, classes]; labels: [batch] int64, IGNORED for padding rows."""
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def causal_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over trained tokens. logits: [batch, length, vocabulary]; labels: [batch, length], not yet shifted."""
    # The labels are shifted, since to cut the logits would copy them.
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return functional.cross_entropy(
        logits.float().flatten(0, 1), shifted.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def nll(task: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The task's loss, summed."""
    return causal_nll(logits, labels) if task == "causal-lm" else classification_nll(logits, labels)


def batch_loss(engine: Engine, task: Task, kernel: Literal["standard", "chunked"]) -> BatchLoss:
    """The loss as `execution.lossKernel` computes it; equal but for rounding."""

    def standard(batch: Batch) -> torch.Tensor:
        return nll(task, engine.forward(batch.inputs), batch.labels.to(engine.device))

    def chunked(batch: Batch) -> torch.Tensor:
        return engine.summed_loss(batch.inputs, batch.labels)

    return chunked if kernel == "chunked" else standard
