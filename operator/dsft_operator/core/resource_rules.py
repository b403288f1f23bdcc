"""Rules about the resource itself: it is going, refused, unreadable, finished or suspended."""

from datetime import datetime
from typing import Any

from dsft_api.conditions import ConditionType, FailureClass, Phase, Reason
from dsft_api.status import FineTuneStatus
from dsft_operator.config import OperatorConfig
from dsft_operator.core import attempts
from dsft_operator.core.avoidance import forgiven
from dsft_operator.core.decision import Decision, DeleteCluster, DeleteJob, RemoveFinalizer, StopJob
from dsft_operator.core.failures import Cause, report_of
from dsft_operator.core.naming import FINALIZER
from dsft_operator.core.observed import Cluster, Observed, PreflightJob, RayJob, Unknown
from dsft_operator.core.summary import MAX_MESSAGE, Fact, acknowledged, condition_of, refusal_reason, report

# A deleted resource must be let go within a minute, whatever Ray does.
DELETE_DRAIN_SECONDS = 30
DELETE_SECONDS = 50
# Beyond drainSeconds, for Ray to tell that the driver ended.
STOP_MARGIN_SECONDS = 30
SOON = 2.0


def deleting(seen: Observed, now: datetime, _config: OperatorConfig) -> Decision | None:
    """The user deleted it: let the driver commit, free the GPUs, let go."""
    run = seen.run
    if run.deleting is None:
        return None
    if FINALIZER not in run.finalizers:
        return Decision()
    waited = (now - run.deleting).total_seconds()
    cluster = live_cluster(seen)
    if cluster is not None and waited < DELETE_SECONDS:
        if driver_runs(seen) and run.status.job is not None and waited < DELETE_DRAIN_SECONDS:
            return Decision((StopJob(run.status.job.submission_id),), requeue_after=SOON)
        return Decision((DeleteCluster(cluster.name, cluster.uid),), requeue_after=0)
    if isinstance(seen.cluster, Unknown) and waited < DELETE_SECONDS:
        return Decision(requeue_after=SOON)
    return Decision((RemoveFinalizer(),))


def finished(seen: Observed, now: datetime, _config: OperatorConfig) -> Decision | None:
    """Succeeded or Failed: only a new retry.token brings a failed run back. What is edited now changes nothing else."""
    run, status, spec = seen.run, seen.run.status, seen.run.spec
    if status.completion_time is None:
        return None
    succeeded = condition_of(status, ConditionType.SUCCEEDED)
    has_failed = succeeded is not None and succeeded.status == "False"
    if spec is not None and has_failed and not run.problems and spec.retry.token not in (None, status.retry_token):
        message = "retry.token is new: going on from the last commit"
        changes: dict[str, Any] = {"completion_time": None, "retry_token": spec.retry.token, "retries": 0}
        # What was found is looked at again, also where the token is put back to one that it was found under.
        changes |= forgiven(status) | {"preflight": None}
        wish = report(run, now, Phase.PENDING, Reason.RESTARTING, message, {ConditionType.PREFLIGHTED: None}, **changes)
        return Decision(status=wish, requeue_after=0)
    judged = acknowledged(run, now)
    wish = judged if judged != status else None
    cluster = live_cluster(seen)
    if cluster is None:
        return Decision(status=wish)
    keep = spec.keep_cluster_seconds if spec is not None else 0
    # A clock that went back holds it no longer than was asked.
    left = keep - max(0.0, (now - status.completion_time).total_seconds())
    if left > 0:
        return Decision(status=wish, requeue_after=left)
    return Decision((DeleteCluster(cluster.name, cluster.uid),), wish, SOON)


