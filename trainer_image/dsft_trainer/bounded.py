"""Work that must not hold up the end of a process: a dead NFS server answers nobody, and raises nothing."""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


def within(seconds: float, action: Callable[[], T]) -> T | None:
    """The action's result; None where it raised, or is not done in so many seconds (then it goes on in a daemon thread)."""
    results: list[T] = []

    def act() -> None:
        try:
            results.append(action())
        except Exception as error:  # noqa: BLE001  what is told instead matters more
            log.warning("left undone: %s", error)

    thread = threading.Thread(target=act, name="bounded", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
