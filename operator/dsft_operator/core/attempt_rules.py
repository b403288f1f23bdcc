"""Rules about the attempt: one submission per attempt, followed to its end, and what comes after it."""

from datetime import datetime
from typing import Any

from dsft_api.conditions import ConditionType, ExitCode, FailureClass, Phase, Reason
from dsft_api.layout import attempt_logs
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import FineTuneStatus, JobStatus, Logs, Resolved
from dsft_operator.config import OperatorConfig
from dsft_operator.core import attempts, saving
from dsft_operator.core.avoidance import avoided
from dsft_operator.core.cluster_rules import failed, is_whole
from dsft_operator.core.decision import Action, Decision, DeleteCluster, StopJob
from dsft_operator.core.failures import Cause, classify, is_echo, loss, report_of, with_evidence
from dsft_operator.core.observed import Head, Observed, Queueing, RayJob, Unknown
from dsft_operator.core.resource_rules import SOON, STOP_MARGIN_SECONDS, driver_runs, live_cluster
from dsft_operator.core.submission import submission
from dsft_operator.core.summary import Fact, condition_of, report
from dsft_operator.core.waiting import explain

# A busy head misses some requests; a dead one is told by its session as soon as it is back.
UNREACHABLE_SECONDS = 180
# Ray starts a driver within seconds, which nothing but looking tells.
FIRST_LOOK_SECONDS = 0.25
# How long a driver that failed is asked for its last document. One that succeeded: as long as a head may be silent.
LAST_WORD_SECONDS = 20
# How long the kubelet may take to tell how a container ended whose end the driver felt at once.
EVIDENCE_SECONDS = 5
_READY = Fact(value=True, reason="AllPodsReady")
_LACKING = "; meanwhile "


