"""Where the time of a run goes: the arithmetic that the trainer, the operator and `dsft run` share (docs/decisions/0017). Pure.

The trainer charges the time between two documents to what it did in between. Who follows it adds what it cannot know: the time
before its first word and after its last one, and that in which no attempt ran.
"""

from datetime import datetime

from dsft_api.conditions import Phase
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import Attempt, FineTuneStatus, Spent, Usage

_USEFUL = (TrainerPhase.TRAINING, TrainerPhase.EVALUATING, TrainerPhase.EXPORTING)
_WAITS = (Phase.PENDING, Phase.QUEUED, Phase.PROVISIONING)


def charged(told: Progress, now: datetime) -> Spent:
    """The account of a document, with the time since it was written charged to what was done then."""
    spent = told.spent or Spent()
    seconds = max(0.0, (now - told.updated_at).total_seconds())
    if told.phase in _USEFUL:
        return _with(
            spent,
            useful_seconds=spent.useful_seconds + seconds,
            uncommitted_seconds=spent.uncommitted_seconds + seconds,
        )
    if told.phase is TrainerPhase.SAVING:
        return _with(spent, blocked_seconds=spent.blocked_seconds + seconds)
    return _with(spent, restart_seconds=spent.restart_seconds + seconds)


def committed(spent: Spent, useful_then: float) -> Spent:
    """There is a commit of the state in which so much of the time had been useful."""
    return _with(spent, uncommitted_seconds=max(0.0, spent.useful_seconds - useful_then))


def thrown_away(spent: Spent) -> Spent:
    """Ranks were lost: what no commit holds is trained again."""
    return _with(
        spent,
        useful_seconds=spent.useful_seconds - spent.uncommitted_seconds,
        uncommitted_seconds=0.0,
        redone_seconds=spent.redone_seconds + spent.uncommitted_seconds,
    )


def heard(attempt: Attempt, told: Progress) -> Spent:
    """The account of an attempt up to its last document. What the trainer does not account for is the way to its first step."""
    spent = told.spent or Spent()
    before = (told.updated_at - attempt.start_time).total_seconds() - spent.seconds
    return _rounded(_with(spent, restart_seconds=spent.restart_seconds + max(0.0, before)))


def closed(attempt: Attempt, end: datetime, *, succeeded: bool) -> Spent:
    """The account of an attempt that ended then: all of its time."""
    spent = attempt.spent or Spent()
    after = max(0.0, (end - attempt.start_time).total_seconds() - spent.seconds)
    if succeeded:
        return _rounded(_with(spent, useful_seconds=spent.useful_seconds + after, uncommitted_seconds=0.0))
    if spent.uncommitted_seconds:
        # A step that never ended: it stood still until somebody found that it did, or was lost with its head.
        spent = _with(spent, redone_seconds=spent.redone_seconds + after)
    else:
        spent = _with(spent, restart_seconds=spent.restart_seconds + after)
    return _rounded(thrown_away(spent))


def added(usage: Usage | None, before: Attempt, after: Attempt) -> Usage:
    """What the run used, once more is known of one of its attempts."""
    usage = usage or Usage()
    old, new = before.spent or Spent(), after.spent or Spent()
    more, useful = new.seconds - old.seconds, new.useful_seconds - old.useful_seconds
    changes = {
        "useful_seconds": _sum(usage.useful_seconds, useful),
        "redone_seconds": _sum(usage.redone_seconds, new.redone_seconds - old.redone_seconds),
        "blocked_seconds": _sum(usage.blocked_seconds, new.blocked_seconds - old.blocked_seconds),
        "restart_seconds": _sum(usage.restart_seconds, new.restart_seconds - old.restart_seconds),
    }
    if after.gpus:
        changes["gpu_seconds"] = _sum(usage.gpu_seconds, after.gpus * more)
        changes["wasted_gpu_seconds"] = _sum(usage.wasted_gpu_seconds, after.gpus * (more - useful))
    return _rated(usage.model_copy(update=changes))


def waited(before: FineTuneStatus, after: FineTuneStatus, now: datetime) -> FineTuneStatus:
    """The status with the time of a wait that began or ended between the two. The same status where none did."""
    usage = after.usage or Usage()
    since = usage.waiting_since
    waits = after.phase in _WAITS and not _runs(after)
    if waits == (since is not None):
        return after
    if since is None:
        # An attempt may have ended long before anybody could look.
        last = after.attempts[-1] if after.attempts and _runs(before) else None
        begin = last.end_time if last is not None and last.end_time is not None else now
        return after.model_copy(update={"usage": usage.model_copy(update={"waiting_since": begin})})
    seconds = _sum(usage.waiting_seconds, max(0.0, (now - since).total_seconds()))
    usage = _rated(usage.model_copy(update={"waiting_seconds": seconds, "waiting_since": None}))
    return after.model_copy(update={"usage": usage})


def _runs(status: FineTuneStatus) -> bool:
    return bool(status.attempts) and status.attempts[-1].end_time is None


def _rated(usage: Usage) -> Usage:
    useful = usage.useful_seconds or 0.0
    others = (usage.redone_seconds, usage.waiting_seconds, usage.blocked_seconds, usage.restart_seconds)
    total = useful + sum(seconds or 0.0 for seconds in others)
    return usage.model_copy(update={"goodput": round(useful / total, 3) if total else None})


def _sum(known: float | None, more: float) -> float:
    return round(max(0.0, (known or 0.0) + more), 1)


def _rounded(spent: Spent) -> Spent:
    """As the status keeps it, so that sums of it come out the same after each look."""
    return Spent(**{name: round(seconds, 1) for name, seconds in spent})


def _with(spent: Spent, **changes: float) -> Spent:
    return spent.model_copy(update=changes)
