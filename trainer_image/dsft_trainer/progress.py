"""Rank 0's account of the attempt: keeps the current Progress and hands it on, to the launcher and to storage.

Training never waits for it: the launcher takes the newest document without blocking, and storage is written by a thread that
counts its errors and goes on. Both are throttled, but a new phase, a commit or an evaluation is told at once.

That thread also looks, before it writes, whether another start has taken the run over: then it says so instead, and this one
ends.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any

from dsft_api import goodput
from dsft_api.job import Job
from dsft_api.layout import PROGRESS_FILE
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import CheckpointRef, ProgressStatus, Spent
from dsft_trainer.checkpoint.commits import ClaimId
from dsft_trainer.checkpoint.listing import superseding, taken_over
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 0.5
STORE_SECONDS = 15.0
LOG_SECONDS = 10.0


class Reporter:
    """The progress of one group start. Only rank 0 has a real one; see `SilentReporter`."""

    def __init__(
        self,
        progress: Progress,
        publish: Callable[[str], None],
        store: Store,
        superseded: Callable[[TrainerError], None] = lambda _error: None,
    ) -> None:
        """`superseded` is called from a thread, once, and may end the process."""
        self._progress = progress
        self._publish = publish
        self._store = store
        self._superseded = superseded
        self._claim: ClaimId | None = None
        self._published = 0.0
        self._logged = 0.0
        self._changed = threading.Event()
        self._closed = False
        # Of the saves that may still become commits: by their step, how many seconds had been useful when they began.
        self._saves: dict[int, float] = {}
        self._thread = threading.Thread(target=self._write_to_storage, name="progress", daemon=True)
        self._thread.start()

    @property
    def progress(self) -> Progress:
        """The current document."""
        return self._progress

    def claimed(self, claim: ClaimId) -> None:
        """This start has claimed the run: from now on a newer start of the same attempt has taken it over, too."""
        self._claim = claim

    def update(self, *, now: bool = True, **changes: Any) -> None:
        """Change fields of the document and pass it on; with `now=False` only if the last time is a while ago."""
        before = self._progress
        after = before.model_copy(update={**changes, "seq": before.seq + 1, "updated_at": datetime.now(UTC)})
        self._progress = after.model_copy(update={"spent": self._spent(before, after)})
        self._log(before)
        if now or time.monotonic() - self._published >= PUBLISH_SECONDS:
            self._published = time.monotonic()
            self._publish(self._progress.model_dump_json(by_alias=True, exclude_none=True))
            self._changed.set()

    def _spent(self, before: Progress, after: Progress) -> Spent:
        """The account of the attempt. A save holds what was trained until it began, from when it is a commit."""
        spent = goodput.charged(before, after.updated_at)
        if after.phase is TrainerPhase.SAVING and after.progress is not None:
            self._saves.setdefault(after.progress.step, spent.useful_seconds)
        latest = _latest(after)
        if latest is None or latest.step not in self._saves:
            return spent
        useful = self._saves[latest.step]
        self._saves = {step: seconds for step, seconds in self._saves.items() if step >= latest.step}
        return goodput.committed(spent, useful)

    def _log(self, before: Progress) -> None:
        """For those who read the log: evaluations and commits, and where the training is, now and then."""
        evaluation, latest = self._progress.evaluation, _latest(self._progress)
        if evaluation is not None and evaluation != before.evaluation:
            metrics = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
            log.info("step %d: evaluation: %s", evaluation.step, metrics)
        if latest is not None and latest != _latest(before):
            log.info("step %d: committed %s", latest.step, latest.uri)
        step = self._progress.progress
        if step is not None and time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("step %d of %s: loss %.4g", step.step, step.total_steps, step.loss or 0.0)

    def close(self) -> None:
        """Write the last document to storage and stop."""
        self._closed = True
        self._changed.set()
        self._thread.join(timeout=30)

    def _write_to_storage(self) -> None:
        while not self._closed:
            # A start that writes nothing new looks as well: it may hang.
            self._changed.wait(STORE_SECONDS)
            self._changed.clear()
            if not self._put():
                return
            # Throttle, but do not sleep through the end.
            deadline = time.monotonic() + STORE_SECONDS
            while not self._closed and time.monotonic() < deadline:
                time.sleep(0.1)
        self._put()

    def _put(self) -> bool:
        """Write the document, unless another start has taken the run over; whether none has."""
        document = self._progress
        mine = self._claim or ClaimId(attempt=document.attempt, group=document.group)
        try:
            newer = superseding(self._store, mine)
            # Before this start has said its own claim, one of this attempt may be that very claim.
            if newer is None or (self._claim is None and newer.attempt == mine.attempt):
                text = document.model_dump_json(by_alias=True, exclude_none=True, indent=1)
                self._store.put_bytes(PROGRESS_FILE, text.encode())
                return True
        except Exception as error:  # noqa: BLE001  progress is a courtesy: the run must not die of it
            log.warning("progress.json could not be written: %s", error)
            return True
        self._superseded(taken_over(mine, newer))
        return False


def _latest(progress: Progress) -> CheckpointRef | None:
    return progress.checkpoints.latest if progress.checkpoints is not None else None


class SilentReporter:
    """What the other ranks have: says nothing."""

    def claimed(self, claim: ClaimId) -> None:
        """Nothing."""

    def update(self, *, now: bool = True, **changes: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Pace:
    """Steps and tokens per second over the last steps, and the expected end."""

    WINDOW = 20

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: list[tuple[float, int]] = [(clock(), 0)]
        self._steps: deque[float] = deque(maxlen=self.WINDOW)
        self._tokens = 0

    def pause(self) -> None:
        """Forget the window: what happened since the last step was no training."""
        self._marks = [(self._clock(), self._tokens)]

    def step(self, tokens: int) -> None:
        """One step was done with so many tokens over all ranks."""
        self._tokens += tokens
        self._steps.append(self._clock() - self._marks[-1][0])
        self._marks = [*self._marks, (self._clock(), self._tokens)][-self.WINDOW :]

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the window; None before the first step."""
        steps = len(self._marks) - 1
        return (self._marks[-1][0] - self._marks[0][0]) / steps if steps else None

    @property
    def median_step(self) -> float | None:
        """Seconds of a usual step, of the last ones, before a pause too; None before the first."""
        steps = tuple(self._steps)
        return median(steps) if steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the window; None before the first step."""
        seconds = self._marks[-1][0] - self._marks[0][0]
        return (self._marks[-1][1] - self._marks[0][1]) / seconds if seconds > 0 else None


def progress_status(
    *, step: int, total_steps: int, epoch: float, loss: float | None, learning_rate: float | None, pace: Pace
) -> ProgressStatus:
    """The progress part of the document."""
    now = datetime.now(UTC)
    seconds = pace.seconds_per_step
    tokens = pace.tokens_per_second
    return ProgressStatus(
        step=step,
        total_steps=total_steps,
        epoch=round(epoch, 4),
        percent=round(100 * step / total_steps, 1),
        loss=loss,
        learning_rate=learning_rate,
        step_seconds=round(seconds, 4) if seconds is not None else None,
        tokens_per_second=round(tokens, 1) if tokens is not None else None,
        eta=now + timedelta(seconds=seconds * (total_steps - step)) if seconds is not None else None,
        updated_at=now,
    )


def starting(job: Job) -> Progress:
    """The first document of an attempt."""
    return Progress(
        seq=0,
        run_uid=job.run.uid,
        attempt=job.attempt,
        phase=TrainerPhase.STARTING,
        resolved=job.resolved,
        updated_at=datetime.now(UTC),
    )
