"""Evaluation on held-out data: each row counted once, on any number of ranks.

Every rank runs the same number of batches, the last ones padded and masked, since ZeRO-3 gathers weights in each forward
pass and a rank with fewer batches would leave the others waiting. Random generators are put back afterwards: evaluating more
often must not change the training.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import Metric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, MulticlassAccuracy, MulticlassF1Score

from dsft_trainer import collectives
from dsft_trainer.data.collate import Collator
from dsft_trainer.data.indexed import IndexedDataset
from dsft_trainer.data.sampler import eval_batches
from dsft_trainer.data.tokens import IGNORED
from dsft_trainer.engine import Engine
from dsft_trainer.losses import BatchLoss, classification_nll
from dsft_trainer.runtime import Place

BINARY = 2
# Batches from one look for a stop to the next: each look has the ranks wait for each other.
LOOK_EVERY = 8


def _class_metrics(num_labels: int) -> dict[str, Metric | MetricCollection]:
    if num_labels == BINARY:
        return {"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()}
    return {
        "accuracy": MulticlassAccuracy(num_labels, average="micro"),
        "f1": MulticlassF1Score(num_labels, average="macro"),
    }


class Evaluator:
    """Evaluates one data set for one task."""

    def __init__(
        self,
        dataset: IndexedDataset,
        collator: Collator,
        place: Place,
        *,
        task: str,
        loss: BatchLoss,
        num_labels: int,
        batch_size: int,
        device: torch.device,
        beat: Callable[[], None],
    ) -> None:
        self._dataset = dataset
        self._collator = collator
        self._task = task
        self._batch_loss = loss
        self._beat = beat
        self._batches = eval_batches(len(dataset), place.rank, place.world_size, batch_size)
        # Not MeanMetric, which takes no notice of weights where nan_strategy is disable (torchmetrics 1.9).
        self._nll, self._weight = (SumMetric(nan_strategy="disable").to(device) for _ in range(2))
        classes = _class_metrics(num_labels) if task == "sequence-classification" else {}
        self._classes = {name: metric.to(device) for name, metric in classes.items()}

    def __call__(self, engine: Engine, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics over the whole data set, equal on all ranks; None if any rank was told to `stop` meanwhile. Collective.

        loss is the mean negative log-likelihood per trained token (causal-lm) or row; perplexity its exponential; accuracy
        and f1 are binary for two classes, else micro accuracy and macro F1.
        """
        rng = engine.rng_state()
        engine.eval()
        is_whole = self._count_all(engine, stop)
        engine.train()
        engine.set_rng_state(rng)
        values = self._values() if is_whole else None
        for metric in (self._nll, self._weight, *self._classes.values()):
            metric.reset()
        return values

    def _count_all(self, engine: Engine, stop: Callable[[], bool]) -> bool:
        with torch.no_grad():
            for number, (indices, valid) in enumerate(self._batches):
                if number % LOOK_EVERY == 0 and collectives.all_sum([float(stop())], engine.device)[0] > 0:
                    return False
                self._count(engine, indices, valid)
                self._beat()
        return True

    def _values(self) -> dict[str, float]:
        values = {"loss": float(self._nll.compute() / self._weight.compute())}
        values |= {name: float(metric.compute()) for name, metric in self._classes.items()}
        if self._task == "causal-lm":
            values["perplexity"] = math.exp(min(values["loss"], 700.0))
        return values

    def _count(self, engine: Engine, indices: NDArray[np.int64], valid: NDArray[np.bool_]) -> None:
        batch = self._collator([self._dataset[int(index)] for index in indices], valid=valid)
        if self._task == "causal-lm":
            loss = self._batch_loss(batch)
            if batch.weight > 0:
                self._count_loss(loss, batch.weight)
            return
        labels = batch.labels.to(engine.device)
        logits = engine.forward(batch.inputs)
        if batch.weight == 0:
            return
        self._count_loss(classification_nll(logits, labels), batch.weight)
        for metric in self._classes.values():
            metric.update(logits.argmax(-1)[labels != IGNORED], labels[labels != IGNORED])

    def _count_loss(self, nll: torch.Tensor, weight: int) -> None:
        self._nll.update(nll)
        self._weight.update(weight)
