"""A Kueue Workload -> why its RayCluster is still suspended, and its place among those that wait with it.

Pure (Kueue 0.18: kueue.x-k8s.io/v1beta1 and v1beta2).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dsft_api.conditions import Reason
from dsft_operator.core.observed import Queueing

Json = Mapping[str, Any]

GROUP = "kueue.x-k8s.io"
# Newest first: the first one that is served is used.
VERSIONS = ("v1beta2", "v1beta1")
JOB_UID_LABEL = "kueue.x-k8s.io/job-uid"
# Chooses those that have no quota. The API server of a Kueue before 0.18 refuses it.
WITHOUT_QUOTA = "status.admission.clusterQueue="

MISSING = Queueing(Reason.KUEUE_MISSING, "the API server knows no Kueue, so nothing will ever start the run")
# Kueue has no reason of its own for what no free quota will help; only the words differ. It has a part for each pod set that
# does not fit, and in it some words for each flavor.
_PART = "couldn't assign flavors to pod set "
_NEVER = ("> maximum capacity (", "unavailable in ClusterQueue", "untolerated taint", "doesn't match node affinity")
_NOT_NOW = ("insufficient unused quota", "topology")


def queueing_of(workload: Json) -> Queueing:
    """What a Workload that is not admitted waits for, in Kueue's words."""
    status: Json = workload.get("status") or {}
    conditions = _conditions(workload)
    quota, evicted = conditions.get("QuotaReserved", {}), _evicted(conditions)
    words = ": ".join(filter(None, (evicted.get("reason"), quota.get("message"))))
    told = evicted.get("message") or evicted.get("reason")
    spec: Json = workload.get("spec") or {}
    if spec.get("active") is False:
        return Queueing(Reason.QUEUE_CLOSED, words or "the Workload was deactivated", evicted=told)
    if quota.get("status") == "True":
        return Queueing(Reason.QUEUED, _checks(status) or "quota is reserved; about to start", evicted=told)
    if quota.get("reason") == "Inadmissible":
        return Queueing(Reason.QUEUE_CLOSED, words, evicted=told)
    if _never_fits(quota.get("message", "")):
        return Queueing(Reason.NEVER_FITS, words, evicted=told)
    return Queueing(Reason.QUEUED, words or "Kueue has not judged it yet", evicted=told)


def _never_fits(message: str) -> bool:
    """Whether a pod set fits no flavor, even an empty one."""
    parts = message.split(_PART)
    return any(_has(part, _NEVER) and not _has(part, _NOT_NOW) for part in parts)


def _has(text: str, words: Iterable[str]) -> bool:
    return any(word in text for word in words)


class Waiter(NamedTuple):
    """A Workload that waits for quota, and what decides its turn."""

    queue: str
    priority: int
    created: str
    uid: str


def waiters_of(workloads: Iterable[Json]) -> tuple[Waiter, ...]:
    """Those of some Workloads that wait, in any queue."""
    return tuple(waiter_of(workload) for workload in workloads if in_line(workload))


def waiter_of(workload: Json) -> Waiter:
    """What decides a Workload's turn."""
    meta: Json = workload["metadata"]
    spec: Json = workload.get("spec") or {}
    return Waiter(spec.get("queueName") or "", spec.get("priority") or 0, meta["creationTimestamp"], meta["uid"])


def in_line(workload: Json) -> bool:
    """Whether it waits for quota that it may get some day."""
    if "deletionTimestamp" in workload["metadata"]:
        return False
    finished = _conditions(workload).get("Finished", {}).get("status") == "True"
    reserved = _conditions(workload).get("QuotaReserved", {}).get("status") == "True"
    return not finished and not reserved and queueing_of(workload).reason == Reason.QUEUED


def place_of(one: Waiter, others: Iterable[Waiter]) -> tuple[int, int] | None:
    """Which one it is of how many in its LocalQueue, in Kueue's order; None if it is not among those that wait.

    The order is that of Kueue without fair sharing: priority, then age. The uid decides between those of one second.
    """
    line = sorted((other for other in others if other.queue == one.queue), key=_turn)
    uids = [other.uid for other in line]
    return (uids.index(one.uid) + 1, len(uids)) if one.uid in uids else None


def _turn(waiter: Waiter) -> tuple[int, str, str]:
    return -waiter.priority, waiter.created, waiter.uid


def _conditions(workload: Json) -> dict[str, Json]:
    status: Json = workload.get("status") or {}
    return {condition["type"]: condition for condition in status.get("conditions") or ()}


def _evicted(conditions: Mapping[str, Json]) -> Json:
    evicted = conditions.get("Evicted", {})
    return evicted if evicted.get("status") == "True" else {}


def _checks(status: Json) -> str:
    checks = [check for check in status.get("admissionChecks") or () if check.get("state") != "Ready"]
    waits = [": ".join(filter(None, (check.get("name"), check.get("message")))) for check in checks]
    return f"quota is reserved; waiting for admission checks: {', '.join(waits)}" if waits else ""
