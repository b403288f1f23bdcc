"""One round for one RayCluster: read, make or delete what differs, write the status if it changed.

Like KubeRay's reconcile: a round that deletes pods makes none, a failed pod is deleted at once, and pods that still
terminate count as there.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from kubernetes.dynamic.exceptions import ConflictError, DynamicApiError, NotFoundError

from tests.cluster.kuberay import pods, status, validation
from tests.cluster.kuberay.api import CLUSTERS, CORE, Api

Object = dict[str, Any]
SOON = 2.0
IDLE = 300.0


class UnfinishedError(Exception):
    """The round broke off; `failure` is what the condition ReplicaFailure says, if it says anything."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.failure = status.ReplicaFailure(reason, message) if reason else None


class Round:
    """What one round knows: the cluster and its pods, as they were read at its start."""

    def __init__(self, api: Api, cluster: Object) -> None:
        self.api, self.cluster = api, cluster
        self.name, self.namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
        self.core = f"{CORE}/namespaces/{self.namespace}"

    def pods(self) -> list[Object]:
        return self.api.items(f"{self.core}/pods", f"{pods.CLUSTER}={self.name}")

    def event(self, reason: str, message: str, kind: str = "Normal") -> None:
        now = _now()
        involved = {key: self.cluster["metadata"][key] for key in ("name", "namespace", "uid")}
        body = {
            "metadata": {"name": f"{self.name}.{secrets.token_hex(8)}", "namespace": self.namespace},
            "involvedObject": {"apiVersion": "ray.io/v1", "kind": "RayCluster", **involved},
            "reason": reason,
            "message": message[:1024],
            "type": kind,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": "raycluster-controller"},
        }
        self.api.create(f"{self.core}/events", body)


def reconcile(
    api: Api, namespace: str, name: str, mark_ready: Callable[[Object], str | None] | None = None
) -> float | None:
    """Bring one cluster a step further; seconds until the next look, or None when there is nothing to look at.

    `mark_ready` takes the kubelet's place where there is none: the address at which a pod is running and ready; None: not yet.
    """
    try:
        cluster = api.get(f"{CLUSTERS}/namespaces/{namespace}/rayclusters/{name}")
    except NotFoundError:
        return None
    if cluster["metadata"].get("deletionTimestamp"):
        return None  # the garbage collector takes pods, Service and Secret
    if cluster["spec"].get("managedBy", "ray.io/kuberay-operator") != "ray.io/kuberay-operator":
        return None
    this = Round(api, cluster)
    for reason, problem in (
        ("InvalidRayClusterMetadata", validation.metadata_problem(cluster)),
        ("InvalidRayClusterSpec", validation.spec_problem(cluster)),
    ):
        if problem:
            part = "metadata" if reason.endswith("Metadata") else "spec"
            this.event(reason, f"The RayCluster {part} is invalid {namespace}/{name}: {problem}", "Warning")
            return None
    return _run(this, mark_ready)


def _run(this: Round, mark_ready: Callable[[Object], str | None] | None) -> float:
    unfinished: UnfinishedError | None = None
    try:
        _ensure_secret(this)
        _ensure_service(this)
        _reconcile_pods(this)
    except UnfinishedError as stop:
        unfinished = stop
    found = this.pods()
    if mark_ready:
        for pod in found:
            if pod["status"]["phase"] == "Pending" and (address := mark_ready(pod)):
                this.api.merge(f"{this.core}/pods/{pod['metadata']['name']}/status", {"status": _running(pod, address)})
        found = this.pods()
    wrote = _write_status(this, found, unfinished)
    return SOON if wrote or unfinished else IDLE


def _ensure_secret(this: Round) -> None:
    name = pods.auth_secret_name(this.cluster)
    if name and not _exists(this, f"secrets/{name}"):
        this.api.create(f"{this.core}/secrets", pods.auth_secret(this.cluster, secrets.token_urlsafe(32)))


def _ensure_service(this: Round) -> None:
    service = pods.head_service(this.cluster)
    name = service["metadata"]["name"]
    if not _exists(this, f"services/{name}"):
        this.api.create(f"{this.core}/services", service)
        this.event("CreatedService", f"Created service {this.namespace}/{name}")


def _reconcile_pods(this: Round) -> None:
    found = this.pods()
    before = status.suspend_state((this.cluster.get("status") or {}).get("conditions") or [])
    if before == "RayClusterSuspending":
        _delete_all(this, found)
        this.event("DeletedPod", f"Deleted Pods for RayCluster {this.namespace}/{this.name} due to suspension")
        return
    if before or this.cluster["spec"].get("suspend"):
        return
    _reconcile_head(this, [pod for pod in found if _label(pod, pods.NODE_TYPE) == "head"])
    for group in this.cluster["spec"].get("workerGroupSpecs") or []:
        _reconcile_group(this, group, [pod for pod in found if _label(pod, pods.GROUP) == group["groupName"]])


def _reconcile_head(this: Round, heads: list[Object]) -> None:
    if not heads:
        conditions = (this.cluster.get("status") or {}).get("conditions") or []
        provisioned = any(c["type"] == "RayClusterProvisioned" and c["status"] == "True" for c in conditions)
        annotations = this.cluster["metadata"].get("annotations") or {}
        if not (provisioned and annotations.get("ray.io/disable-provisioned-head-restart") == "true"):
            _create_pod(this, "head", pods.head_pod(this.cluster))
        return
    if len(heads) > 1:
        names = " ".join(pod["metadata"]["name"] for pod in heads)
        raise UnfinishedError(f"{len(heads)} head pods found [{names}]. Please delete extra head pods")
    if should_delete(heads[0]):
        _delete_pod(this, "head", heads[0])
        raise UnfinishedError(f"The head Pod {heads[0]['metadata']['name']} was deleted")


