"""A program of the user's under Ray Train: its checkpoints are Ray Train's, in the run's folder, so it resumes by Ray's own book.

What it reports becomes the run's progress: metrics by their names where status has such a field, all other numbers as evaluation.
What Ray Train has in its book is a commit, and listed in the status.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any

import ray.train
from ray.train import CheckpointConsistencyMode, UserCallback
from ray.train.v2._internal.execution.callback import TrainContextCallback

from dsft_api import goodput
from dsft_api.job import Job
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import Checkpoints, EvaluationStatus, ProgressStatus
from dsft_trainer.checkpoint.ray_book import listed, metrics_of, numbers
from dsft_trainer.checkpoint.store import store_of
from dsft_trainer.errors import TrainerError, failure_of
from dsft_trainer.runtime import Outcome
from dsft_trainer.runtime.starts import Start

log = logging.getLogger(__name__)

_FIELDS = ("epoch", "loss", "learning_rate", "tokens_per_second", "mfu")


def program_main(config: dict[str, Any]) -> None:
    """The train function that Ray Train runs on each worker: the user's, with what it raises told to the launcher."""
    from dsft_trainer.process import prepare_process

    job = Job.model_validate_json(config["job"])
    prepare_process(job)
    from dsft_trainer import context
    from dsft_trainer.logs import keep_last_lines, output_files
    from dsft_trainer.program import run_program
    from dsft_trainer.program_source import use_source
    from dsft_trainer.runtime.ray import RayRuntime, log_shipped

    assert job.spec.program is not None, "only such jobs come here"  # noqa: S101
    runtime = RayRuntime.of(config)
    with (
        log_shipped(job, runtime) if config["on_cluster"] else nullcontext(),
        context.running(job, runtime.drain_time) as was_drained,
    ):
        if runtime.place.is_first:
            runtime.publish(begun(runtime.opening).model_dump_json(by_alias=True, exclude_none=True))
        try:
            use_source(job)
            run_program(job.spec.program)
        except Exception as error:
            failure = failure_of(error)
            log.exception("rank %s failed", runtime.place.rank)
            failure.evidence = keep_last_lines(job, runtime.log_name, output_files())
            runtime.fail(failure.report(runtime.place.rank))
            raise
        runtime.finish(Outcome.INTERRUPTED if was_drained() else Outcome.SUCCEEDED)


def begun(opening: Progress) -> Progress:
    """What is told until the program reports, which may be hours."""
    now = datetime.now(UTC)
    changes = {"seq": opening.seq + 1, "phase": TrainerPhase.TRAINING, "message": "the program runs"}
    return opening.model_copy(update=changes | {"updated_at": now, "spent": goodput.charged(opening, now)})


class ProgramProgress(UserCallback):
    """Turns each report into a progress document. Runs in Ray Train's controller."""

    def __init__(self, job: Job, relay: Any, start: Start) -> None:
        self._job = job
        self._relay = relay
        self._start = start.number
        self._progress = start.opening
        # Where reports stand for steps, they go on from those that the checkpoint holds.
        latest = start.opening.checkpoints.latest if start.opening.checkpoints is not None else None
        self._reports = latest.step if latest is not None else 0

    def after_report(
        self,
        run_context: object,  # noqa: ARG002
        metrics: list[dict[str, Any]],
        checkpoint: object,
    ) -> None:
        """All ranks reported: rank 0's numbers count."""
        self._reports += 1
        told = metrics[0] if metrics else {}
        self._progress = reported(self._progress, told, self._reports, has_checkpoint=checkpoint is not None)
        if checkpoint is not None:
            self._progress = self._progress.model_copy(update={"checkpoints": self._listed()})
        self._relay.publish.remote(self._start, self._progress.model_dump_json(by_alias=True, exclude_none=True))

    def _listed(self) -> Checkpoints | None:
        """The checkpoints, this one too: Ray Train has written it down by now."""
        before = self._progress.checkpoints
        assert self._progress.progress is not None, "a report makes one"  # noqa: S101
        try:
            return listed(
                store_of(self._job).impatient(),
                before.retained if before is not None else (),
                evaluation=self._job.spec.evaluation,
                step=self._progress.progress.step,
                world_size=self._job.ranks.count,
            )
        except (TrainerError, OSError) as error:
            # It is in the book, which is what a resume goes by. The next report lists it.
            log.warning("the new checkpoint could not be listed: %s", error)
            return before


class DurableReports(TrainContextCallback):
    """Has `ray.train.report` return only when the checkpoint that it brought is in Ray Train's book. Runs in the ranks.

    By itself it returns when the files are in storage, up to a poll of the controller before the book knows them: a rank lost in
    between would take the checkpoint with it (docs/decisions/0002). For uploads in the background (ASYNC) the program must wait.
    """

    def __init__(self) -> None:
        self._reporting: int | None = None
        self._brought = False

    @contextmanager
    def on_report(self) -> Iterator[None]:
        """Around the whole report."""
        self._reporting, self._brought = threading.get_ident(), False
        yield
        if self._brought:
            ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)

    @contextmanager
    def on_checkpoint_transfer(self) -> Iterator[None]:
        """Around the upload, in whichever thread that is."""
        yield
        self._brought |= threading.get_ident() == self._reporting


def reported(progress: Progress, metrics: Mapping[str, Any], reports: int, *, has_checkpoint: bool = False) -> Progress:
    """The document after a report. Without a metric `step`, the number of reports stands for it.

    Of a program nobody knows when it makes its first step: until its first report it starts.
    """
    now = datetime.now(UTC)
    named = numbers(metrics)
    step = int(named.pop("step", reports))
    total = named.pop("total_steps", None)
    known = {name: named.pop(name, None) for name in _FIELDS}
    status = ProgressStatus(
        step=step,
        total_steps=int(total) if total else None,
        percent=round(100 * step / total, 1) if total else None,
        updated_at=now,
        **known,
    )
    spent = goodput.charged(progress, now)
    others = metrics_of(named)
    changes: dict[str, Any] = {"evaluation": EvaluationStatus(step=step, metrics=others)} if others else {}
    return progress.model_copy(
        update={
            **changes,
            "seq": progress.seq + 1,
            "phase": TrainerPhase.TRAINING,
            "progress": status,
            "spent": goodput.committed(spent, spent.useful_seconds) if has_checkpoint else spent,
            "updated_at": now,
        }
    )
