"""The stand-in's loop: two watches say which RayCluster to look at, one worker looks.

A watch only names keys; every round reads anew. A cluster is never in two rounds at once, since there is one worker.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from kubernetes.client import ApiClient
from kubernetes.dynamic.exceptions import DynamicApiError
from urllib3.exceptions import HTTPError

from tests.cluster.kuberay import pods, rounds
from tests.cluster.kuberay.api import CLUSTERS, CORE, Api

Key = tuple[str, str]
_FAILURES = (DynamicApiError, HTTPError, OSError)
_RETRY_SECONDS = 1.0

log = logging.getLogger("kuberay-standin")


class Queue:
    """Keys with the time at which each is due. A key that is woken twice is there once, at the earlier time."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._changed = threading.Condition()
        self.closed = False

    def wake(self, key: Key, after: float = 0.0) -> None:
        with self._changed:
            at = time.monotonic() + after
            self._due[key] = min(at, self._due.get(key, at))
            self._changed.notify()

    def take(self) -> Key | None:
        """The next key that is due; None once the queue is closed."""
        with self._changed:
            while not self.closed:
                now = time.monotonic()
                key = min(self._due, key=self._due.__getitem__, default=None)
                if key is not None and self._due[key] <= now:
                    del self._due[key]
                    return key
                self._changed.wait(self._due[key] - now if key is not None else None)
            return None

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify()


class Standin:
    """The controller. `mark_ready` says at which address a pod is ready, where no kubelet runs; None: not yet."""

    def __init__(self, client: ApiClient, mark_ready: Callable[[dict[str, Any]], str | None] | None = None) -> None:
        self._api = Api(client)
        self._mark_ready = mark_ready
        self._queue = Queue()

    def run(self) -> None:
        """Work until `stop`. The watches are daemon threads: they end with the process, or at their next event."""
        selector = "=".join(pods.CREATED_BY)
        for path, labels, key in (
            (f"{CLUSTERS}/rayclusters", None, _key_of_cluster),
            (f"{CORE}/pods", selector, _key_of_pod),
        ):
            threading.Thread(target=self._follow, args=(path, labels, key), daemon=True).start()
        while key := self._queue.take():
            self._round(key)

    def stop(self) -> None:
        self._queue.close()

    def _round(self, key: Key) -> None:
        try:
            again = rounds.reconcile(self._api, *key, self._mark_ready)
        except _FAILURES as failure:
            log.warning("round of %s/%s failed: %s", *key, failure)
            again = _RETRY_SECONDS
        if again is not None:
            self._queue.wake(key, again)

    def _follow(self, path: str, labels: str | None, key: Callable[[dict[str, Any]], Key]) -> None:
        """Watch for ever. Each new stream begins with every object, so nothing is missed between two streams."""
        retry = threading.Event()
        while not self._queue.closed:
            try:
                for found in self._api.watch(path, labels):
                    self._queue.wake(key(found))
            except _FAILURES as failure:
                log.warning("watch of %s ended: %s", path, failure)
                retry.wait(_RETRY_SECONDS)


def _key_of_cluster(cluster: dict[str, Any]) -> Key:
    return cluster["metadata"]["namespace"], cluster["metadata"]["name"]


def _key_of_pod(pod: dict[str, Any]) -> Key:
    return pod["metadata"]["namespace"], pod["metadata"]["labels"].get(pods.CLUSTER, "")
