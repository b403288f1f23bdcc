"""The status that KubeRay gives a RayCluster, from its pods and Service. Pure.

Follows `calculateStatus` of KubeRay 1.7: `state` and RayClusterProvisioned latch, HeadPodReady is live, and suspending
takes two rounds (Suspending, then Suspended).
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from tests.cluster.kuberay.pods import NODE_TYPE
from tests.cluster.kuberay.start_command import amount, is_gpu

Object = dict[str, Any]
MAX_REPLICAS = 2**31 - 1


@dataclass(frozen=True)
class ReplicaFailure:
    """Pods could not be made or deleted; `reason` is one of KubeRay's five (FailedCreateHeadPod, ...)."""

    reason: str
    message: str


@dataclass(frozen=True)
class Observed:
    """One round's view. `error` says that the round broke off: the state then does not become ready."""

    pods: Sequence[Mapping[str, Any]]
    service: Mapping[str, Any] | None
    now: str
    failure: ReplicaFailure | None = None
    error: bool = False


def new_status(cluster: Mapping[str, Any], seen: Observed) -> Object:
    """The whole status after this round; compare with `changed` before it is written."""
    old = cluster.get("status") or {}
    status: Object = copy.deepcopy(dict(old))
    conditions: list[Object] = status.setdefault("conditions", [])
    broken = seen.error or seen.failure is not None
    if seen.failure:
        _set(conditions, seen.now, "ReplicaFailure", "True", seen.failure.reason, seen.failure.message)
    elif not broken:
        conditions[:] = [condition for condition in conditions if condition["type"] != "ReplicaFailure"]

    status |= _counts(cluster, seen.pods)
    status |= {"observedGeneration": cluster["metadata"]["generation"], "lastUpdateTime": seen.now}
    if not broken and len(seen.pods) == status["desiredWorkerReplicas"] + 1 and all_running(seen.pods):
        status |= {"state": "ready", "reason": ""}
    head = head_pod_of(seen.pods)
    _set(conditions, seen.now, "HeadPodReady", *head_pod_ready(head))
    suspended_before = suspend_state(old.get("conditions") or [])
    if not _is_true(conditions, "RayClusterProvisioned") and suspended_before != "RayClusterSuspended":
        _set_provisioned(conditions, seen)
    _set_suspend(conditions, seen, bool(cluster["spec"].get("suspend")), suspended_before)
    if cluster["spec"].get("suspend") and not seen.pods:
        status["state"] = "suspended"

    _set_head(status, head, seen.service)
    if status.get("state") != old.get("state"):
        status.setdefault("stateTransitionTimes", {})[status["state"]] = seen.now
    return status


