"""A queue of keys: each key is in it once, and is worked on by one worker at a time.

A key that is added while it is worked on comes back afterwards; one that failed comes back later and later. After
client-go's workqueue, but that runs of one namespace, which may be slow to look at, do not hold up those of others.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import AsyncGenerator

from prometheus_client import Counter, Histogram

from dsft_operator.ports import Key

FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 300.0
LATENCY = Histogram("dsft_queue_latency_seconds", "From the moment a run is due to the moment a worker takes it.")
RETRIES = Counter("dsft_queue_retries_total", "Passes that failed and are tried again.")


class WorkQueue:
    """Keys to look at, now or at a time. For one event loop."""

    def __init__(self, chance: random.Random | None = None) -> None:
        # By namespace; none is empty.
        self._ready: dict[str, deque[tuple[Key, float]]] = {}
        self._waiting: set[Key] = set()
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._wake = asyncio.Event()
        self._chance = chance or random.Random()  # noqa: S311  jitter, no secret

    def __len__(self) -> int:
        return sum(map(len, self._ready.values()))

    def begin(self) -> None:
        """Workers begin now: how long keys waited for that is not their latency."""
        now = time.monotonic()
        self._ready = {name: deque((key, now) for key, _ in keys) for name, keys in self._ready.items()}

    def add(self, key: Key) -> None:
        """Have a key looked at as soon as possible."""
        self._cancel(key)
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.setdefault(key.namespace, deque()).append((key, time.monotonic()))
            self._wake.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Have a key looked at in some seconds, unless something brings it sooner. The sooner of two times holds."""
        if seconds <= 0:
            self.add(key)
            return
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is None or timer.when() > loop.time() + seconds:
            self._cancel(key)
            self._timers[key] = loop.call_later(seconds, self.add, key)

    @contextlib.asynccontextmanager
    async def next(self) -> AsyncGenerator[Key]:
        """The next key, held until the block is left. A block that raises has the key come back with backoff."""
        while not self._ready:
            self._wake.clear()
            await self._wake.wait()
        key, due = self._take()
        LATENCY.observe(time.monotonic() - due)
        self._waiting.discard(key)
        self._working.add(key)
        # What was planned for later is planned anew by whoever works on it now.
        self._cancel(key)
        try:
            yield key
        except asyncio.CancelledError:
            # Whoever works here next has it before it: what was done of it is not known.
            self._again.add(key)
            self._release(key)
            raise
        except Exception:
            self._release(key)
            self._retry(key)
            raise
        else:
            self._failures.pop(key, None)
            self._release(key)

    def _take(self) -> tuple[Key, float]:
        """The oldest key of the namespace of which the fewest are worked on."""
        busy = Tally(key.namespace for key in self._working)
        namespace = min(self._ready, key=lambda name: (busy[name], self._ready[name][0][1]))
        keys = self._ready[namespace]
        taken = keys.popleft()
        if not keys:
            del self._ready[namespace]
        return taken

    def _release(self, key: Key) -> None:
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _retry(self, key: Key) -> None:
        RETRIES.inc()
        count = self._failures[key] = self._failures.get(key, 0) + 1
        pause = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(count - 1, 16))
        self.add_after(key, pause * self._chance.uniform(0.5, 1.0))

    def _cancel(self, key: Key) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
