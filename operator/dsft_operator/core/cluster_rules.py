"""Rules about the RayCluster: make it, prepare it, and say what it waits for."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dsft_api.conditions import WAITS, ConditionType, FailureClass, Phase, Reason
from dsft_api.job import CONTRACT
from dsft_api.spec import FineTuneSpec
from dsft_api.status import FineTuneStatus, RayClusterStatus, Resolved
from dsft_operator.config import OperatorConfig
from dsft_operator.core import attempts, naming
from dsft_operator.core.avoidance import forgiven
from dsft_operator.core.decision import (
    AddFinalizer,
    CreateChild,
    CreateCluster,
    CreateToken,
    Decision,
    DeleteCluster,
)
from dsft_operator.core.failures import Cause
from dsft_operator.core.observed import Cluster, Head, Observed
from dsft_operator.core.raycluster import network_policy, ray_cluster, template_digest
from dsft_operator.core.resource_rules import SOON, live_cluster, preflight_left
from dsft_operator.core.submission import storage_prefix
from dsft_operator.core.summary import Fact, condition_of, report
from dsft_operator.core.waiting import CONFIG_REASONS, explain


def missing(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """There is no RayCluster: make the first one, or the next incarnation once its intent is in the status."""
    run, status, spec = seen.run, seen.run.status, _spec(seen)
    if seen.cluster is not None:
        return None
    known = status.ray_cluster
    if known is not None and known.uid is not None:
        number = known.incarnation + 1
        name = naming.cluster_name(run.name, run.uid, number)
        changes = attempts.lost(status, now, "the RayCluster was deleted")
        changes["ray_cluster"] = RayClusterStatus(name=name, incarnation=number)
        message = f"making RayCluster {name}"
        wish = report(run, now, Phase.PENDING, Reason.RESTARTING, message, _NO_CLUSTER, **changes)
        # Once the next one is named, nobody looks at this one again: if it was only not seen, it must go.
        return Decision((DeleteCluster(known.name, known.uid),), wish, requeue_after=0)
    if (late := overdue(seen, now)) is not None:
        return late
    number = known.incarnation if known is not None else 1
    manifest = ray_cluster(run, spec, config, number)
    name = manifest["metadata"]["name"]
    phase = Phase.QUEUED if manifest["spec"].get("suspend") else Phase.PROVISIONING
    wish = report(
        run,
        now,
        phase,
        Reason.PROVISIONING,
        f"RayCluster {name} was created",
        _NO_CLUSTER,
        ray_cluster=RayClusterStatus(name=name, incarnation=number),
        **_pinned(seen, spec),
    )
    # The finalizer first, even if it is there: it is refused where the resource is another by now, or gone.
    # A preflight's Job that a late read had missed goes before; one that cannot be deleted holds nothing back.
    actions = (AddFinalizer(), *preflight_left(seen), CreateCluster(manifest))
    return Decision(actions, wish, requeue_after=0)


def going(seen: Observed, now: datetime, _config: OperatorConfig) -> Decision | None:
    """A RayCluster of ours is being deleted: its attempt is over, and the next cluster waits for its pods to go."""
    if not isinstance(seen.cluster, Cluster) or not seen.cluster.deleting:
        return None
    changes = attempts.lost(seen.run.status, now, "the RayCluster was deleted")
    message = f"waiting until RayCluster {seen.cluster.name} is gone"
    return Decision(
        status=report(seen.run, now, Phase.PENDING, Reason.RESTARTING, message, _NO_CLUSTER, **changes),
        requeue_after=SOON,
    )


def outdated(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """Pools, image or environment changed while no attempt ran: another incarnation has them."""
    run, cluster = seen.run, live_cluster(seen)
    if cluster is None or attempts.active(run.status) is not None or run.problems:
        return None
    if cluster.template_digest == template_digest(run, _spec(seen), config):
        return None
    message = "the pods of the spec changed: making another RayCluster"
    return Decision(
        (DeleteCluster(cluster.name, cluster.uid),),
        report(run, now, Phase.PENDING, Reason.RESTARTING, message, _NO_CLUSTER, ray_cluster=_named(seen, cluster)),
        SOON,
    )


def forgiving(seen: Observed, now: datetime, _config: OperatorConfig) -> Decision | None:
    """It waits, and a new retry.token says that the nodes it keeps away from are well again."""
    run, status, spec = seen.run, seen.run.status, _spec(seen)
    if (
        not (status.avoided_nodes or any(attempt.failed_nodes for attempt in status.attempts))
        or attempts.active(status) is not None
        or spec.retry.token in (None, status.retry_token)
    ):
        return None
    message = "retry.token is new: all nodes may be used again"
    changes: dict[str, Any] = forgiven(status) | {"retry_token": spec.retry.token}
    wish = report(run, now, status.phase or Phase.PENDING, Reason.RESTARTING, message, **changes)
    return Decision(status=wish, requeue_after=0)


def unprepared(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """The cluster is new to us: its pods wait for the token, and nobody else may reach them."""
    run, cluster = seen.run, live_cluster(seen)
    known = run.status.ray_cluster
    if cluster is None or (known is not None and known.uid == cluster.uid):
        return None
    if (late := overdue(seen, now)) is not None:
        return late
    # The finalizer again, for an operator that died between the cluster's creation and its status.
    actions = (*_children(seen, cluster, config), *_finalizer(seen))
    wish = _waiting_status(seen, now, cluster, ray_cluster=_named(seen, cluster), **_pinned(seen, _spec(seen)))
    return Decision(actions, wish, config.intervals.provisioning_seconds)


def waiting(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """No attempt runs, and the cluster is not whole: say why, for as long as the deadlines allow."""
    run, cluster, spec = seen.run, live_cluster(seen), _spec(seen)
    if cluster is None or attempts.active(run.status) is not None or is_whole(seen):
        return None
    wish = _waiting_status(seen, now, cluster)
    waited = (now - wish.phase_time).total_seconds() if wish.phase_time else 0.0
    queued = wish.phase is Phase.QUEUED
    bound = spec.deadlines.queue_seconds if queued else spec.deadlines.provision_seconds
    if bound is not None and waited >= bound:
        kind = FailureClass.QUEUE_TIMEOUT if queued else FailureClass.PROVISION_TIMEOUT
        return timed_out(seen, now, wish, kind, bound)
    pause = config.intervals.queued_seconds if queued else config.intervals.provisioning_seconds
    actions = _children(seen, cluster, config) if _secret_is_gone(seen, cluster) else ()
    return Decision(actions, wish, pause if bound is None else min(pause, bound - waited))


def _children(seen: Observed, cluster: Cluster, config: OperatorConfig) -> tuple[CreateToken, CreateChild]:
    """What the RayCluster owns: the Secret that its pods wait for, and the NetworkPolicy around them."""
    policy = network_policy(seen.run, config, cluster.name, cluster.uid)
    return CreateToken(cluster.name, cluster.uid), CreateChild(policy)


def _secret_is_gone(seen: Observed, cluster: Cluster) -> bool:
    """A pod asks for our Secret. What we found there by that name was that of a RayCluster before, and went after it."""
    waits = [pod.waiting for pod in seen.pods if pod.waiting is not None]
    return any(reason in CONFIG_REASONS and f'"{cluster.name}"' in words for reason, words in waits)


def is_whole(seen: Observed) -> bool:
    """Head and all workers are ready, and Ray's API answers."""
    cluster = live_cluster(seen)
    return (
        cluster is not None
        and not cluster.suspended
        and cluster.head_ready
        and cluster.ready_workers >= sum(pool.nodes for pool in _spec(seen).node_pools)
        and isinstance(seen.head, Head)
    )