def unsubmitted(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """The cluster is whole. The intent (attempt, submission id, session) is in the status before anything is sent."""
    run, status, spec = seen.run, seen.run.status, seen.run.spec
    if attempts.active(status) is None:
        return _intent(seen, now, config)
    cluster = status.ray_cluster
    if status.job is None or status.job.state is not None or seen.job is not None or spec is None or cluster is None:
        return None
    if not isinstance(seen.head, Head) or seen.head.session != cluster.session or status.attempt is None:
        return None
    silent = _silent_seconds(status, now)
    if silent >= UNREACHABLE_SECONDS:
        return _given_up(seen, now, silent, "it does not take the submission")
    prefix = status.resolved.storage_prefix if status.resolved else None
    return Decision((submission(run, spec, status.attempt, prefix or ""),), requeue_after=FIRST_LOOK_SECONDS)


def lost(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """The attempt cannot be followed any more: another session, a submission that Ray forgot, nodes taken back."""
    status, cluster = seen.run.status, live_cluster(seen)
    if attempts.active(status) is None or cluster is None:
        return None
    if status.job is None:
        return again(seen, now, Cause(FailureClass.HEAD_LOST, "the status names no submission"))
    if cluster.suspended:
        return _taken_back(seen, now)
    known = status.ray_cluster
    if isinstance(seen.head, Head) and known is not None and seen.head.session != known.session:
        return again(seen, now, loss(seen, "the Ray head restarted"))
    if isinstance(seen.head, Head) and seen.job is None:
        return again(seen, now, loss(seen, "Ray does not know the submission any more"))
    if isinstance(seen.head, Head) and not isinstance(seen.job, Unknown):
        return None
    words = next((part.reason for part in (seen.head, seen.job) if isinstance(part, Unknown)), "the head is not ready")
    silent = _silent_seconds(status, now)
    if silent >= UNREACHABLE_SECONDS:
        return _given_up(seen, now, silent, words)
    return Decision(status=_silent(seen, now, words), requeue_after=config.intervals.provisioning_seconds)


def running(seen: Observed, now: datetime, config: OperatorConfig) -> Decision | None:
    """The driver runs: pass on what the trainer tells."""
    run, job, spec = seen.run, seen.job, seen.run.spec
    if not isinstance(job, RayJob) or job.is_over or spec is None:
        return None
    progress = report_of(seen)
    if (overtime := _overtime(seen, now)) is not None:
        return _stopped(seen, now, job, overtime)
    phase, message = _doing(seen, progress)
    told = _told(seen, job, progress)
    facts = _facts(run.status, told)
    cluster = live_cluster(seen)
    if cluster is not None and not is_whole(seen):
        lacking = explain(spec, seen, cluster)
        if (overdue := _overdue(seen, now, job, lacking)) is not None:
            return overdue
        facts[ConditionType.CLUSTER_READY] = lacking
        message = f"{message.partition(_LACKING)[0]}{_LACKING}{lacking.message}"
    request = saving.asked(seen, progress)
    if not isinstance(seen.progress, Unknown):
        message = f"{message.partition(saving.MARK)[0]}{request.words}"
    wish = report(run, now, phase, _REASONS[phase], message, facts, **told)
    is_soon = job.state == "PENDING" or request.is_soon
    return Decision(request.actions, wish, SOON if is_soon else config.intervals.running_seconds)


def _overdue(seen: Observed, now: datetime, job: RayJob, lacking: Fact) -> Decision | None:
    """Lost pods have not come back within the deadline: the ranks that are left wait in vain."""
    status, spec = seen.run.status, seen.run.spec
    before = condition_of(status, ConditionType.CLUSTER_READY)
    bound = spec.deadlines.provision_seconds if spec is not None else None
    if bound is None or before is None or before.status == "True":
        return None
    if (now - before.last_transition_time).total_seconds() < bound:
        return None
    words = f"the nodes of the attempt were not whole again within {bound} s ({lacking.reason}: {lacking.message})"
    told = _told(seen, job, report_of(seen))
    facts = _heard(status, told) | {ConditionType.CLUSTER_READY: lacking}
    decision = failed(seen, now, Cause(FailureClass.PROVISION_TIMEOUT, words), facts, **told)
    return Decision((StopJob(job.submission_id),), decision.status, decision.requeue_after)


def over(seen: Observed, now: datetime, _config: OperatorConfig) -> Decision | None:
    """The driver ended. Its exit code and its last document decide; a stopped job has no exit code."""
    run, job, spec = seen.run, seen.job, seen.run.spec
    if not isinstance(job, RayJob) or spec is None:
        return Decision(requeue_after=SOON)
    progress = report_of(seen)
    if (unread := _unread(seen, now, job)) is not None:
        return Decision(status=unread, requeue_after=SOON)
    told = _told(seen, job, progress)
    if progress is not None and progress.phase is TrainerPhase.SUCCEEDED:
        after = run.status.model_copy(update=told)
        told |= attempts.ended(after, _end(job, now), None)
        ended = progress.message or "done"
        message = f"{ended}: {progress.output.uri}" if progress.output else ended
        facts = _facts(run.status, told)
        wish = report(run, now, Phase.SUCCEEDED, Reason.SUCCEEDED, message, facts, completion_time=now, **told)
        return Decision(status=wish, requeue_after=0)
    cause = _cause(seen, job, progress)
    if cause.failure_class is FailureClass.PREEMPTED:
        cause = _overtime(seen, _end(job, now)) or cause
    age = (now - job.ended).total_seconds() if job.ended is not None else EVIDENCE_SECONDS
    if is_echo(cause) and 0 <= age < EVIDENCE_SECONDS:
        return Decision(requeue_after=SOON)
    # A head that lost its driver is not whole, whatever its readiness says.
    return again(seen, now, cause, *(_broken(seen) if cause.failure_class is FailureClass.HEAD_LOST else ()))


def _unread(seen: Observed, now: datetime, job: RayJob) -> FineTuneStatus | None:
    """The status while an ended driver's last document may yet be read; None once it was, or patience is over.

    A driver that succeeded has always left one: to go on without it would train again.
    """
    status, succeeded = seen.run.status, job.state == "SUCCEEDED"
    if isinstance(seen.progress, Unknown):
        reason = seen.progress.reason
    elif succeeded and seen.progress is None:
        reason = "Ray has no such file"
    else:
        return None
    words = f"the driver has ended, and its last words cannot be read: {reason}"
    if status.job is None or status.job.state != job.state:
        # Patience counts from here: the head may have been silent for long before it told that the driver ended.
        told = _told(seen, job, None)
        phase = status.phase or Phase.STARTING
        return report(seen.run, now, phase, Reason.RAY_UNREACHABLE, words, _heard(status, told), **told)
    patience = UNREACHABLE_SECONDS if succeeded else LAST_WORD_SECONDS
    return _silent(seen, now, words) if _silent_seconds(status, now) < patience else None


def _end(job: RayJob | None, now: datetime) -> datetime:
    """When the driver ended, which may be long before anybody could look."""
    return min(now, job.ended) if job is not None and job.ended is not None else now


def again(seen: Observed, now: datetime, cause: Cause, *actions: Action, counted: bool = True) -> Decision:
    """Close the attempt: the next one follows where that can help, else the run has failed. `counted`: as a retry."""
    status, spec = seen.run.status, seen.run.spec
    cause = with_evidence(cause, seen)
    job = seen.job if isinstance(seen.job, RayJob) else None
    changes = _told(seen, job, report_of(seen))
    changes |= attempts.ended(status.model_copy(update=changes), _end(job, now), cause, counted=counted)
    changes["avoided_nodes"] = avoided(status.model_copy(update=changes), spec)
    retries, limit = changes.get("retries") or 0, spec.retry.limit if spec is not None else 0
    fact = Fact(value=False, reason=cause.failure_class, message=cause.message)
    facts = _heard(status, changes) if job is not None else {ConditionType.JOB_SUBMITTED: fact}
    if not cause.failure_class.failure.retried:
        return failed(seen, now, cause, facts, **changes)
    once = cause.failure_class is FailureClass.HOST_OOM
    if retries > (min(1, limit) if once else limit):
        spent = Cause(
            cause.failure_class,
            f"{cause.message} ({retries} attempts in a row without a new checkpoint)",
            cause.exit_code,
            f"{cause.remedy or cause.failure_class.failure.remedy}; then set a new spec.retry.token",
        )
        return failed(seen, now, spent, facts, **changes)
    message = f"attempt {status.attempt} ended: {cause}; going on from the last commit"
    wish = report(
        seen.run, now, Phase.PENDING, Reason.RESTARTING, message, {ConditionType.JOB_SUBMITTED: fact}, **changes
    )
    return Decision(actions, wish, requeue_after=0)


_REASONS = {
    Phase.STARTING: Reason.STARTING,
    Phase.RUNNING: Reason.TRAINING,
    Phase.EXPORTING: Reason.EXPORTING,
}


def _intent(seen: Observed, now: datetime, config: OperatorConfig) -> Decision:
    run, status, spec = seen.run, seen.run.status, seen.run.spec
    assert isinstance(seen.head, Head), "rule waiting comes first"  # noqa: S101
    assert spec is not None, "rule refused comes first"  # noqa: S101
    if driver_runs(seen) and status.job is not None:
        message = f"waiting until the driver of {status.job.submission_id} has ended"
        wish = report(run, now, Phase.PENDING, Reason.RESTARTING, message, {ConditionType.CLUSTER_READY: _READY})
        return Decision((StopJob(status.job.submission_id),), wish, SOON)
    if (overtime := _overtime(seen, now)) is not None:
        return failed(seen, now, overtime)
    start = attempts.next_start(status, config.intervals.backoff_seconds)
    if start is not None and now < start:
        last = status.attempts[-1]
        message = f"attempt {last.number} ended ({last.message}); the next one starts at {start:%H:%M:%S} UTC"
        wish = report(run, now, Phase.PENDING, Reason.RESTARTING, message, {ConditionType.CLUSTER_READY: _READY})
        return Decision(status=wish, requeue_after=(start - now).total_seconds())
    nodes = tuple(sorted({pod.node for pod in seen.pods if pod.role == "worker" and pod.node}))
    changes = attempts.begun(status, run.uid, seen.head.session, now, nodes, spec.gpus)
    changes["spec_hash"] = status.spec_hash if status.attempt else run.identity
    changes["retry_token"] = spec.retry.token or status.retry_token
    image = next((pod.image_id for pod in seen.pods if pod.image_id), None)
    known = status.resolved or Resolved()
    changes["resolved"] = known.model_copy(update={"image": image})
    changes["logs"] = Logs(uri=f"{known.storage_prefix}/{attempt_logs(changes['attempt'])}")
    facts: dict[ConditionType, Fact | None] = {
        ConditionType.CLUSTER_READY: _READY,
        ConditionType.JOB_SUBMITTED: Fact(value=False, reason=Reason.STARTING, message="about to be submitted"),
    }
    message = f"attempt {changes['attempt']}: submitting {changes['job'].submission_id}"
    return Decision(
        status=report(run, now, Phase.STARTING, Reason.STARTING, message, facts, **changes), requeue_after=0
    )


def _told(seen: Observed, job: RayJob | None, progress: Progress | None) -> dict[str, Any]:
    status: FineTuneStatus = seen.run.status
    changes = attempts.followed(status, progress)
    if job is not None:
        changes["job"] = JobStatus(submission_id=job.submission_id, state=job.state)
    return changes


def _facts(status: FineTuneStatus, told: dict[str, Any]) -> dict[ConditionType, Fact | None]:
    return {ConditionType.CLUSTER_READY: _READY} | _heard(status, told)


def _heard(status: FineTuneStatus, told: dict[str, Any]) -> dict[ConditionType, Fact | None]:
    """The conditions of a submission that Ray knows. The end states them too: what it leaves out would stay as it was."""
    checkpoints = told.get("checkpoints") or status.checkpoints
    summary = checkpoints.summary if checkpoints is not None else ""
    latest = checkpoints.latest if checkpoints is not None else None
    return {
        ConditionType.JOB_SUBMITTED: Fact(value=True, reason=Reason.SUBMITTED),
        ConditionType.CHECKPOINT_AVAILABLE: Fact(value=True, reason=Reason.COMMITTED, message=summary)
        if latest
        else Fact(value=False, reason=Reason.NO_CHECKPOINT, message=summary),
    }


def _silent(seen: Observed, now: datetime, words: str) -> FineTuneStatus:
    """The head gives no good answer about the submission: since when is in its condition."""
    fact = Fact(value=None, reason=Reason.RAY_UNREACHABLE, message=words)
    phase = seen.run.status.phase or Phase.STARTING
    return report(seen.run, now, phase, fact.reason, words, {ConditionType.JOB_SUBMITTED: fact})


def _silent_seconds(status: FineTuneStatus, now: datetime) -> float:
    """For how long the head has given no good answer about the submission."""
    before = condition_of(status, ConditionType.JOB_SUBMITTED)
    is_silent = before is not None and before.status == "Unknown"
    return (now - before.last_transition_time).total_seconds() if before is not None and is_silent else 0.0


def _given_up(seen: Observed, now: datetime, silent: float, words: str) -> Decision:
    """The head is broken: the next attempt gets another cluster."""
    cause = loss(seen, f"the Ray head gave no good answer for {silent:.0f} s: {words}")
    return again(seen, now, cause, *_broken(seen))


def _broken(seen: Observed) -> tuple[DeleteCluster, ...]:
    cluster = live_cluster(seen)
    return () if cluster is None else (DeleteCluster(cluster.name, cluster.uid),)


def _doing(seen: Observed, progress: Progress | None) -> tuple[Phase, str]:
    """Phase and message of a driver that runs. A document that could not be read this time changes nothing."""
    status = seen.run.status
    if progress is None:
        phase = status.phase
        if isinstance(seen.progress, Unknown) and phase is not None and phase in _REASONS and status.message:
            return phase, status.message
        return Phase.STARTING, "the driver is starting"
    phase = progress.phase.phase
    if phase not in _REASONS:
        # The driver has said its last word and is on its way out: the phase before lasts until Ray says that it ended.
        phase = status.phase if status.phase in _REASONS and status.phase is not None else Phase.RUNNING
    return phase, _message(progress)


def _taken_back(seen: Observed, now: datetime) -> Decision | None:
    """The queue takes the nodes back: what the driver says at its end still counts. None: it had done all by then."""
    if isinstance(seen.job, RayJob) and seen.job.state == "SUCCEEDED":
        return None
    if driver_runs(seen) and isinstance(seen.head, Head):
        return _draining(seen, now)
    why = seen.queue.evicted if isinstance(seen.queue, Queueing) else None
    words = f"the queue took the nodes back{f' ({why})' if why else ''}"
    # Nothing that the run could do better: its retries are for failures.
    return again(seen, now, Cause(FailureClass.PREEMPTED, words), counted=False)


def _draining(seen: Observed, now: datetime) -> Decision:
    """The pods are still committing: hear them to the end."""
    progress = report_of(seen)
    message = "the queue takes the nodes back: the trainer commits, and goes on once they are granted again"
    told = attempts.followed(seen.run.status, progress)
    return Decision(
        status=report(seen.run, now, Phase.SUSPENDING, FailureClass.PREEMPTED, message, **told), requeue_after=SOON
    )


def _overtime(seen: Observed, now: datetime) -> Cause | None:
    """The run has trained for as long as it may."""
    bound = seen.run.spec.deadlines.run_seconds if seen.run.spec is not None else None
    if bound is None or attempts.trained_seconds(seen.run.status, now) < bound:
        return None
    return Cause(FailureClass.RUN_TIMEOUT, f"trained for {bound} s, which is spec.deadlines.runSeconds")


def _stopped(seen: Observed, now: datetime, job: RayJob, cause: Cause) -> Decision:
    """Stop the driver, and hear its last commit; a driver that does not end is left to the deletion of its pods."""
    status, spec = seen.run.status, seen.run.spec
    assert spec is not None, "rule refused comes first"  # noqa: S101
    # Since it was first asked to stop: a bound may be set, or an operator come back, long after the time was up.
    since = status.phase_time if status.phase is Phase.SUSPENDING and status.phase_time else now
    told = _told(seen, job, report_of(seen))
    facts = _heard(status, told)
    if (now - since).total_seconds() >= spec.checkpoint.drain_seconds + STOP_MARGIN_SECONDS:
        decision = failed(seen, now, cause, facts, **told)
        return Decision((StopJob(job.submission_id),), decision.status, decision.requeue_after)
    message = f"{cause.message}: the trainer commits, and the run ends"
    wish = report(seen.run, now, Phase.SUSPENDING, cause.failure_class, message, facts, **told)
    return Decision((StopJob(job.submission_id),), wish, SOON)


def _message(progress: Progress) -> str:
    if progress.phase.phase is Phase.RUNNING and progress.progress is not None:
        step = f"step {progress.progress.step} of {progress.progress.total_steps}"
        # Of a save before it that storage is slow to take, say: a wait like any other, which says what it is for.
        return f"{step}; training waits for a checkpoint to be saved" if progress.phase is TrainerPhase.SAVING else step
    return progress.message or str(progress.phase)


def _cause(seen: Observed, job: RayJob, progress: Progress | None) -> Cause:
    interrupted = progress is not None and progress.phase is TrainerPhase.INTERRUPTED
    if interrupted or job.state == "STOPPED" or job.exit_code == ExitCode.INTERRUPTED:
        text = "stopped on request, after a commit" if interrupted else "the driver was stopped"
        return Cause(FailureClass.PREEMPTED, text, int(ExitCode.INTERRUPTED))
    assert seen.run.spec is not None, "rule refused comes first"  # noqa: S101
    if job.state == "SUCCEEDED":
        return Cause(FailureClass.UNKNOWN, "the driver ended well and left no result", 0)
    return classify(seen, seen.run.spec, job)
