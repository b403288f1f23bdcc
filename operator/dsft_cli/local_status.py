"""The status of a run without an API server, derived from what its trainer told. Pure.

The same words and conditions as on a cluster, so that a script that reads one reads the other.
"""

from collections.abc import Iterable
from datetime import datetime

from dsft_api import goodput
from dsft_api.conditions import ConditionType, ExitCode, Phase, Reason
from dsft_api.job import CONTRACT
from dsft_api.progress import Progress
from dsft_api.status import Attempt, Condition, FineTuneStatus, Logs, Resolved

MAX_ATTEMPTS = 20


def status_of(
    progress: Progress,
    previous: FineTuneStatus | None,
    *,
    spec_hash: str,
    storage_prefix: str,
    logs: str,
    now: datetime,
    exit_code: int | None = None,
    gpus: int | None = None,
) -> FineTuneStatus:
    """The status after a progress document; with `exit_code` once the trainer ended.

    `previous` is the status before it, for times of transitions and earlier attempts; `gpus` what the attempt has, where known.
    """
    phase = _phase(progress, exit_code)
    message = _message(progress, phase)
    known = previous.attempts if previous else ()
    before = next((a for a in known if a.number == progress.attempt), _begun(progress, now, gpus))
    attempt = _attempt(progress, before, now, exit_code)
    earlier = tuple(a for a in known if a.number != attempt.number)
    ended = phase in (Phase.SUCCEEDED, Phase.FAILED)
    return FineTuneStatus(
        observed_generation=1,
        phase=phase,
        message=message,
        conditions=tuple(_conditions(progress, phase, message, previous, now)),
        spec_hash=spec_hash,
        resolved=_resolved(progress, previous, storage_prefix),
        attempt=progress.attempt,
        progress=progress.progress or (previous.progress if previous else None),
        interconnect=progress.interconnect or (previous.interconnect if previous else None),
        evaluation=progress.evaluation or (previous.evaluation if previous else None),
        checkpoints=progress.checkpoints or (previous.checkpoints if previous else None),
        output=progress.output,
        attempts=(*earlier, attempt)[-MAX_ATTEMPTS:],
        usage=goodput.added(previous.usage if previous else None, before, attempt),
        start_time=previous.start_time if previous and previous.start_time else attempt.start_time,
        completion_time=now if ended else None,
        logs=Logs(uri=logs),
    )


def _resolved(progress: Progress, previous: FineTuneStatus | None, storage_prefix: str) -> Resolved:
    before = previous.resolved if previous and previous.resolved else Resolved()
    found = progress.resolved.model_dump(exclude_none=True) if progress.resolved else {}
    return before.model_copy(update={**found, "contract": CONTRACT, "storage_prefix": storage_prefix})


def _phase(progress: Progress, exit_code: int | None) -> Phase:
    if exit_code is None:
        return progress.phase.phase
    if exit_code == ExitCode.OK:
        return Phase.SUCCEEDED
    return Phase.SUSPENDED if exit_code == ExitCode.INTERRUPTED else Phase.FAILED


def _message(progress: Progress, phase: Phase) -> str:
    if progress.failure is not None:
        text = f"{progress.failure.failure_class}: {progress.failure.message} -> {progress.failure.remedy}"
    elif phase is Phase.SUSPENDED:
        text = "interrupted; run the same command again to go on from the last checkpoint"
    elif phase is Phase.FAILED:
        text = "the trainer died without a word; read the log, then run the same command again"
    elif phase is Phase.RUNNING and progress.progress is not None:
        text = f"step {progress.progress.step} of {progress.progress.total_steps}"
    else:
        text = progress.message or str(phase)
    return text[:4096]


def _begun(progress: Progress, now: datetime, gpus: int | None) -> Attempt:
    return Attempt(number=progress.attempt, start_time=now, gpus=gpus or None)


def _attempt(progress: Progress, before: Attempt, now: datetime, exit_code: int | None) -> Attempt:
    failure = progress.failure
    after = before.model_copy(
        update={
            "end_time": None if exit_code is None else now,
            # Later starts of the ranks go on from what the attempt committed itself.
            "from_step": before.from_step if progress.restarts else progress.from_step,
            "to_step": progress.progress.step if progress.progress else None,
            "failure_class": failure.failure_class if failure else None,
            "exit_code": exit_code,
            "message": failure.message[:1024] if failure else None,
            "evidence": failure.evidence if failure else None,
            "restarts": progress.restarts or None,
            "losses": progress.losses,
            "spent": goodput.heard(before, progress),
        }
    )
    if exit_code is None:
        return after
    return after.model_copy(update={"spent": goodput.closed(after, now, succeeded=exit_code == ExitCode.OK)})


def _conditions(
    progress: Progress, phase: Phase, message: str, previous: FineTuneStatus | None, now: datetime
) -> Iterable[Condition]:
    before = {condition.type: condition for condition in (previous.conditions if previous else ())}

    def condition(kind: ConditionType, status: bool | None, reason: str, text: str = "") -> Condition:
        value = "Unknown" if status is None else "True" if status else "False"
        old = before.get(kind)
        since = old.last_transition_time if old is not None and old.status == value else now
        return Condition(
            type=kind, status=value, reason=reason, message=text, last_transition_time=since, observed_generation=1
        )

    failed = phase is Phase.FAILED
    reason = str(progress.failure.failure_class) if progress.failure else _REASONS[phase]
    yield condition(ConditionType.ACCEPTED, True, Reason.ACCEPTED)
    yield condition(ConditionType.READY, phase in (Phase.RUNNING, Phase.EXPORTING, Phase.SUCCEEDED), reason, message)
    if phase is Phase.STARTING:
        yield condition(ConditionType.RECONCILING, True, Reason.STARTING, message)
    if failed:
        yield condition(ConditionType.STALLED, True, reason, message)
    succeeded = True if phase is Phase.SUCCEEDED else False if failed else None
    yield condition(ConditionType.SUCCEEDED, succeeded, reason, message)
    latest = progress.checkpoints.latest if progress.checkpoints else None
    yield condition(
        ConditionType.CHECKPOINT_AVAILABLE,
        latest is not None,
        Reason.COMMITTED if latest else Reason.NO_CHECKPOINT,
        progress.checkpoints.summary if progress.checkpoints else "",
    )


_REASONS: dict[Phase, str] = {
    Phase.STARTING: Reason.STARTING,
    Phase.RUNNING: Reason.TRAINING,
    Phase.EXPORTING: Reason.EXPORTING,
    Phase.SUCCEEDED: Reason.SUCCEEDED,
    Phase.SUSPENDED: Reason.INTERRUPTED,
    Phase.FAILED: "Unknown",
}
