"""The Lease of the replicas on the API server."""

# The kubernetes client is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from datetime import UTC, datetime
from typing import Any, cast

from kubernetes.aio import client

from dsft_operator.adapters.answers import done, found
from dsft_operator.ports import Lease


class KubeLeases:
    """`ports.Leases` on one ApiClient."""

    def __init__(self, api: client.ApiClient, namespace: str, name: str, request_seconds: float) -> None:
        self._api = client.CoordinationV1Api(api)
        self._namespace = namespace
        self._name = name
        self._seconds = request_seconds

    async def read(self) -> Lease | None:
        raw = await found(self._api.read_namespaced_lease(self._name, self._namespace, _request_timeout=self._seconds))
        return None if raw is None else _lease_of(raw)

    async def write(self, lease: Lease) -> Lease:
        now = datetime.now(UTC)
        body: dict[str, Any] = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": lease.holder,
                "leaseDurationSeconds": int(lease.seconds),
                "leaseTransitions": lease.transitions,
                "acquireTime": _micro_time(lease.acquired or now),
                "renewTime": _micro_time(now),
            },
        }
        if not lease.version:
            call = self._api.create_namespaced_lease(self._namespace, cast("Any", body), _request_timeout=self._seconds)
        else:
            body["metadata"]["resourceVersion"] = lease.version
            call = self._api.replace_namespaced_lease(
                self._name, self._namespace, cast("Any", body), _request_timeout=self._seconds
            )
        return _lease_of(await done(call))


def _lease_of(raw: client.V1Lease) -> Lease:
    spec = raw.spec or client.V1LeaseSpec()
    return Lease(
        holder=spec.holder_identity or "",
        seconds=spec.lease_duration_seconds or 0,
        transitions=spec.lease_transitions or 0,
        acquired=spec.acquire_time,
        version=cast("Any", raw.metadata).resource_version,
    )


def _micro_time(moment: datetime) -> str:
    """As Kubernetes' MicroTime wants it: six digits, always."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
