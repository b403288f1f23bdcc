"""A Kueue Workload -> why its RayCluster is still suspended. Pure (Kueue 0.18: kueue.x-k8s.io/v1beta1 and v1beta2)."""

from collections.abc import Mapping
from typing import Any

from dsft_api.conditions import Reason
from dsft_operator.core.observed import Queueing

Json = Mapping[str, Any]

GROUP = "kueue.x-k8s.io"
# Newest first: the first one that is served is used.
VERSIONS = ("v1beta2", "v1beta1")
JOB_UID_LABEL = "kueue.x-k8s.io/job-uid"

MISSING = Queueing(Reason.KUEUE_MISSING, "the API server knows no Kueue, so nothing will ever start the run")
# Kueue has no reason of its own for what no free quota will help; only the words differ.
_NEVER_WORDS = "maximum capacity"


def queueing_of(workload: Json) -> Queueing:
    """What a Workload that is not admitted waits for, in Kueue's words."""
    status: Json = workload.get("status") or {}
    conditions: dict[str, Json] = {condition["type"]: condition for condition in status.get("conditions") or ()}
    quota, evicted = conditions.get("QuotaReserved", {}), conditions.get("Evicted", {})
    words = ": ".join(filter(None, (_eviction(evicted), quota.get("message", ""))))
    spec: Json = workload.get("spec") or {}
    if spec.get("active") is False:
        return Queueing(Reason.QUEUE_CLOSED, words or "the Workload was deactivated")
    if quota.get("status") == "True":
        return Queueing(Reason.QUEUED, _checks(status) or "quota is reserved; about to start")
    if quota.get("reason") == "Inadmissible":
        return Queueing(Reason.QUEUE_CLOSED, words)
    if _NEVER_WORDS in quota.get("message", ""):
        return Queueing(Reason.NEVER_FITS, words)
    return Queueing(Reason.QUEUED, words or "Kueue has not judged it yet")


def _eviction(evicted: Json) -> str:
    return evicted.get("reason", "") if evicted.get("status") == "True" else ""


def _checks(status: Json) -> str:
    checks = [check for check in status.get("admissionChecks") or () if check.get("state") != "Ready"]
    waits = [": ".join(filter(None, (check.get("name"), check.get("message")))) for check in checks]
    return f"quota is reserved; waiting for admission checks: {', '.join(waits)}" if waits else ""