def changed(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> bool:
    """Whether KubeRay would write: anything but times and observedGeneration differs."""
    ignored = ("lastUpdateTime", "observedGeneration", "stateTransitionTimes")
    before, after = ({k: v for k, v in status.items() if k not in ignored} for status in (old or {}, new))
    return before != after


def suspend_state(conditions: Iterable[Mapping[str, Any]]) -> str:
    """`RayClusterSuspending`, `RayClusterSuspended` or an empty string."""
    return next((c["type"] for c in conditions if "Suspend" in c["type"] and c["status"] == "True"), "")


def desired_workers(group: Mapping[str, Any]) -> int:
    """Worker pods of a group: replicas within their bounds, times hosts."""
    if group.get("suspend"):
        return 0
    low, high = group.get("minReplicas") or 0, group.get("maxReplicas", MAX_REPLICAS)
    return min(max(group.get("replicas") or 0, low), high) * (group.get("numOfHosts") or 1)


def head_pod_of(pods: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((pod for pod in pods if pod["metadata"]["labels"][NODE_TYPE] == "head"), None)


def head_pod_ready(head: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Status, reason and message of HeadPodReady; the reason of a container that waits comes before ContainersNotReady."""
    if head is None:
        return "False", "HeadPodNotFound", "Head Pod not found"
    ready = _ready_condition(head)
    if ready is None:
        return "False", "Unknown", ""
    status, message = ready["status"], ready.get("message") or ""
    reason = ready.get("reason") or ("HeadPodRunningAndReady" if status == "True" else "Unknown")
    if reason != "ContainersNotReady":
        return status, reason, message
    for container in head["status"].get("containerStatuses") or []:
        state = container.get("state") or {}
        if stopped := state.get("waiting") or state.get("terminated"):
            detail = f"{container['name']}: {stopped.get('message') or ''}"
            return status, stopped.get("reason") or reason, f"{message}; {detail}" if message else detail
    return status, reason, message


def all_running(pods: Sequence[Mapping[str, Any]]) -> bool:
    return bool(pods) and all(
        _phase(pod) == "Running" and (_ready_condition(pod) or {"status": "True"})["status"] == "True" for pod in pods
    )


def _counts(cluster: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> Object:
    workers = [pod for pod in pods if pod["metadata"]["labels"][NODE_TYPE] == "worker"]
    running = [pod for pod in workers if _phase(pod) == "Running"]
    groups = [group for group in cluster["spec"].get("workerGroupSpecs") or [] if not group.get("suspend")]
    hosts = [group.get("numOfHosts") or 1 for group in groups]
    most = sum(group.get("maxReplicas", MAX_REPLICAS) * n for group, n in zip(groups, hosts, strict=True))
    desired = _desired_resources(cluster["spec"]["headGroupSpec"], groups)
    return {
        "readyWorkerReplicas": sum((_ready_condition(pod) or {}).get("status") == "True" for pod in running),
        "availableWorkerReplicas": len(running),
        "desiredWorkerReplicas": sum(desired_workers(group) for group in groups),
        "minWorkerReplicas": sum((group.get("minReplicas") or 0) * n for group, n in zip(groups, hosts, strict=True)),
        "maxWorkerReplicas": min(most, MAX_REPLICAS),
        "desiredCPU": _plain(desired.get("cpu", Decimal(0))),
        "desiredMemory": _plain(desired.get("memory", Decimal(0))),
        "desiredGPU": _plain(sum((value for key, value in desired.items() if is_gpu(key)), Decimal(0))),
        "desiredTPU": _plain(desired.get("google.com/tpu", Decimal(0))),
    }


def _desired_resources(head: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> dict[str, Decimal]:
    """Of the spec, not of what was granted; requests come before limits."""
    total: dict[str, Decimal] = {}
    shares = [(head, 1), *((group, (group.get("replicas") or 0) * (group.get("numOfHosts") or 1)) for group in groups)]
    for group, pods in shares:
        for container in group["template"]["spec"]["containers"]:
            resources = container.get("resources") or {}
            wanted = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
            for key, quantity in wanted.items():
                total[key] = total.get(key, Decimal(0)) + amount(quantity) * pods
    return total


def _set_provisioned(conditions: list[Object], seen: Observed) -> None:
    if all_running(seen.pods):
        reason, message = "AllPodRunningAndReadyFirstTime", "All Ray Pods are ready for the first time"
        _set(conditions, seen.now, "RayClusterProvisioned", "True", reason, message)
    else:
        message = "RayCluster Pods are being provisioned for first time"
        _set(conditions, seen.now, "RayClusterProvisioned", "False", "RayClusterPodsProvisioning", message)


def _set_suspend(conditions: list[Object], seen: Observed, wanted: bool, before: str) -> None:
    def put(kind: str, status: bool) -> None:
        _set(conditions, seen.now, kind, str(status), kind, "")

    if before == "RayClusterSuspending":
        if not seen.pods:
            message = "RayCluster has been suspended"
            _set(conditions, seen.now, "RayClusterProvisioned", "False", "RayClusterPodsProvisioning", message)
            put("RayClusterSuspending", False)
            put("RayClusterSuspended", True)
    elif before == "RayClusterSuspended":
        if not wanted:
            put("RayClusterSuspended", False)
    else:
        put("RayClusterSuspended", False)
        put("RayClusterSuspending", wanted)


def _set_head(status: Object, head: Mapping[str, Any] | None, service: Mapping[str, Any] | None) -> None:
    """The Service is headless, so its address is the head pod's."""
    pod_ip = head["status"].get("podIP", "") if head else ""
    status["head"] = {"podIP": pod_ip, "podName": head["metadata"]["name"] if head else ""}
    if service:
        own_ip = service["spec"].get("clusterIP", "None")
        status["head"] |= {
            "serviceIP": pod_ip if own_ip == "None" else own_ip,
            "serviceName": service["metadata"]["name"],
        }
        ports = service["spec"].get("ports") or []
        status["endpoints"] = {port["name"]: str(port.get("targetPort", port["port"])) for port in ports}


def _set(conditions: list[Object], now: str, kind: str, status: str, reason: str, message: str) -> None:
    """As apimachinery's SetStatusCondition: the time moves only with the status."""
    new = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now}
    for position, old in enumerate(conditions):
        if old["type"] == kind:
            if old["status"] == status:
                new["lastTransitionTime"] = old["lastTransitionTime"]
            conditions[position] = new
            return
    conditions.append(new)


def _is_true(conditions: Iterable[Mapping[str, Any]], kind: str) -> bool:
    return any(condition["type"] == kind and condition["status"] == "True" for condition in conditions)


def _ready_condition(pod: Mapping[str, Any]) -> Mapping[str, Any] | None:
    conditions = pod.get("status", {}).get("conditions") or []
    return next((condition for condition in conditions if condition["type"] == "Ready"), None)


def _phase(pod: Mapping[str, Any]) -> str:
    return pod.get("status", {}).get("phase", "Pending")


def _plain(value: Decimal) -> str:
    """Without an exponent or trailing zeros, in milli-units where it is no whole number."""
    return str(int(value)) if value == int(value) else f"{int(value * 1000)}m"
