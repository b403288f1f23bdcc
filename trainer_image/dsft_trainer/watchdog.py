"""Ends a rank that makes no progress: a hung collective raises nothing, so somebody must watch the clock.

Every finished micro-step, evaluation batch and save is a beat. Without one for `stallSeconds`, or for as long as 20 steps take if
that is more, the stacks of all threads go to the log and to storage, the launcher is told, and the process exits with code 7.

Some work tells nothing of its progress, and is of one rank while the others wait for it: the model is fetched, data becomes
tokens, the result is exported. There the limit is a day (`patient`). A rank that dies is noticed by its launcher, as always.

When one rank hangs, its peers wait for it in a collective, and each one's watchdog fires: each archives its own stacks. A rank
that was stopped as a whole (SIGSTOP, a frozen container) cannot.
"""

import faulthandler
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError
from dsft_trainer.progress import Pace

log = logging.getLogger(__name__)

STEPS = 20
"""So many times the median step must pass: steps of minutes are no hang."""
LONG_SECONDS = 86400.0
"""For work that nobody can say how long it may take."""
MARGIN_SECONDS = 60.0
"""Collectives give up so long after the watchdog, which knows more."""
ARCHIVE_SECONDS = 15.0
"""How long storage may take the stacks; the hang is told without them otherwise."""
PEERS_SECONDS = 5.0
"""How long a rank stays when it is done: the launcher ends its peers with it, whose watchdogs fire about now."""


class Watchdog:
    """Watches one rank; a context manager around everything that may hang."""

    def __init__(
        self,
        stall_seconds: float,
        hung: Callable[[float], None],
        outlast: Callable[[float], None],
        leave: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hung` archives and reports, after so many seconds; `outlast` has collectives wait for at least so many."""
        self.pace: Pace | None = None
        """The steps to compare with, once there are any."""
        self._stall_seconds = stall_seconds
        self._least = stall_seconds
        self._allowed = stall_seconds
        self._clock = clock
        self._hung = hung
        self.outlast = outlast
        """Replaced once there is a group of DeepSpeed's, too."""
        self._leave = leave
        self._last = clock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something was finished."""
        self._last = self._clock()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """While one rank does what may take hours, and the others wait for it in a collective. Every rank calls it."""
        self._allow(LONG_SECONDS)
        self._least = LONG_SECONDS
        try:
            yield
        finally:
            self.beat()
            self._least = self._stall_seconds
            self._allow(self._stall_seconds)

    def _allow(self, seconds: float) -> None:
        """Have collectives wait at least so long."""
        self._allowed = seconds
        self.outlast(seconds + MARGIN_SECONDS)

    @property
    def limit(self) -> float:
        """Seconds without a beat that are a hang."""
        median = self.pace.median_step if self.pace is not None else None
        return max(self._least, STEPS * (median or 0.0))

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._stall_seconds / 10)):
            limit = self.limit
            if limit > self._allowed:
                # Doubled, so that it is not told anew for each step that is slower than the one before.
                with suppress(Exception):  # whatever becomes of it, this thread must go on watching
                    self._allow(2 * limit)
            if self._clock() - self._last > limit:
                break
        else:
            return
        try:
            self._hung(self.limit)
            self._stop.wait(PEERS_SECONDS)
        finally:
            # The main thread is stuck in a collective: no exception would reach it.
            self._leave(FailureClass.HANG.failure.exit_code)


def hang(limit: float) -> TrainerError:
    """Nothing finished for so many seconds."""
    return TrainerError(FailureClass.HANG, f"no step, save or evaluation batch finished in {limit:.0f} s")


def archived_stacks(store: Store, key: str, limit: float) -> TrainerError:
    """Put the stacks of all threads of this process into the log and into storage; the failure that says where they are."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        stacks = file.read()
    sys.stderr.write(stacks.decode(errors="replace"))
    sys.stderr.flush()
    what = hang(limit).message
    folder = f"{store.uri}/{key.rpartition('/')[0]}"
    try:
        store.put_bytes(key, stacks)
    except Exception as error:  # noqa: BLE001  whatever storage does, the hang must end
        log.warning("%s could not be written: %s", key, error)
        return TrainerError(FailureClass.HANG, f"{what}; stacks are in the log")
    elsewhere = "a rank without such a file was stopped as a whole"
    failure = TrainerError(FailureClass.HANG, f"{what}; stacks are in {folder}/stacks-rank-*: {elsewhere}")
    failure.evidence = f"{store.uri}/{key}"
    return failure
