"""One at a time: what starts, ends or fills the machine's cluster holds this lock. The kernel gives it back at our death."""

import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.node_layout import FOLDERS

_SECONDS = 3600.0


@contextmanager
def only_one() -> Iterator[None]:
    """Wait for the lock and hold it.

    Raises:
        TimeoutError: another process does not let go of it.
    """
    FOLDERS.lock.parent.mkdir(parents=True, exist_ok=True)
    with FOLDERS.lock.open("w") as lock:
        deadline, waiting = time.monotonic() + _SECONDS, False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {FOLDERS.lock}") from None
                if not waiting:
                    print("tests.cluster: waiting for another process", file=sys.stderr, flush=True)
                waiting = True
                time.sleep(0.2)
        yield
