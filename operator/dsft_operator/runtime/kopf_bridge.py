"""Kopf as the source of events: the only importer of kopf. A handler adds a key to the queue; that of pods also notes ends.

Kopf here writes nothing: no annotations, no finalizers, no progress. It ends at errors that a watch should outlive, so it is
started again, with a pause, for as long as the operator lives. It has a thread of its own, since in a loop that it shares it
takes the signals, and at its end cancels all that began after it.
"""

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import kopf

from dsft_api import KIND
from dsft_operator.adapters.reading import pod_of
from dsft_operator.config import OperatorConfig
from dsft_operator.core import naming
from dsft_operator.core.observed import Ended
from dsft_operator.ports import Key
from dsft_operator.runtime.health import Health
from dsft_operator.runtime.workqueue import WorkQueue

log = logging.getLogger(__name__)

RESTART_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
TOKEN_AGE = timedelta(minutes=10)
SELECTOR = {naming.GROUP_LABEL: naming.MANAGED_BY}
# It warns, each time, that it does not take the signals.
logging.getLogger("kopf._core.reactor.running").addFilter(lambda record: "OS signals" not in str(record.msg))
Json = Mapping[str, Any]
Note = Callable[[Key, tuple[Ended, ...]], None]


class _EndlessBackoff:
    """Kopf gives up after the last pause of its list: this list has no last one."""

    def __iter__(self) -> Iterator[float]:
        yield from (1, 1, 2, 3, 5, 8, 13, 21)
        while True:
            yield 30


class EventSource:
    """Feeds a queue from watches, and says how they are."""

    def __init__(
        self, config: OperatorConfig, queue: WorkQueue, health: Health, note: Note, *, with_kuberay: bool
    ) -> None:
        self._config = config
        self._queue = queue
        self._health = health
        self._note = note
        self._with_kuberay = with_kuberay
        self.is_watching = False

    async def run(self) -> None:
        """Watch until cancelled."""
        pauses = iter(RESTART_SECONDS)
        pause = next(pauses)
        loop = asyncio.get_running_loop()
        while True:
            began, stop = loop.time(), threading.Event()
            self.is_watching = True
            thread = asyncio.create_task(asyncio.to_thread(self._watch, loop, stop))
            try:
                # A thread cannot be cancelled: it is asked to end, and waited for.
                await asyncio.shield(thread)
                log.warning("the watches ended; starting them again")
            except Exception:
                log.exception("the watches failed; starting them again")
            finally:
                self.is_watching = False
                stop.set()
                await asyncio.gather(thread, return_exceptions=True)
            if loop.time() - began > RESTART_SECONDS[-1]:
                pauses = iter(RESTART_SECONDS)
            pause = next(pauses, pause)
            await asyncio.sleep(pause)

    def _watch(self, loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
        """Kopf, in this thread, until it fails or is stopped."""
        asyncio.run(self._operate(loop.call_soon_threadsafe, stop))

    async def _operate(self, hand_over: Callable[..., object], stop: threading.Event) -> None:
        namespaces = self._config.watch_namespaces
        try:
            await kopf.operator(
                registry=self._registry(hand_over),
                settings=_settings(),
                clusterwide=not namespaces,
                namespaces=namespaces,
                standalone=True,
                stop_flag=stop,
            )
        finally:
            # Kopf waits for it in one more thread, which would keep this one from ending.
            stop.set()

    def _registry(self, hand_over: Callable[..., object]) -> kopf.OperatorRegistry:
        """Handlers that have the operator's loop do the work."""
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(_login)
        queue, health, note = self._queue, self._health, self._note

        @kopf.on.event("dsft.dev", "v1alpha1", "deepspeedfinetunes", registry=registry)
        async def on_run(namespace: str | None, name: str | None, meta: Json, **_: Any) -> None:
            if namespace and name:
                hand_over(health.heard, Key(namespace, name), meta.get("resourceVersion", ""))
                hand_over(queue.add, Key(namespace, name))

        async def on_part(namespace: str | None, labels: Json, meta: Json, **_: Any) -> None:
            name = run_name(labels, meta)
            if namespace and name:
                hand_over(queue.add, Key(namespace, name))

        @kopf.on.event("pods", labels=SELECTOR, registry=registry)
        async def on_pod(namespace: str | None, labels: Json, meta: Json, body: Json, **_: Any) -> None:
            await on_part(namespace, labels, meta)
            name = run_name(labels, meta)
            if namespace and name and "ray.io/cluster" in labels:
                # KubeRay deletes a failed pod at once: the pass that this brings may come too late to see it.
                hand_over(note, Key(namespace, name), pod_of(body).ended)

        if self._with_kuberay:
            kopf.on.event("ray.io", "v1", "rayclusters", labels=SELECTOR, registry=registry)(on_part)
        return registry


def run_name(labels: Json, meta: Json) -> str | None:
    """The run that a RayCluster or pod belongs to: by its controller, else by our label."""
    for owner in meta.get("ownerReferences") or ():
        if owner.get("controller") and owner.get("kind") == KIND:
            return owner.get("name")
    return labels.get(naming.RUN_LABEL)


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """As a pod, with a token that is read again before it is too old; else by the kubeconfig."""
    pod = kopf.login_with_service_account(**kwargs)
    if pod is not None:
        return dataclasses.replace(pod, expiration=datetime.now(UTC) + TOKEN_AGE)
    return kopf.login_with_kubeconfig(**kwargs)


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.watching.server_timeout = 290
    settings.watching.client_timeout = 300
    # By the API server: else every pod of the cluster would come through here.
    for resource in ("pods", "rayclusters"):
        settings.watching.label_selectors[resource] = ",".join(f"{name}={value}" for name, value in SELECTOR.items())
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = _EndlessBackoff()  # pyright: ignore[reportAttributeAccessIssue]
    # Not ours: Kopf takes its finalizer off whatever none of its handlers would block.
    settings.persistence.finalizer = "dsft.dev/unused"
    # It would kill the process, which is not its own.
    settings.process.ultimate_exiting_timeout = None
    return settings
