"""The book of attempts inside the status: begun, ended, counted, and when the next one may start. Pure."""

from datetime import datetime, timedelta
from typing import Any

from dsft_api.progress import Progress
from dsft_api.spec import FineTuneSpec
from dsft_api.status import Attempt, FineTuneStatus, JobStatus, RayClusterStatus, Usage
from dsft_operator.core.failures import Cause
from dsft_operator.core.naming import submission_id

MAX_ATTEMPTS = 20
MAX_BACKOFF_SECONDS = 300.0


def active(status: FineTuneStatus) -> Attempt | None:
    """The attempt that has begun and not ended."""
    last = status.attempts[-1] if status.attempts else None
    return last if last is not None and last.end_time is None else None


def begun(status: FineTuneStatus, uid: str, session: str, now: datetime, nodes: tuple[str, ...]) -> dict[str, Any]:
    """Changes of status that state the next attempt's intent: its number, submission id and session."""
    number = (status.attempt or 0) + 1
    cluster = status.ray_cluster or RayClusterStatus(name="")
    attempt = Attempt(number=number, incarnation=cluster.incarnation, start_time=now, nodes=nodes)
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
    latest = progress.progress.step if progress.progress else None
    last = status.attempts[-1].model_copy(update={"from_step": progress.from_step, "to_step": latest})
    changes = {
        "progress": progress.progress,
        "evaluation": progress.evaluation,
        "checkpoints": progress.checkpoints,
        "output": progress.output,
    }
    return {name: value for name, value in changes.items() if value is not None} | {
        "attempts": (*status.attempts[:-1], last)
    }


def ended(status: FineTuneStatus, spec: FineTuneSpec | None, now: datetime, cause: Cause | None) -> dict[str, Any]:
    """Changes of status that close the active attempt, and count it if it failed without a new commit."""
    last = active(status)
    if last is None:
        return {}
    closed = last.model_copy(
        update={
            "end_time": now,
            "failure_class": cause.failure_class if cause else None,
            "exit_code": cause.exit_code if cause else 0,
            "message": str(cause)[:1024] if cause else None,
        }
    )
    attempts = (*status.attempts[:-1], closed)
    committed = status.checkpoints.latest.step if status.checkpoints and status.checkpoints.latest else 0
    retries = 0 if cause is None or committed > last.from_step else (status.retries or 0) + 1
    gpus = spec.gpus if spec is not None else 0
    held = (status.usage.gpu_seconds if status.usage else None) or 0.0
    used = held + gpus * (now - last.start_time).total_seconds()
    return {
        "attempts": attempts,
        "retries": retries,
        "usage": Usage(gpu_seconds=round(used, 1)) if gpus else status.usage,
    }


def trained_seconds(status: FineTuneStatus, now: datetime) -> float:
    """Seconds of all attempts so far."""
    return sum(((attempt.end_time or now) - attempt.start_time).total_seconds() for attempt in status.attempts)


def next_start(status: FineTuneStatus, backoff_seconds: float) -> datetime | None:
    """When the next attempt may start after a failed one: the wait doubles with each one that made no progress."""
    last = status.attempts[-1] if status.attempts else None
    if last is None or last.end_time is None or last.failure_class is None:
        return None
    doubled = backoff_seconds * 2 ** min(10, max(0, (status.retries or 1) - 1))
    return last.end_time + timedelta(seconds=min(MAX_BACKOFF_SECONDS, doubled))
