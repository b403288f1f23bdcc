"""How an attempt failed, from the best witness there is: the trainer's own report, then Kubernetes, then Ray."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from dsft_api.conditions import ExitCode, FailureClass
from dsft_api.progress import Progress
from dsft_api.spec import FineTuneSpec
from dsft_operator.core.avoidance import blamed
from dsft_operator.core.observed import Ended, Observed, RayJob

_BY_EXIT_CODE = {
    ExitCode.BAD_INPUT: FailureClass.CONFIG_INVALID,
    ExitCode.ACCESS: FailureClass.STORAGE_DENIED,
    ExitCode.OUT_OF_MEMORY: FailureClass.HOST_OOM,
    ExitCode.DIVERGED: FailureClass.DIVERGED,
    ExitCode.INTERRUPTED: FailureClass.PREEMPTED,
    ExitCode.HANG: FailureClass.HANG,
    ExitCode.GPU_FAULT: FailureClass.GPU_FAULT,
}
# What Ray's memory monitor says when it killed a worker; the pod shows nothing then.
_RAY_OOM = ("running low on memory", "OutOfMemoryError")
# Classes that may be only the echo of a node's trouble, which Kubernetes saw.
_ECHOES = (FailureClass.UNKNOWN, FailureClass.WORKER_LOST, FailureClass.USER_CODE)
# Between the clocks of nodes and operator; attempts are further apart (intervals.backoffSeconds).
_CLOCK_SLACK = timedelta(seconds=5)
_SHOWN = 3


@dataclass(frozen=True)
class Cause:
    """Class, message and exit code of a failed attempt."""

    failure_class: FailureClass
    message: str
    exit_code: int | None = None
    remedy: str | None = None
    evidence: str | None = None
    nodes: tuple[str, ...] = ()

    def within(self, length: int) -> str:
        """It in so many characters: what happened is cut short, and not what to do."""
        left = max(0, length - len(str(replace(self, message=""))))
        return str(replace(self, message=self.message[:left]))[:length]

    def __str__(self) -> str:
        return f"{self.failure_class}: {self.message} -> {self.remedy or self.failure_class.failure.remedy}"


def classify(seen: Observed, spec: FineTuneSpec, job: RayJob) -> Cause:
    """The cause of a submission that did not succeed."""
    told = _told(seen)
    if told is not None and told.failure_class not in _ECHOES:
        return told
    if (killed := _oom_killed(evidence_of(seen))) is not None:
        return killed
    words = f"{job.message} {told.message if told else ''}"
    if any(sign in words for sign in _RAY_OOM):
        return Cause(FailureClass.HOST_OOM, _last_line(words, _RAY_OOM), job.exit_code)
    if (taken := _disrupted(evidence_of(seen))) is not None:
        return taken
    if told is not None:
        return told
    if job.error_type and job.error_type.startswith("JOB_SUPERVISOR_ACTOR"):
        return Cause(FailureClass.HEAD_LOST, f"Ray lost the driver: {job.error_type}", job.exit_code)
    by_code = _BY_EXIT_CODE.get(ExitCode(job.exit_code)) if job.exit_code in set(ExitCode) else None
    unknown = FailureClass.USER_CODE if spec.program is not None else FailureClass.UNKNOWN
    return Cause(by_code or unknown, _tail(job.message) or f"the driver ended as {job.state}", job.exit_code)


def loss(seen: Observed, message: str) -> Cause:
    """The cause of an attempt that cannot be followed any more: what Kubernetes saw, else the head is lost."""
    evidence = evidence_of(seen)
    return _oom_killed(evidence) or _disrupted(evidence) or Cause(FailureClass.HEAD_LOST, message)


def with_evidence(cause: Cause, seen: Observed) -> Cause:
    """The cause with how containers ended in this attempt, and where, for the book: the pods are about to go."""
    signs = [str(ended) for ended in evidence_of(seen)[-_SHOWN:]]
    signs += [f"node {name}: {trouble}" for name, trouble in seen.nodes.items()]
    ends = "; ".join(dict.fromkeys(text for text in signs if text not in cause.message))
    told = report_of(seen)
    failure = told.failure if told is not None else None
    host = failure.host if failure is not None else None
    nodes = blamed(cause.failure_class, evidence_of(seen), seen.pods, host)
    cause = replace(cause, evidence=failure.evidence if failure is not None else None, nodes=nodes)
    if not ends:
        return cause
    return replace(cause, message=f"{cause.message[:500]} (seen: {ends[:400]})")


def suspect_nodes(seen: Observed, now: datetime) -> tuple[str, ...]:
    """Those of which it matters what Kubernetes says: containers ended there, or do not end though they should."""
    ends = [ended.node for ended in evidence_of(seen)[-_SHOWN:]]
    late = [pod.node for pod in seen.pods if pod.gone_by is not None and pod.gone_by < now]
    return tuple(dict.fromkeys(node for node in (*ends, *late) if node))[:_SHOWN]


def is_echo(cause: Cause) -> bool:
    """Whether Kubernetes may know better than the trainer, a moment later."""
    return cause.failure_class in _ECHOES


def evidence_of(seen: Observed) -> tuple[Ended, ...]:
    """How containers ended in the current attempt: a pod also shows ends of the attempts before."""
    last = seen.run.status.attempts[-1] if seen.run.status.attempts else None
    if last is None:
        return seen.evidence
    since = last.start_time - _CLOCK_SLACK
    return tuple(ended for ended in seen.evidence if ended.at is None or ended.at >= since)


def report_of(seen: Observed) -> Progress | None:
    """The trainer's document, if it is about the current attempt."""
    progress, run = seen.progress, seen.run
    if isinstance(progress, Progress) and progress.run_uid == run.uid and progress.attempt == run.status.attempt:
        return progress
    return None


def _told(seen: Observed) -> Cause | None:
    progress = report_of(seen)
    if progress is None or progress.failure is None:
        return None
    failure = progress.failure
    return Cause(failure.failure_class, failure.message, failure.exit_code, failure.remedy)


def _oom_killed(evidence: tuple[Ended, ...]) -> Cause | None:
    killed = next((ended for ended in evidence if ended.reason == "OOMKilled"), None)
    if killed is None:
        return None
    text = f"the kernel killed it for memory: {killed}"
    remedy = "give the head more memory in spec.head.resources" if killed.role == "head" else None
    return Cause(FailureClass.HOST_OOM, text, killed.exit_code, remedy)


def _disrupted(evidence: tuple[Ended, ...]) -> Cause | None:
    taken = next((ended for ended in evidence if ended.disrupted), None)
    return Cause(FailureClass.PREEMPTED, f"Kubernetes took a pod away: {taken}") if taken is not None else None


def _last_line(text: str, signs: tuple[str, ...]) -> str:
    lines = [line for line in text.splitlines() if any(sign in line for sign in signs)]
    return (lines or [text])[-1].strip()[:1000]


def _tail(message: str) -> str:
    return message.strip()[-1000:]
