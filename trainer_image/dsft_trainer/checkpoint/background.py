"""One piece of work on a thread of its own, while training goes on.

A daemon thread, so that a save that hangs on its storage does not keep a failed process from ending.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from dsft_trainer.errors import TrainerError, failure_of

T = TypeVar("T")


class Task(Generic[T]):
    """Work that began when this was made; it ends with a value or a TrainerError."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self.name = name
        self._work = work
        self._outcome: T | TrainerError | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it ended, or so long at most; whether it has."""
        self._thread.join(seconds)
        return not self.running

    def outcome(self) -> T | TrainerError:
        """Its value or its failure, once it ended; waits for that."""
        self._thread.join()
        return self._outcome  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self._outcome = self._work()
        except Exception as error:  # noqa: BLE001  it is the outcome, for whoever waits to judge
            cause = failure_of(error)
            # A plain one: it will travel to other ranks, and subclasses need not survive pickling.
            self._outcome = TrainerError(cause.failure_class, cause.message, cause.remedy)