def refused(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """Nothing is created for a spec that cannot be run; an attempt that runs already goes on with what it was told."""
    run, cluster = seen.run, live_cluster(seen)
    if run.spec is not None and not run.problems:
        return None
    if isinstance(seen.cluster, Unknown):
        return Decision(requeue_after=config.intervals.provisioning_seconds)
    message = "; ".join(map(str, run.problems))
    if cluster is not None and attempts.active(run.status) is not None:
        if run.spec is not None:
            return None
        words = f"the spec cannot be read, and what runs is left alone: {message}"
        return Decision(
            status=acknowledged(run, now, message=words[:MAX_MESSAGE]), requeue_after=config.intervals.queued_seconds
        )
    reason = refusal_reason(run.problems)
    changes = attempts.lost(run.status, now, "the RayCluster is gone") | forget_preflight(run.status)
    actions = () if cluster is None else (DeleteCluster(cluster.name, cluster.uid),)
    wish = report(run, now, Phase.FAILED, reason, message, **changes)
    return Decision((*actions, *preflight_left(seen)), wish, None if seen.cluster is None else SOON)


def unreadable(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """RayClusters cannot be read: KubeRay is not installed (yet), or the API server did not answer."""
    run, spec = seen.run, seen.run.spec
    if not seen.kuberay_installed and spec is not None and not spec.suspend:
        message = "the cluster has no RayCluster API: install KubeRay; the run starts once it is there"
        fact = Fact(value=False, reason=Reason.KUBERAY_MISSING, message=message)
        # An attempt stays open: an API that is not served for a moment is no proof that its cluster is gone.
        wish = report(run, now, Phase.PENDING, fact.reason, message, {ConditionType.CLUSTER_READY: fact})
        return Decision(status=wish, requeue_after=config.intervals.queued_seconds)
    if isinstance(seen.cluster, Unknown):
        return Decision(requeue_after=config.intervals.provisioning_seconds)
    return None


def suspended(seen: Observed, now: datetime, _config: OperatorConfig) -> Decision | None:
    """The user wants it to wait: commit, free the nodes. One that just ended by itself has its end."""
    run, status, spec = seen.run, seen.run.status, seen.run.spec
    if spec is None or not spec.suspend or _driver_succeeded(seen):
        return None
    gone: dict[ConditionType, Fact | None] = {ConditionType.CLUSTER_READY: None, ConditionType.JOB_SUBMITTED: None}
    if not _is_ours(seen):
        changes = attempts.ended(status, now, _interruption(seen), counted=False) | forget_preflight(status)
        message = "the nodes are free; set spec.suspend to false to go on from the last commit"
        wish = report(run, now, Phase.SUSPENDED, Reason.SUSPENDED, message, gone, job=None, **changes)
        return Decision(preflight_left(seen), wish)
    cluster = live_cluster(seen)
    since = status.phase_time if status.phase is Phase.SUSPENDING and status.phase_time else now
    patience = spec.checkpoint.drain_seconds + STOP_MARGIN_SECONDS
    message = "the trainer commits, then the nodes are freed"
    if cluster is not None and driver_runs(seen) and status.job and (now - since).total_seconds() < patience:
        # One that is closed already has its account.
        changes = attempts.followed(status, report_of(seen)) if attempts.active(status) else {}
        wish = report(run, now, Phase.SUSPENDING, Reason.SUSPENDED, message, **changes)
        return Decision((StopJob(status.job.submission_id),), wish, SOON)
    changes = attempts.followed(status, report_of(seen)) if attempts.active(status) else {}
    told = status.model_copy(update=changes)
    changes |= attempts.ended(told, now, _interruption(seen), counted=False)
    wish = report(run, now, Phase.SUSPENDING, Reason.SUSPENDED, message, **changes)
    actions = () if cluster is None else (DeleteCluster(cluster.name, cluster.uid),)
    return Decision(actions, wish, SOON)


def name_taken(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """Somebody else's RayCluster has our name: it is left untouched."""
    if not isinstance(seen.cluster, Cluster) or seen.cluster.owned:
        return None
    message = (
        f"RayCluster {seen.cluster.name} exists and does not belong to this resource; "
        "remove it, or give this resource another name"
    )
    fact = Fact(value=False, reason=Reason.NAME_CONFLICT, message=message)
    changes = attempts.lost(seen.run.status, now, "the RayCluster is gone")
    wish = report(seen.run, now, Phase.PENDING, fact.reason, message, {ConditionType.CLUSTER_READY: fact}, **changes)
    return Decision(status=wish, requeue_after=config.intervals.queued_seconds)


def preflight_left(seen: Observed) -> tuple[DeleteJob, ...]:
    """The deletion of a preflight's Job that nobody waits for any more."""
    job = seen.preflight
    return (DeleteJob(job.name, job.uid),) if isinstance(job, PreflightJob) and job.owned and not job.deleting else ()


def forget_preflight(status: FineTuneStatus) -> dict[str, Any]:
    """Changes of status where a preflight came to no result: another one begins anew."""
    known = status.preflight
    return {"preflight": None} if known is not None and known.end_time is None else {}


def live_cluster(seen: Observed) -> Cluster | None:
    """Our RayCluster, unless it is on its way out."""
    cluster = seen.cluster
    return cluster if isinstance(cluster, Cluster) and cluster.owned and not cluster.deleting else None


def driver_runs(seen: Observed) -> bool:
    """Whether the last submission may still be doing something."""
    return isinstance(seen.job, RayJob) and not seen.job.is_over


def _driver_succeeded(seen: Observed) -> bool:
    is_current = live_cluster(seen) is not None and attempts.active(seen.run.status) is not None
    return is_current and isinstance(seen.job, RayJob) and seen.job.state == "SUCCEEDED"


def _is_ours(seen: Observed) -> bool:
    return isinstance(seen.cluster, Cluster) and seen.cluster.owned


def _interruption(seen: Observed) -> Cause | None:
    """A suspended attempt did not fail, but for what it had not committed; a stop is exit code 6."""
    return Cause(FailureClass.PREEMPTED, "suspended by spec.suspend", 6) if attempts.active(seen.run.status) else None
