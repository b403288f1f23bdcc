"""Kueue's Workloads from the API server: the one of a RayCluster, and who waits beside it.

The line of a namespace is the same for all its runs, and only a courtesy: it is listed once in a few seconds.
"""

# The kubernetes client is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import asyncio
from dataclasses import replace
from typing import Any, cast

from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException

from dsft_operator.adapters import kueue
from dsft_operator.adapters.answers import SILENCE, refused
from dsft_operator.adapters.kueue import Waiter
from dsft_operator.core.observed import Queueing
from dsft_operator.ports import KubeError

TIMEOUT_SECONDS = 20.0
LINE_SECONDS = 5.0
# In a longer line nobody is told a place.
MAX_WAITING = 500


class Workloads:
    """What Kueue says about RayClusters."""

    def __init__(self, api: client.ApiClient) -> None:
        self._objects = client.CustomObjectsApi(api)
        self._lines: dict[str, tuple[float, tuple[Waiter, ...]]] = {}

    async def queueing(self, namespace: str, cluster_uid: str) -> Queueing | None:
        """What it says about one; None if it has not looked at it yet. Raises KubeError."""
        selector = f"{kueue.JOB_UID_LABEL}={cluster_uid}"
        for version in kueue.VERSIONS:
            try:
                listed = await self._list(namespace, version, label_selector=selector)
            except ApiException as error:
                if error.status != 404:
                    raise refused(error) from error
                continue
            except SILENCE as error:
                raise KubeError(f"the API server did not answer: {error!r}") from error
            if not listed["items"]:
                return None
            workload: dict[str, Any] = listed["items"][0]
            place = (
                await self._place(namespace, version, kueue.waiter_of(workload)) if kueue.in_line(workload) else None
            )
            return replace(kueue.queueing_of(workload), place=place)
        return kueue.MISSING

    async def _place(self, namespace: str, version: str, one: Waiter) -> tuple[int, int] | None:
        """Which one it is of how many; None where that cannot be told."""
        now = asyncio.get_running_loop().time()
        self._lines = {name: known for name, known in self._lines.items() if now - known[0] < LINE_SECONDS}
        # One that has just come is not in a line of a moment ago.
        if one not in self._lines.get(namespace, (now, ()))[1]:
            self._lines[namespace] = now, await self._waiting(namespace, version)
        return kueue.place_of(one, self._lines[namespace][1])

    async def _waiting(self, namespace: str, version: str) -> tuple[Waiter, ...]:
        try:
            listed = await self._list(namespace, version, field_selector=kueue.WITHOUT_QUOTA, limit=MAX_WAITING)
        except (ApiException, *SILENCE):
            return ()
        return () if listed["metadata"].get("continue") else kueue.waiters_of(listed["items"])

    async def _list(self, namespace: str, version: str, **options: Any) -> dict[str, Any]:
        listed = await self._objects.list_namespaced_custom_object(
            kueue.GROUP, version, namespace, "workloads", _request_timeout=TIMEOUT_SECONDS, **options
        )
        return cast("dict[str, Any]", listed)