_NO_CLUSTER: dict[ConditionType, Fact | None] = {
    ConditionType.CLUSTER_READY: Fact(value=False, reason=Reason.PROVISIONING, message="there is no RayCluster yet"),
    ConditionType.JOB_SUBMITTED: None,
}


def _waiting_status(seen: Observed, now: datetime, cluster: Cluster, **changes: Any) -> FineTuneStatus:
    fact = explain(_spec(seen), seen, cluster)
    phase = Phase.QUEUED if cluster.suspended else Phase.PROVISIONING
    return report(seen.run, now, phase, fact.reason, fact.message, {ConditionType.CLUSTER_READY: fact}, **changes)


def overdue(seen: Observed, now: datetime) -> Decision | None:
    """The end, where the API server has refused to make something for as long as the run may wait for its nodes."""
    status, bound = seen.run.status, _spec(seen).deadlines.provision_seconds
    before = condition_of(status, ConditionType.CLUSTER_READY)
    if before is None or before.reason != Reason.CLUSTER_REFUSED or bound is None or status.phase_time is None:
        return None
    if status.phase is not Phase.PROVISIONING:
        # The time is that of a spec that could not be run; this one has waited for nothing yet.
        return None
    is_over = (now - status.phase_time).total_seconds() >= bound
    return timed_out(seen, now, status, FailureClass.PROVISION_TIMEOUT, bound) if is_over else None


