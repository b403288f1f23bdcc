"""When the loop saves, and how it lives with saves that are slow or fail.

One save at a time. One that is due by steps, or for an evaluation, waits for the one before it: `everySteps` bounds the steps
that a failure costs. One that is due by time is put off until that one is done: an interval is a price, not a promise.

A save that fails, after its own retries, is skipped, and training goes on: the commit before it still counts. As many in a row as
`maxFailures` end the attempt. Ranks decide alike: the votes of a step are summed up, and rank 0's clock and word count.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from dsft_api.conditions import FailureClass
from dsft_api.status import Checkpoints
from dsft_trainer.checkpoint.checkpointer import Checkpointer, Point, Shards
from dsft_trainer.checkpoint.commits import Claim
from dsft_trainer.errors import TrainerError

log = logging.getLogger(__name__)

DAY = 86400.0
# What a save blocks, until one was measured; and no interval is chosen for less, since the steps after a save are slower too.
ASSUMED_BLOCKED_SECONDS = 1.0
LEAST_BLOCKED_SECONDS = 0.1
_FINAL = frozenset({FailureClass.HEAD_LOST, FailureClass.WORKER_LOST})


@dataclass(frozen=True)
class Cadence:
    """How often: by steps, by minutes, or (with neither) as the measured cost and the failures so far make it best."""

    every_steps: int | None = None
    every_minutes: float | None = None
    seconds_between_failures: float = DAY

    def seconds(self, blocked: float | None) -> float | None:
        """Seconds from one save to the next; None if steps decide."""
        if self.every_steps is not None:
            return None
        if self.every_minutes is not None:
            return 60 * self.every_minutes
        cost = ASSUMED_BLOCKED_SECONDS if blocked is None else max(blocked, LEAST_BLOCKED_SECONDS)
        return best_interval(cost, self.seconds_between_failures)


def best_interval(blocked: float, seconds_between_failures: float) -> float:
    """The interval that loses least, to saving and to redone work together (Young 1974)."""
    return math.sqrt(2 * blocked * seconds_between_failures)


def seconds_between_failures(claims: Sequence[Claim], now: datetime) -> float:
    """Mean time between the starts of a run, with one a day assumed before there is evidence.

    A suspend or a drain is counted as well: too short an interval is the cheaper mistake.
    """
    lived = (now - min(claim.start_time for claim in claims)).total_seconds() if claims else 0.0
    return (DAY + max(lived, 0.0)) / max(len(claims), 1)


class Saver:
    """The saves of one group start. `votes` is this rank's own; all else is collective."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        cadence: Cadence,
        *,
        max_failures: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.checkpointer = checkpointer
        self.cadence = cadence
        self.max_failures = max_failures
        self.failures = 0
        self.failure: TrainerError | None = None
        self.blocked: float | None = None
        self._clock = clock
        self._last = clock()
        self._all_saved = False
        self._time_is_up = False

    def votes(self) -> list[float]:
        """What a step's reduction sums up: whether this rank is still saving, and whether rank 0's clock says save."""
        interval = self.cadence.seconds(self.blocked)
        due = interval is not None and self.checkpointer.place.is_first and self._clock() - self._last >= interval
        return [float(self.checkpointer.saving), float(due)]

    def heard(self, saving: float, due: float) -> None:
        """Take the sums of all ranks' votes."""
        self._all_saved = self.checkpointer.pending and saving == 0
        self._time_is_up = due > 0

    @property
    def settleable(self) -> bool:
        """Whether a save has ended on every rank and nobody has asked how."""
        return self._all_saved

    def due(self, step: int) -> bool:
        """Whether to save after this step."""
        if self.cadence.every_steps is not None:
            return step % self.cadence.every_steps == 0
        return self._time_is_up and not self.checkpointer.pending

    def save(self, shards: Shards, point: Point) -> None:
        """Begin a save, once the one before it has ended.

        Raises:
            TrainerError: see `settle`.
        """
        begin = self._clock()
        if self.checkpointer.pending:
            self.settle()
        self.checkpointer.start(shards, point)
        self._last = self._clock()
        self.blocked = self._last - begin

    def save_now(self, shards: Shards, point: Point) -> None:
        """Save, and return when it is committed: there may be no later.

        Raises:
            TrainerError: see `settle`.
        """
        self.save(shards, point)
        while not self.settle():
            self.save(shards, point)

    def settle(self) -> bool:
        """Wait for the end of the save that is on its way; whether it was committed.

        Raises:
            TrainerError: HeadLost if this start was superseded; StorageDenied or Unknown after `max_failures` failures in a row.
        """
        outcome = self.checkpointer.settle()
        self._all_saved = False
        if not isinstance(outcome, TrainerError):
            self.failures, self.failure = 0, None
            return True
        if outcome.failure_class in _FINAL:
            raise outcome
        self.failures, self.failure = self.failures + 1, outcome
        log.warning("save %d of at most %d that fail in a row: %s", self.failures, self.max_failures, outcome)
        if self.failures >= self.max_failures:
            denied = outcome.failure_class is FailureClass.STORAGE_DENIED
            raise TrainerError(
                FailureClass.STORAGE_DENIED if denied else FailureClass.UNKNOWN,
                f"checkpoints failed {self.failures} times in a row; the last: {outcome.message}",
                outcome.remedy,
            )
        return False

    def report(self, prefix: str) -> Checkpoints:
        """What status shows."""
        interval = self.cadence.seconds(self.blocked)
        return self.checkpointer.references(prefix).model_copy(
            update={
                "blocked_seconds": None if self.blocked is None else round(self.blocked, 3),
                "interval_seconds": None if interval is None else round(interval, 1),
                "failures": self.failures or None,
                "failure": str(self.failure)[:1024] if self.failure else None,
            }
        )