def _reconcile_group(this: Round, group: Mapping[str, Any], workers: list[Object]) -> None:
    broken = [pod for pod in workers if should_delete(pod)]
    for pod in broken:
        _delete_pod(this, "worker", pod)
    if broken:
        raise UnfinishedError(f"delete {len(broken)} unhealthy worker Pods")
    named = (group.get("scaleStrategy") or {}).get("workersToDelete") or []
    for pod in [pod for pod in workers if pod["metadata"]["name"] in named]:
        _delete_pod(this, "worker", pod)
    workers = [pod for pod in workers if pod["metadata"]["name"] not in named]
    wanted = status.desired_workers(group)
    used = {_label(pod, pods.REPLICA_INDEX) for pod in workers}
    free = (index for index in range(wanted + len(used)) if str(index) not in used)
    for _ in range(wanted - len(workers)):
        _create_pod(this, "worker", pods.worker_pod(this.cluster, group, next(free)))
    for pod in workers[: max(0, len(workers) - wanted)]:
        _delete_pod(this, "worker", pod)


def should_delete(pod: Mapping[str, Any]) -> bool:
    """Failed, Succeeded, or the Ray container ended and may not restart."""
    phase, spec = pod["status"].get("phase"), pod["spec"]
    if phase in ("Failed", "Succeeded"):
        return True
    return phase == "Running" and spec.get("restartPolicy") == "Never" and _terminated(pod) is not None


def _create_pod(this: Round, node_type: str, body: Object) -> None:
    kind = node_type.title()
    try:
        made = this.api.create(f"{this.core}/pods", body)
    except DynamicApiError as refused:
        message = (
            f"Failed to create {node_type} Pod {this.namespace}/{body['metadata']['generateName']}, {_reason(refused)}"
        )
        this.event(f"FailedToCreate{kind}Pod", message, "Warning")
        raise UnfinishedError(message, f"FailedCreate{kind}Pod") from refused
    this.event(f"Created{kind}Pod", f"Created {node_type} Pod {this.namespace}/{made['metadata']['name']}")


def _delete_pod(this: Round, node_type: str, pod: Object) -> None:
    kind, name = node_type.title(), pod["metadata"]["name"]
    details = (
        f"{node_type} Pod {this.namespace}/{name}; Pod status: {pod['status'].get('phase')}; "
        f"Pod restart policy: {pod['spec'].get('restartPolicy')}; "
        f"Ray container terminated status: {_as_go(_terminated(pod))}"
    )
    try:
        this.api.delete(f"{this.core}/pods/{name}")
    except NotFoundError:
        return
    except DynamicApiError as refused:
        message = f"Failed deleting {details}, {_reason(refused)}"
        this.event(f"FailedToDelete{kind}Pod", message, "Warning")
        raise UnfinishedError(message, f"FailedDelete{kind}Pod") from refused
    this.event(f"Deleted{kind}Pod", f"Deleted {details}")


def _delete_all(this: Round, found: Iterable[Object]) -> None:
    for pod in found:
        if not pod["metadata"].get("deletionTimestamp"):
            try:
                this.api.delete(f"{this.core}/pods/{pod['metadata']['name']}")
            except NotFoundError:
                continue
            except DynamicApiError as refused:
                raise UnfinishedError(_reason(refused), "FailedDeleteAllPods") from refused


def _write_status(this: Round, found: list[Object], unfinished: UnfinishedError | None) -> bool:
    seen = status.Observed(
        pods=found,
        service=this.api.get(f"{this.core}/services/{pods.head_service_name(this.cluster)}"),
        now=_now(),
        failure=unfinished.failure if unfinished else None,
        error=unfinished is not None,
    )
    new = status.new_status(this.cluster, seen)
    if not status.changed(this.cluster.get("status"), new):
        return False
    path = f"{CLUSTERS}/namespaces/{this.namespace}/rayclusters/{this.name}/status"
    with contextlib.suppress(ConflictError):  # changed meanwhile: the next round sees it
        this.api.replace(path, {**this.cluster, "status": new})
    return True


def _exists(this: Round, path: str) -> bool:
    try:
        this.api.get(f"{this.core}/{path}")
    except NotFoundError:
        return False
    return True


def _running(pod: Mapping[str, Any], address: str) -> Object:
    now = _now()
    kinds = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    return {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": now,
        "conditions": [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in kinds],
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": now}},
            }
            for container in pod["spec"]["containers"]
        ],
    }


def _terminated(pod: Mapping[str, Any]) -> Mapping[str, Any] | None:
    ray_container = pod["spec"]["containers"][0]["name"]
    for container in pod["status"].get("containerStatuses") or []:
        if container["name"] == ray_container:
            return (container.get("state") or {}).get("terminated")
    return None


def _as_go(terminated: Mapping[str, Any] | None) -> str:
    """As the Event of the real one prints it."""
    if terminated is None:
        return "nil"
    fields = ("exitCode", "signal", "reason", "message", "startedAt", "finishedAt", "containerID")
    inner = "".join(f"{field[0].upper()}{field[1:]}:{terminated.get(field, '')}," for field in fields)
    return f"&ContainerStateTerminated{{{inner}}}"


def _reason(refused: DynamicApiError) -> str:
    """The API server's own words."""
    return str(refused.summary())


def _label(pod: Mapping[str, Any], key: str) -> str | None:
    return pod["metadata"]["labels"].get(key)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
