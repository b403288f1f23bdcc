"""The training loop: batches, forward, backward, step, evaluate, checkpoint, report.

It knows torch.distributed and DeepSpeed's engine, not who started the ranks. The position in the data is the number of global
samples consumed, a function of the step alone, so resuming is starting at another step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dsft_api.conditions import FailureClass
from dsft_api.progress import TrainerPhase
from dsft_api.status import EvaluationStatus
from dsft_trainer import collectives
from dsft_trainer.checkpoint.checkpointer import Point
from dsft_trainer.checkpoint.requests import SaveRequests
from dsft_trainer.checkpoint.saver import Saver
from dsft_trainer.data.collate import Collator
from dsft_trainer.data.indexed import IndexedDataset
from dsft_trainer.data.sampler import GlobalBatches, split
from dsft_trainer.data.sharded import ShardedDataset
from dsft_trainer.engine import Engine, StepInfo
from dsft_trainer.errors import TrainerError
from dsft_trainer.evaluate import Evaluator
from dsft_trainer.losses import BatchLoss
from dsft_trainer.metrics import MetricsLog
from dsft_trainer.progress import Pace, Reporter, SilentReporter, progress_status
from dsft_trainer.runtime import Outcome, Place
from dsft_trainer.samples import SampleWriter
from dsft_trainer.stopping import Stopper

# Steps in a row that DeepSpeed did not apply, since a gradient was not finite, before the run counts as diverged.
MAX_SKIPPED_STEPS = 5


@dataclass(frozen=True)
class Schedule:
    """At which steps something is due. Steps are counted from 1, when they are done."""

    total_steps: int
    steps_per_epoch: int
    evaluate_every: int | None

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after this step. The end always is, when there is anything to evaluate."""
        return self.evaluate_every is not None and (step % self.evaluate_every == 0 or step == self.total_steps)


