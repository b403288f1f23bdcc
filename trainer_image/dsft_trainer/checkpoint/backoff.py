"""Pauses before another try, with jitter.

The jitter comes from the operating system: Python's own generator belongs to the training, and its position is part of a
checkpoint. A number drawn by a thread that uploads would change what the next start draws.
"""

import random
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from dsft_api.conditions import FailureClass
from dsft_trainer.errors import failure_of

T = TypeVar("T")

_CHANCE = random.SystemRandom()
_TRIES = 3
_LONGEST_SECONDS = 15.0
# Nothing that waiting could change: another start owns the run, or a rank is gone.
_FINAL = frozenset({FailureClass.HEAD_LOST, FailureClass.WORKER_LOST})


def jittered(attempt: int, longest: float, first: float = 1.0) -> float:
    """Seconds to wait after the try number `attempt` (from 1) failed: twice as many each time, at most `longest`."""
    return _CHANCE.uniform(0.5, 1.0) * min(first * 2 ** (attempt - 1), longest)


def wait(longest: float) -> Callable[[RetryCallState], float]:
    """The same, for tenacity."""
    return lambda state: jittered(state.attempt_number, longest)


def patiently(action: Callable[[], T]) -> T:
    """Try an action a few times, with growing pauses; the last failure is raised.

    On top of what a store does for each request: it outlasts a full disk, a key that is just renewed, or an outage of minutes.
    """
    return Retrying(
        retry=retry_if_exception(lambda error: failure_of(error).failure_class not in _FINAL),
        wait=wait(_LONGEST_SECONDS),
        stop=stop_after_attempt(_TRIES),
        reraise=True,
    )(action)
