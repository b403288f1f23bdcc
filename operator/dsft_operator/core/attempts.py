"""The book of attempts inside the status: begun, ended, counted, and when the next one may start. Pure."""

from datetime import datetime, timedelta
from typing import Any

from dsft_api import goodput
from dsft_api.conditions import FailureClass
from dsft_api.progress import Progress
from dsft_api.status import Attempt, FineTuneStatus, JobStatus, RayClusterStatus, Resolved
from dsft_operator.core.failures import Cause
from dsft_operator.core.naming import submission_id

MAX_ATTEMPTS = 20
# The status has one object's room: a thousand nodes in twenty attempts would burst it.
MAX_NODES = 64
MAX_BACKOFF_SECONDS = 300.0


def active(status: FineTuneStatus) -> Attempt | None:
    """The attempt that has begun and not ended."""
    last = status.attempts[-1] if status.attempts else None
    return last if last is not None and last.end_time is None else None


def begun(
    status: FineTuneStatus, uid: str, session: str, now: datetime, nodes: tuple[str, ...], gpus: int
) -> dict[str, Any]:
    """Changes of status that state the next attempt's intent: its number, submission id and session."""
    number = (status.attempt or 0) + 1
    cluster = status.ray_cluster or RayClusterStatus(name="")
    attempt = Attempt(
        number=number,
        incarnation=cluster.incarnation,
        start_time=now,
        # Until the trainer tells: what it starts from counts as no progress, even if it never says a word.
        from_step=_committed(status),
        nodes=nodes[:MAX_NODES],
        gpus=gpus or None,
    )
    return {
        "attempt": number,
        "attempts": (*status.attempts, attempt)[-MAX_ATTEMPTS:],
        "job": JobStatus(submission_id=submission_id(uid, number)),
        "ray_cluster": cluster.model_copy(update={"session": session}),
        "start_time": status.start_time or now,
    }


def followed(status: FineTuneStatus, progress: Progress | None) -> dict[str, Any]:
    """Changes of status that the trainer's document brings."""
    if progress is None:
        return {}
    steps: dict[str, Any] = {"to_step": progress.progress.step} if progress.progress else {}
    if progress.group == 1:
        # Later groups of the attempt start from what it committed itself. A driver that died early names no step; one
        # that passed damaged commits over names an earlier one than was expected.
        fell_back = progress.checkpoints is not None and bool(progress.checkpoints.damaged)
        steps["from_step"] = progress.from_step if fell_back else max(progress.from_step, status.attempts[-1].from_step)
    steps |= {"restarts": progress.restarts, "losses": progress.losses} if progress.restarts else {}
    before = status.attempts[-1]
    last = before.model_copy(update=steps | {"spent": goodput.heard(before, progress)})
    told = progress.checkpoints
    changes = {
        "progress": progress.progress,
        "interconnect": progress.interconnect,
        "evaluation": progress.evaluation,
        # A trainer that has not listed the commits yet does not unmake them.
        "checkpoints": told
        if told is not None and (told.latest is not None or told.failures or told.damaged)
        else None,
        "output": progress.output,
        "checkpoint_request": progress.checkpoint_request,
        "resolved": pinned(status, progress),
    }
    return {name: value for name, value in changes.items() if value is not None} | {
        "attempts": (*status.attempts[:-1], last),
        "usage": goodput.added(status.usage, before, last),
    }


def pinned(status: FineTuneStatus, progress: Progress) -> Resolved:
    """What the run is held to, with what the trainer found and was not known yet. Nothing that is known changes."""
    known = status.resolved or Resolved()
    found = progress.resolved.model_dump(exclude_none=True) if progress.resolved else {}
    return known.model_copy(update=found | known.model_dump(include=set(found), exclude_none=True))


def ended(status: FineTuneStatus, now: datetime, cause: Cause | None, *, counted: bool = True) -> dict[str, Any]:
    """Changes of status that close the active attempt, and count it if it failed without a new commit."""
    last = active(status)
    if last is None:
        return {}
    end = max(now, last.start_time)
    closed = last.model_copy(
        update={
            "end_time": end,
            "failure_class": cause.failure_class if cause else None,
            "exit_code": cause.exit_code if cause else 0,
            "message": cause.within(1024) if cause else None,
            "evidence": cause.evidence if cause else None,
            "failed_nodes": cause.nodes if cause else (),
            "spent": goodput.closed(last, end, succeeded=cause is None),
        }
    )
    attempts = (*status.attempts[:-1], closed)
    before = status.retries or 0
    retries = 0 if cause is None or _committed(status) > last.from_step else before + counted
    usage = goodput.added(status.usage, last, closed)
    seconds = (usage.trained_seconds or 0.0) + (end - last.start_time).total_seconds()
    usage = usage.model_copy(update={"trained_seconds": round(seconds, 1)})
    return {"attempts": attempts, "retries": retries, "usage": usage}


def lost(status: FineTuneStatus, now: datetime, message: str) -> dict[str, Any]:
    """Changes of status where the RayCluster is gone, and the attempt and its submission with it."""
    return ended(status, now, Cause(FailureClass.HEAD_LOST, message)) | {"job": None}


def trained_seconds(status: FineTuneStatus, now: datetime) -> float:
    """Seconds of all attempts so far, also of those that `status.attempts` has forgotten."""
    current = active(status)
    running = max(0.0, (now - current.start_time).total_seconds()) if current is not None else 0.0
    return ((status.usage.trained_seconds if status.usage else None) or 0.0) + running


def next_start(status: FineTuneStatus, backoff_seconds: float) -> datetime | None:
    """When the next attempt may start after a failed one: the wait doubles with each one that made no progress."""
    last = status.attempts[-1] if status.attempts else None
    if last is None or last.end_time is None or last.failure_class is None:
        return None
    doubled = backoff_seconds * 2 ** min(10, max(0, (status.retries or 1) - 1))
    return last.end_time + timedelta(seconds=min(MAX_BACKOFF_SECONDS, doubled))


def _committed(status: FineTuneStatus) -> int:
    return status.checkpoints.latest.step if status.checkpoints and status.checkpoints.latest else 0