@dataclass
class Trainer:
    """Everything that the loop works with; `run` is the loop."""

    engine: Engine
    dataset: IndexedDataset | ShardedDataset
    want: Callable[[Sequence[int]], None] | None
    """Has shards of the data set fetched ahead, if it is in shards."""
    batches: GlobalBatches
    collator: Collator
    evaluator: Evaluator | None
    sample_writer: SampleWriter | None
    saver: Saver
    stopper: Stopper
    schedule: Schedule
    place: Place
    reporter: Reporter | SilentReporter
    metrics: MetricsLog | None
    loss: BatchLoss
    micro_batch_size: int
    drain_requested: Callable[[], bool]
    requests: SaveRequests
    beat: Callable[[], None]
    storage_prefix: str
    pace: Pace = field(default_factory=Pace)
    skipped: int = 0
    skipped_in_a_row: int = 0

    def run(self, first_step: int) -> Outcome:
        """Train from `first_step` (steps already done) to the end. Collective.

        Returns INTERRUPTED when the launcher asked for a stop; the state is committed then.

        Raises:
            TrainerError: Diverged, when the loss is not finite or gradients stay so; what `Saver.settle` raises.
        """
        self.engine.train()
        self.pace.pause()
        if self._owes_evaluation(first_step) and (outcome := self._conclude(first_step)) is not None:
            return outcome
        # One that had stopped early and was started again, for its export, has nothing left to train.
        last_step = first_step if self.stopper.stop else self.schedule.total_steps
        for step in range(first_step + 1, last_step + 1):
            stop, asked = self._train_step(step)
            if self.saver.settleable:
                self.saver.settle()
                self._report_checkpoints()
            if (outcome := self._conclude(step, stop=stop, asked=asked)) is not None:
                return outcome
        return Outcome.SUCCEEDED

    def _owes_evaluation(self, step: int) -> bool:
        """Whether this step is committed already, but without its evaluation: a start goes on from there."""
        newest = next(reversed(self.saver.checkpointer.commits), None)
        is_committed = newest is not None and newest.step == step
        return is_committed and not newest.metrics and self.schedule.evaluation_due(step)

    def _conclude(self, step: int, *, stop: bool = False, asked: bool = False) -> Outcome | None:
        """Evaluate and save, if it is time; how the run ends, if it ends after this step.

        A stop waits for no evaluation, which may take longer than `drainSeconds`: the next start makes up for it.
        """
        metrics: dict[str, float] | None = {}
        if self.schedule.evaluation_due(step):
            metrics = None if stop else self._evaluate(step)
        if metrics is None:
            if not self._owes_evaluation(step):
                self._save_now(step, {})
            return Outcome.INTERRUPTED
        done = step == self.schedule.total_steps or self.stopper.stop
        if stop or done:
            self._save_now(step, metrics)
            return Outcome.SUCCEEDED if done else Outcome.INTERRUPTED
        if self.saver.due(step) or asked or self._is_best(metrics):
            self._save(step, metrics)
        return None

    def _train_step(self, step: int) -> tuple[bool, bool]:
        """One optimizer step; whether any rank was asked to stop, and whether a checkpoint was asked for."""
        if self.want is not None:
            self.want(self.batches.shards_ahead(step - 1))
        indices = self.batches.batch(step - 1)
        weight = int(self.dataset.weights[indices].sum())
        micro_steps = split(indices, self.place.rank, self.place.world_size, self.micro_batch_size)
        # DeepSpeed divides by the accumulation steps and averages over ranks: undo both, and divide by the whole weight.
        scale = self.place.world_size * len(micro_steps) / weight
        summed = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        tokens = 0
        for i, rows in enumerate(micro_steps):
            batch = self.collator([self.dataset[int(row)] for row in rows])
            loss = self.loss(batch)
            self.engine.backward(loss * scale)
            summed += loss.detach()
            tokens += batch.tokens
            if i + 1 < len(micro_steps):
                self.engine.micro_step()
            self.beat()
        wishes = (float(self.drain_requested()), self.requests.vote() if self.place.is_first else 0.0)
        total, tokens, stops, asks, *votes = collectives.all_sum(
            [float(summed), tokens, *wishes, *self.saver.votes()], self.engine.device
        )
        self.saver.heard(*votes)
        if not math.isfinite(total):
            raise TrainerError(
                FailureClass.DIVERGED, f"the loss of step {step} is {total}; the last checkpoint is from before it"
            )
        info = self.engine.step()
        self._count_skips(step, info)
        self._report(step, total / weight, int(tokens), info)
        return stops > 0, asks > 0

    def _count_skips(self, step: int, info: StepInfo) -> None:
        self.skipped += not info.applied
        self.skipped_in_a_row = 0 if info.applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise TrainerError(
                FailureClass.DIVERGED,
                f"gradients were not finite in {MAX_SKIPPED_STEPS} steps in a row, up to step {step}",
            )

    def _report(self, step: int, loss: float, tokens: int, info: StepInfo) -> None:
        self.pace.step(tokens)
        if self.metrics is not None:
            values = {"loss": loss, "learning_rate": info.learning_rate, "tokens": tokens}
            if info.grad_norm is not None:
                values["grad_norm"] = info.grad_norm
            if self.pace.tokens_per_second is not None:
                values["tokens_per_second"] = round(self.pace.tokens_per_second, 1)
            self.metrics.write("train", step, values)
        self.reporter.update(
            now=False,
            phase=TrainerPhase.TRAINING,
            progress=progress_status(
                step=step,
                total_steps=self.schedule.total_steps,
                epoch=self._epoch(step),
                loss=loss,
                learning_rate=info.learning_rate,
                pace=self.pace,
            ),
            grad_norm=info.grad_norm,
            skipped_steps=self.skipped,
        )

    def _evaluate(self, step: int) -> dict[str, float] | None:
        """The metrics; None if a stop was asked for meanwhile."""
        if self.evaluator is None:
            return {}
        self.reporter.update(phase=TrainerPhase.EVALUATING)
        metrics = self.evaluator(self.engine, self._stop_asked)
        if metrics is None:
            return None
        if not all(map(math.isfinite, metrics.values())):
            raise TrainerError(FailureClass.DIVERGED, f"the evaluation at step {step} is not finite: {metrics}")
        samples = self.sample_writer(self.engine, self._stop_asked) if self.sample_writer is not None else []
        kept = None
        if self.metrics is not None:
            self.metrics.write("eval", step, metrics)
            kept = self.metrics.keep_samples(step, samples)
        self.stopper.see(metrics)
        self.reporter.update(evaluation=EvaluationStatus(step=step, metrics=metrics, samples=kept))
        self.pace.pause()
        return metrics

    def _stop_asked(self) -> bool:
        # On a cluster the answer comes with a document.
        self.reporter.update(now=False)
        return self.drain_requested()

    def _is_best(self, metrics: dict[str, float]) -> bool:
        """Whether this evaluation beats all committed ones, and best checkpoints are kept."""
        policy = self.saver.checkpointer.retention
        if policy.keep_best == 0 or policy.metric not in metrics:
            return False
        others = [
            commit.metrics[policy.metric]
            for commit in self.saver.checkpointer.commits
            if policy.metric in commit.metrics
        ]
        value = metrics[policy.metric]
        return not others or (value > max(others) if policy.larger_is_better else value < min(others))

    def _save(self, step: int, metrics: dict[str, float]) -> None:
        """Copy the state; the rest is done while the next steps are."""
        self.reporter.update(now=self.saver.checkpointer.pending, phase=TrainerPhase.SAVING)
        self.requests.saved(step)
        self.saver.save(self.engine, self._point(step, metrics))
        self._saved()

    def _save_now(self, step: int, metrics: dict[str, float]) -> None:
        """Commit before anything else happens."""
        self.reporter.update(phase=TrainerPhase.SAVING)
        self.requests.saved(step)
        self.saver.save_now(self.engine, self._point(step, metrics))
        self._saved()

    def _saved(self) -> None:
        self.beat()
        self.pace.pause()
        self._report_checkpoints()

    def _point(self, step: int, metrics: dict[str, float]) -> Point:
        samples = step * self.batches.global_batch_size
        return Point(step, samples, self._epoch(step), metrics, self.stopper.patience)

    def _report_checkpoints(self) -> None:
        commits = self.saver.checkpointer.commits
        self.requests.committed(commits[-1].step if commits else 0)
        self.reporter.update(
            phase=TrainerPhase.TRAINING,
            checkpoints=self.saver.report(self.storage_prefix),
            checkpoint_request=self.requests.answered,
        )

    def _epoch(self, step: int) -> float:
        return step / self.schedule.steps_per_epoch
