"""What keeps looking: workers that take keys from the queue, and a resync that puts all of them in again.

The watch is a hint, never the truth: what a watch missed, the next resync repairs.
"""

import asyncio
import contextlib
import logging
import random

from dsft_operator.ports import Key, Kube, KubeError
from dsft_operator.runtime.health import Health
from dsft_operator.runtime.logs import about
from dsft_operator.runtime.reconciler import Reconciler
from dsft_operator.runtime.workqueue import WorkQueue

log = logging.getLogger(__name__)

PASS_SECONDS = 120.0


async def work(queue: WorkQueue, reconciler: Reconciler) -> None:
    """Take keys and reconcile them, until cancelled. A pass that fails comes back with backoff."""
    while True:
        # The queue brings a key back whose pass raised; what it raised was logged in the pass, and is no reason to end.
        with contextlib.suppress(Exception):
            async with queue.next() as key:
                pause = await _pass(reconciler, key)
                if pause is not None:
                    queue.add_after(key, pause)


async def _pass(reconciler: Reconciler, key: Key) -> float | None:
    with about(key):
        try:
            async with asyncio.timeout(PASS_SECONDS):
                return await reconciler.reconcile(key)
        except KubeError as error:
            log.warning("%s", error)
            raise
        except Exception:
            log.exception("a pass failed")
            raise


async def resync(
    queue: WorkQueue, kube: Kube, health: Health, reconciler: Reconciler, seconds: float, chance: random.Random
) -> None:
    """Put every resource into the queue, now and then, until cancelled; also those that were known and are gone."""
    while True:
        try:
            versions = await kube.runs()
        except KubeError as error:
            log.warning("resources cannot be listed: %s", error)
            await asyncio.sleep(min(seconds, 10.0))
            continue
        health.listed(versions)
        for key in versions.keys() | reconciler.known:
            queue.add(key)
        await asyncio.sleep(seconds * chance.uniform(0.8, 1.2))
