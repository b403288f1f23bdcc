"""How the operator is: what /healthz judges by. A process that answers and does nothing is the failure to fear.

Three signs of life: the event loop turns in time, all runs were listed a while ago at most, and the watch has told what the
list shows. Kopf never says that a watch has gone silent, so each list is compared with what the watch delivered.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Gauge

from dsft_operator.ports import Key

BEAT_SECONDS = 1.0
MAX_LAG_SECONDS = 10.0
# In resync intervals: how old the last good list may be, and for how long a watch may not have told what is in it.
MAX_RESYNC_AGE = 3
MAX_WATCH_LAG = 2

LOOP_LAG = Gauge("dsft_event_loop_lag_seconds", "How late the event loop was at its last beat.")
WATCH_LAG = Gauge("dsft_watch_lag_seconds", "For how long the watch has not told of a change that a list has shown.")


class Health:
    """Signs of life, and what is wrong by them. For one event loop; `clock` is monotonic."""

    def __init__(
        self,
        resync_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        beat_seconds: float = BEAT_SECONDS,
        max_lag_seconds: float = MAX_LAG_SECONDS,
    ) -> None:
        self._resync_seconds = resync_seconds
        self._clock = clock
        self._beat_seconds = beat_seconds
        self._max_lag_seconds = max_lag_seconds
        self._lag = 0.0
        self._listed_at = clock()
        self._heard: dict[Key, int] = {}
        # Versions that were listed and not heard of, and since when.
        self._missed: dict[Key, tuple[int, float]] = {}

    async def beat(self) -> None:
        """Measure the event loop's lag, until cancelled."""
        while True:
            before = self._clock()
            await asyncio.sleep(self._beat_seconds)
            self._lag = self._clock() - before - self._beat_seconds
            LOOP_LAG.set(self._lag)
            WATCH_LAG.set(self._watch_lag())

    def heard(self, key: Key, version: str) -> None:
        """The watch told of a run at this resourceVersion."""
        number = _number(version)
        self._heard[key] = max(number, self._heard.get(key, 0))
        if key in self._missed and self._missed[key][0] <= number:
            del self._missed[key]

    def listed(self, versions: Mapping[Key, str]) -> None:
        """All runs were listed, with their resourceVersions."""
        now = self._listed_at = self._clock()
        for key, version in versions.items():
            if self._heard.get(key, 0) < _number(version):
                self._missed.setdefault(key, (_number(version), now))
        for book in (self._heard, self._missed):
            for key in book.keys() - versions.keys():
                del book[key]

    def problems(self) -> Iterator[str]:
        """What is wrong, in words; nothing if all is well."""
        if self._lag > self._max_lag_seconds:
            yield f"the event loop came {self._lag:.1f} s late"
        age = self._clock() - self._listed_at
        if age > MAX_RESYNC_AGE * self._resync_seconds:
            yield f"runs were not listed for {age:.0f} s"
        if self._watch_lag() > MAX_WATCH_LAG * self._resync_seconds:
            yield f"the watch has not told for {self._watch_lag():.0f} s what a list has shown"

    def _watch_lag(self) -> float:
        now = self._clock()
        return max((now - since for _, since in self._missed.values()), default=0.0)


def _number(version: str) -> int:
    """A resourceVersion, which Kubernetes lets clients compare as a number. What is none cannot be missed."""
    return int(version) if version.isdecimal() else 0
