"""Ends a rank that makes no progress: a hung collective raises nothing, so somebody must watch the clock.

Every finished micro-step, evaluation batch and save is a beat. After `limit` seconds without one the stacks of all threads
go to the log, the launcher is told, and the process exits with code 7.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from dsft_api.conditions import FailureClass
from dsft_trainer.errors import TrainerError


class Watchdog:
    """Watches one rank; a context manager around everything that may hang."""

    def __init__(self, limit: float, report: Callable[[TrainerError], None]) -> None:
        self._limit = limit
        self._report = report
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something was finished."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._limit / 10)):
            if time.monotonic() - self._last > self._limit:
                break
        else:
            return
        faulthandler.dump_traceback(sys.stderr)
        self._report(
            TrainerError(FailureClass.HANG, f"no step, save or evaluation batch finished in {self._limit:.0f} s")
        )
        # The main thread is stuck in a collective: no exception would reach it.
        os._exit(FailureClass.HANG.failure.exit_code)
