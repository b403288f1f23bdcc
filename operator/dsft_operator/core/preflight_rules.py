"""The rule about the preflight: no RayCluster before a pod without GPUs has looked at what the ranks would find missing.

What it finds ends the run. What it cannot tell (no image, no node, no quota for its pod within its time) holds nothing back: then
the RayCluster is made, and its own waits say why.
"""

from datetime import datetime
from typing import Any

from dsft_api.conditions import WAITS, ConditionType, FailureClass, Phase, Reason
from dsft_api.preflight import PreflightResult
from dsft_api.status import FineTuneStatus, PreflightStatus
from dsft_operator.config import OperatorConfig
from dsft_operator.core.cluster_rules import failed, overdue, timed_out
from dsft_operator.core.decision import AddFinalizer, CreateJob, Decision
from dsft_operator.core.failures import Cause
from dsft_operator.core.observed import Observed, PreflightJob, Unknown
from dsft_operator.core.preflight_job import SECONDS, is_due, preflight_job, preflight_name
from dsft_operator.core.resource_rules import SOON, forget_preflight, preflight_left
from dsft_operator.core.summary import Fact, condition_of, report
from dsft_operator.core.waiting import pod_obstacle

_SHOWN = 1000


def preflighted(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """A RayCluster is about to be made for a spec that nobody has looked at yet."""
    run, spec, known, job = seen.run, seen.run.spec, seen.run.status.ray_cluster, seen.preflight
    if seen.cluster is not None or spec is None or (known is not None and known.uid is not None):
        return None
    name, book = preflight_name(run, spec), run.status.preflight
    if book is not None and book.end_time is None and book.job != name:
        return _forgotten(seen, now)
    if not is_due(run):
        return None
    begun = begin(run.status, name, now)
    if isinstance(job, PreflightJob) and job.result is not None:
        return _judged(seen, now, job.result, begun)
    if isinstance(job, PreflightJob) and job.failed is not None:
        return _given_up(seen, now, begun, job.failed)
    if (now - begun.start_time).total_seconds() >= SECONDS:
        # What it waited for last, as it was told: its pod may be gone by now.
        told = condition_of(run.status, ConditionType.CLUSTER_READY)
        return _given_up(seen, now, begun, f"no result within {SECONDS} s: {told.message if told else ''}")
    if job is None:
        return _started(seen, now, config, begun)
    if isinstance(job, PreflightJob) and job.deleting:
        return Decision(requeue_after=SOON)
    return _waiting(seen, now, config, job, begun)


def begin(status: FineTuneStatus, name: str, now: datetime) -> PreflightStatus:
    """The preflight of that name in the book: as it stands there, or begun now."""
    known = status.preflight
    if known is not None and known.job == name and known.end_time is None:
        return known
    return PreflightStatus(job=name, start_time=now)


def _forgotten(seen: Observed, now: datetime) -> Decision:
    """Another spec by now. The Job of the one before is looked for twice, since a read that was late did not see it."""
    told = condition_of(seen.run.status, ConditionType.PREFLIGHTED) is not None
    message, facts = "the spec changed: what was looked at counts no more", {ConditionType.PREFLIGHTED: None}
    changes = {} if told else forget_preflight(seen.run.status)
    wish = report(seen.run, now, Phase.PENDING, Reason.RESTARTING, message, facts, **changes)
    return Decision(preflight_left(seen), wish, requeue_after=0)


def _started(seen: Observed, now: datetime, config: OperatorConfig, begun: PreflightStatus) -> Decision:
    run, spec = seen.run, seen.run.spec
    assert spec is not None, "rule refused comes first"  # noqa: S101
    if (late := overdue(seen, now)) is not None:
        return late
    wish = _told(seen, now, Fact(value=False, reason=Reason.PREFLIGHT, message=f"Job {begun.job} was created"), begun)
    # The finalizer first: it is refused where the resource is another by now, or gone.
    return Decision((AddFinalizer(), CreateJob(preflight_job(run, spec, config))), wish, SOON)


def _waiting(
    seen: Observed, now: datetime, config: OperatorConfig, job: PreflightJob | Unknown, begun: PreflightStatus
) -> Decision:
    wish = _told(seen, now, _unread(begun, job) if isinstance(job, Unknown) else _wait(job), begun)
    spec = seen.run.spec
    bound = spec.deadlines.provision_seconds if spec is not None else None
    waited = (now - wish.phase_time).total_seconds() if wish.phase_time else 0.0
    if bound is not None and waited >= bound:
        late = timed_out(seen, now, wish, FailureClass.PROVISION_TIMEOUT, bound, **_over(seen, begun, now))
        return Decision(preflight_left(seen), late.status, late.requeue_after)
    return Decision(status=wish, requeue_after=config.intervals.provisioning_seconds)


def _unread(begun: PreflightStatus, job: Unknown) -> Fact:
    """ClusterReady=False: nothing is made beside a Job that may be there."""
    text = f"Job {begun.job} cannot be read: {job.reason[:_SHOWN]} -> {WAITS[Reason.CLUSTER_REFUSED]}"
    return Fact(value=False, reason=Reason.CLUSTER_REFUSED, message=text)


def _wait(job: PreflightJob) -> Fact:
    """ClusterReady=False: what the preflight's pod waits for, or that it looks."""
    if not job.owned:
        return Fact(False, Reason.PREFLIGHT, f"Job {job.name} exists and does not belong to this resource")
    if job.pod is None:
        told = f": {job.warning.reason}: {job.warning.message[:_SHOWN]}" if job.warning is not None else ""
        held = "Job {} is suspended, by a queue perhaps" if job.suspended else "Job {} has no pod yet"
        return Fact(value=False, reason=Reason.PREFLIGHT, message=f"{held.format(job.name)}{told}")
    obstacle = pod_obstacle(job.pod)
    if obstacle is None or obstacle[0] in (Reason.PROVISIONING, Reason.POD_FAILED):
        doing = "looks at storage, model and data" if job.pod.ready else "is starting"
        words = f": {obstacle[1]}" if obstacle is not None else ""
        return Fact(value=False, reason=Reason.PREFLIGHT, message=f"{job.pod.name} {doing}{words}")
    reason, words = obstacle
    remedy = WAITS.get(reason)
    text = f"preflight: {words[:_SHOWN]}"
    return Fact(value=False, reason=reason, message=f"{text} -> {remedy}" if remedy else text)


def _judged(seen: Observed, now: datetime, result: PreflightResult, begun: PreflightStatus) -> Decision:
    over = _over(seen, begun, now)
    if not result.findings:
        unchecked = f"; not told from here: {'; '.join(result.unchecked)}" if result.unchecked else ""
        fact = Fact(value=True, reason=Reason.PREFLIGHT_PASSED, message=f"nothing was found{unchecked}")
        return Decision(preflight_left(seen), _going_on(seen, now, fact, over), requeue_after=0)
    first, *others = result.findings
    words = "; ".join(f"{number}. {finding}" for number, finding in enumerate(result.findings, 1))
    cause = Cause(
        first.failure_class,
        f"preflight: {words}" if others else f"preflight: {first.field}: {first.message}",
        remedy=f"{'correct all of it' if others else first.remedy}; then set a new spec.retry.token",
    )
    facts = {
        ConditionType.PREFLIGHTED: Fact(value=False, reason=first.failure_class, message=cause.message),
        ConditionType.CLUSTER_READY: None,
    }
    decision = failed(seen, now, cause, facts, **over)
    return Decision(preflight_left(seen), decision.status, decision.requeue_after)


def _given_up(seen: Observed, now: datetime, begun: PreflightStatus, why: str) -> Decision:
    message = f"the run goes on without a preflight, which came to no result: {why}"
    fact = Fact(value=None, reason=Reason.PREFLIGHT_INCOMPLETE, message=message)
    return Decision(preflight_left(seen), _going_on(seen, now, fact, _over(seen, begun, now)), requeue_after=0)


def _going_on(seen: Observed, now: datetime, fact: Fact, changes: dict[str, Any]) -> FineTuneStatus:
    message = f"preflight: {fact.message}; about to make the RayCluster"
    facts: dict[ConditionType, Fact | None] = {
        ConditionType.PREFLIGHTED: fact,
        ConditionType.CLUSTER_READY: Fact(
            value=False, reason=Reason.PROVISIONING, message="there is no RayCluster yet"
        ),
    }
    return report(seen.run, now, Phase.PROVISIONING, Reason.PROVISIONING, message, facts, **changes)


def _told(seen: Observed, now: datetime, fact: Fact, begun: PreflightStatus) -> FineTuneStatus:
    facts = {
        ConditionType.PREFLIGHTED: Fact(value=None, reason=Reason.PREFLIGHT, message="it has no result yet"),
        ConditionType.CLUSTER_READY: fact,
    }
    changes: dict[str, Any] = {"preflight": begun, **_token(seen)}
    return report(seen.run, now, Phase.PROVISIONING, fact.reason, fact.message, facts, **changes)


def _over(seen: Observed, begun: PreflightStatus, now: datetime) -> dict[str, Any]:
    return {"preflight": begun.model_copy(update={"end_time": now}), **_token(seen)}


def _token(seen: Observed) -> dict[str, Any]:
    """The token of the spec that is looked at: in the book as an older one, it would bring back what this look ended."""
    spec, status = seen.run.spec, seen.run.status
    return {"retry_token": (spec.retry.token if spec is not None else None) or status.retry_token}