def timed_out(
    seen: Observed, now: datetime, wish: FineTuneStatus, kind: FailureClass, bound: int, **changes: Any
) -> Decision:
    """The deadline is over. What was waited for is kept: the pods that say so are about to go."""
    queued = wish.phase is Phase.QUEUED
    fact = condition_of(wish, ConditionType.CLUSTER_READY)
    assert fact is not None, "a wait has its condition"  # noqa: S101
    remedy = WAITS.get(fact.reason)
    words = f"{fact.reason}: {fact.message.removesuffix(f' -> {remedy}')}"
    cause = Cause(
        kind,
        f"not {'admitted' if queued else 'provisioned'} within {bound} s ({words})",
        remedy=f"{remedy}; then set a new spec.retry.token" if remedy else None,
    )
    return failed(seen, now, cause, {ConditionType.CLUSTER_READY: Fact(False, fact.reason, fact.message)}, **changes)


def failed(
    seen: Observed,
    now: datetime,
    cause: Cause,
    facts: Mapping[ConditionType, Fact | None] | None = None,
    **changes: Any,
) -> Decision:
    """The end of a run that cannot go on by itself; `finished` frees the nodes."""
    status = seen.run.status.model_copy(update=changes)
    changes |= attempts.ended(status, now, cause)
    kind, message = cause.failure_class, str(cause)
    wish = report(seen.run, now, Phase.FAILED, kind, message, facts, completion_time=now, **changes)
    return Decision(status=wish, requeue_after=0)


def _named(seen: Observed, cluster: Cluster) -> RayClusterStatus:
    known = seen.run.status.ray_cluster
    return RayClusterStatus(name=cluster.name, uid=cluster.uid, incarnation=known.incarnation if known else 1)


def _finalizer(seen: Observed) -> tuple[AddFinalizer, ...]:
    return () if naming.FINALIZER in seen.run.finalizers else (AddFinalizer(),)


def _pinned(seen: Observed, spec: FineTuneSpec) -> dict[str, Any]:
    """What is decided once, by the first pass that makes something."""
    status = seen.run.status
    before = status.resolved or Resolved()
    prefix = storage_prefix(seen.run, spec)
    return {
        "spec_hash": status.spec_hash if status.attempt else seen.run.identity,
        "resolved": before.model_copy(update={"contract": CONTRACT, "storage_prefix": prefix}),
        "retry_token": status.retry_token or spec.retry.token,
    }


def _spec(seen: Observed) -> FineTuneSpec:
    assert seen.run.spec is not None, "rule refused comes first"  # noqa: S101
    return seen.run.spec
