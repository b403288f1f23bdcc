"""A program of the user's under Ray Train: its checkpoints are Ray Train's, in the run's folder, so it resumes by Ray's own book.

What it reports becomes the run's progress: metrics by their names where status has such a field, all other numbers as evaluation.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any

from ray.train import UserCallback

from dsft_api import goodput
from dsft_api.job import Job
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import EvaluationStatus, ProgressStatus
from dsft_trainer.errors import failure_of
from dsft_trainer.runtime.starts import Start

log = logging.getLogger(__name__)

FOLDER = "ray"
"""Ray Train's folder in the run's own."""
BOOK = f"{FOLDER}/checkpoint_manager_snapshot.json"
"""Where Ray Train writes down which checkpoints there are."""

_FIELDS = ("epoch", "loss", "learning_rate", "tokens_per_second", "mfu")
_MAX_METRICS = 32


def program_main(config: dict[str, Any]) -> None:
    """The train function that Ray Train runs on each worker: the user's, with what it raises told to the launcher."""
    from dsft_trainer.process import prepare_process

    job = Job.model_validate_json(config["job"])
    prepare_process(job)
    from dsft_trainer.logs import keep_last_lines, output_files
    from dsft_trainer.program import run_program
    from dsft_trainer.runtime.ray import RayRuntime, log_shipped

    assert job.spec.program is not None, "only such jobs come here"  # noqa: S101
    runtime = RayRuntime.of(config)
    with log_shipped(job, runtime) if config["on_cluster"] else nullcontext():
        if runtime.place.is_first:
            runtime.publish(begun(runtime.opening).model_dump_json(by_alias=True, exclude_none=True))
        try:
            run_program(job.spec.program)
        except Exception as error:
            failure = failure_of(error)
            log.exception("rank %s failed", runtime.place.rank)
            failure.evidence = keep_last_lines(job, runtime.log_name, output_files())
            runtime.fail(failure.report(runtime.place.rank))
            raise


def begun(opening: Progress) -> Progress:
    """What is told until the program reports, which may be hours."""
    now = datetime.now(UTC)
    changes = {"seq": opening.seq + 1, "phase": TrainerPhase.TRAINING, "message": "the program runs"}
    return opening.model_copy(update=changes | {"updated_at": now, "spent": goodput.charged(opening, now)})


class ProgramProgress(UserCallback):
    """Turns each report into a progress document. Runs in Ray Train's controller."""

    def __init__(self, relay: Any, start: Start) -> None:
        self._relay = relay
        self._start = start.number
        self._progress = start.opening
        self._reports = 0

    def after_report(
        self,
        run_context: object,  # noqa: ARG002
        metrics: list[dict[str, Any]],
        checkpoint: object,
    ) -> None:
        """All ranks reported: rank 0's numbers count."""
        self._reports += 1
        numbers = metrics[0] if metrics else {}
        self._progress = reported(self._progress, numbers, self._reports, has_checkpoint=checkpoint is not None)
        self._relay.publish.remote(self._start, self._progress.model_dump_json(by_alias=True, exclude_none=True))


def reported(progress: Progress, metrics: Mapping[str, Any], reports: int, *, has_checkpoint: bool = False) -> Progress:
    """The document after a report. Without a metric `step`, the number of reports stands for it.

    Of a program nobody knows when it makes its first step: until its first report it starts.
    """
    now = datetime.now(UTC)
    numbers = {name: number for name, value in metrics.items() if (number := _finite(value)) is not None}
    step = int(numbers.pop("step", reports))
    total = numbers.pop("total_steps", None)
    known = {name: numbers.pop(name, None) for name in _FIELDS}
    status = ProgressStatus(
        step=step,
        total_steps=int(total) if total else None,
        percent=round(100 * step / total, 1) if total else None,
        updated_at=now,
        **known,
    )
    spent = goodput.charged(progress, now)
    others = {name[:64]: value for name, value in list(numbers.items())[:_MAX_METRICS]}
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


def _finite(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]  whatever a user reports
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, str) else None
