"""One of several replicas acts. A Lease says which: its holder renews it, a standby takes it when it was not renewed in time.

After client-go's leaderelection: no clock is compared with another machine's, only how long an unchanged Lease was looked
at. A holder stops acting well before a standby may begin, and each action asks `leads` first: a process that was frozen and
goes on finds that its time is over. What was under way at that moment is harmless by resourceVersions, uids and fixed names.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace

from prometheus_client import Gauge

from dsft_operator.config import LeaderElection
from dsft_operator.ports import Conflict, KubeError, Lease, Leases

log = logging.getLogger(__name__)

LEADER = Gauge("dsft_leader", "1 if this replica is the one that acts.")
RELEASE_SECONDS = 3.0
CONFLICTS = 3


class Elector:
    """Candidate for a Lease, and its holder. For one event loop; `clock` is monotonic."""

    def __init__(
        self,
        leases: Leases,
        identity: str,
        settings: LeaderElection,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        self._leases = leases
        self._identity = identity
        self._settings = settings
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311  jitter, no secret
        # The Lease as it was last seen, and since when it is so.
        self._lease: Lease | None = None
        self._unchanged_since = -math.inf
        self._read_next = True
        self._leads_until = -math.inf

    def leads(self) -> bool:
        """Whether this replica may act now."""
        return self._left() > 0

    def _left(self) -> float:
        """Seconds of this replica's time, unless it is renewed; none if it is over."""
        return max(0.0, self._leads_until - self._clock())

    async def acquire(self) -> None:
        """Stand by until this replica leads."""
        while not await self.attempt():
            # Not later than the moment at which the Lease may be taken.
            left = self._unchanged_since + self._lease.seconds - self._clock() if self._lease else math.inf
            pause = self._settings.retry_seconds * self._chance.uniform(0.8, 1.2)
            await asyncio.sleep(min(pause, left) if left > 0 else pause)
        log.info("this replica leads", extra={"identity": self._identity})

    async def keep(self) -> None:
        """Renew the Lease for as long as that goes; returns when this replica does not lead any more."""
        while True:
            await asyncio.sleep(min(self._settings.retry_seconds, self._left()))
            # A time that is over is not made longer: another replica may have led since, and what began before must end first.
            if not self.leads():
                break
            await self.attempt()
        log.warning("this replica does not lead any more", extra={"identity": self._identity})

    async def release(self) -> None:
        """Give the Lease back, so that a standby need not wait for its end. To be called when nothing acts any more."""
        self._leads_until = -math.inf
        if self._lease is None:
            return
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                # Anew: a renewal may have been under way when it was cancelled.
                lease = await self._leases.read()
                if lease is not None and lease.holder == self._identity:
                    await self._leases.write(replace(lease, holder="", seconds=1))
        except (TimeoutError, Conflict, KubeError) as error:
            log.info("the Lease was not given back: %s", error)

    async def attempt(self) -> bool:
        """Take or renew the Lease, or see who has it; whether this replica leads."""
        try:
            # Two tries before the time is over: one connection that hangs must not end it. A leader waits for no answer longer
            # than its time lasts: what acts must be ended before a standby may begin.
            patience = self._settings.renew_seconds / 2
            async with asyncio.timeout(min(patience, self._left()) if self.leads() else patience):
                began = await self._claim_or_look()
        except (Conflict, TimeoutError, KubeError) as error:
            log.info("the Lease cannot be had: %s", str(error) or "no answer in time")
            self._read_next = True
            return False
        if began is None:
            self._leads_until = -math.inf
            return False
        self._leads_until = began + self._settings.renew_seconds
        return True

    async def _claim_or_look(self) -> float | None:
        """When the request began that made the Lease ours; None if another replica has it."""
        if self._read_next or not self.leads():
            self._look(await self._leases.read())
            self._read_next = False
        for _ in range(CONFLICTS):
            if self._is_held():
                return None
            # Before the request: the API server notes it later, and so does a standby.
            began = self._clock()
            try:
                self._look(await self._leases.write(self._claim()))
            except Conflict:
                # At once: whoever was first may lead already.
                self._look(await self._leases.read())
                continue
            return began
        raise Conflict("others change it again and again")

    def _look(self, lease: Lease | None) -> None:
        if lease is None and self._lease is not None and self._lease.holder not in ("", self._identity):
            # Deleted, while its holder may still act: its time counts from now.
            lease = replace(self._lease, version="")
        if lease is None or self._lease is None or lease.version != self._lease.version:
            self._unchanged_since = self._clock()
        self._lease = lease

    def _is_held(self) -> bool:
        """By another replica, whose time is not over."""
        lease = self._lease
        if lease is None or lease.holder in ("", self._identity):
            return False
        return self._clock() < self._unchanged_since + lease.seconds

    def _claim(self) -> Lease:
        seconds, lease = self._settings.lease_seconds, self._lease
        if lease is None:
            return Lease(holder=self._identity, seconds=seconds)
        is_new = lease.holder != self._identity
        return replace(
            lease,
            holder=self._identity,
            seconds=seconds,
            transitions=lease.transitions + is_new,
            acquired=None if is_new else lease.acquired,
        )
