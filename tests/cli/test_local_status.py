"""The status of a run without an API server: what each word of the trainer becomes, for people and for kstatus."""

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest

from dsft_api.conditions import ConditionType, ExitCode, FailureClass, Phase
from dsft_api.progress import Progress, TrainerFailure, TrainerPhase
from dsft_api.status import CheckpointRef, Checkpoints, FineTuneStatus, Inputs, ProgressStatus
from dsft_cli.local_status import MAX_ATTEMPTS, status_of

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)

PREFIX = "file:///runs/default/tiny-00000000"

CHECKPOINT = CheckpointRef(
    uri=f"{PREFIX}/checkpoints/step-00000006-a1.g1",
    step=6,
    world_size=2,
    bytes=1,
    time=NOW,
    digest="sha256:1",
)
DIVERGED = TrainerFailure(
    failure_class=FailureClass.DIVERGED, message="the loss is nan", remedy="lower it", exit_code=ExitCode.DIVERGED
)


def told(phase: TrainerPhase, *, step: int | None = None, failure: TrainerFailure | None = None) -> Progress:
    """A progress document of attempt 1."""
    return Progress(
        seq=1,
        run_uid="00000000-0000-0000-0000-000000000000",
        attempt=1,
        phase=phase,
        progress=None if step is None else ProgressStatus(step=step, total_steps=24),
        failure=failure,
        updated_at=NOW,
    )


def status(
    progress: Progress,
    previous: FineTuneStatus | None = None,
    *,
    now: datetime = NOW,
    exit_code: int | None = None,
) -> FineTuneStatus:
    return status_of(
        progress,
        previous,
        spec_hash="sha256:0",
        storage_prefix=PREFIX,
        logs=f"{PREFIX}/logs",
        now=now,
        exit_code=exit_code,
    )


def conditions(of: FineTuneStatus) -> dict[str, str]:
    return {str(condition.type): condition.status for condition in of.conditions}


class Row(NamedTuple):
    """What the trainer told, how it ended, and what the status then says."""

    told: Progress
    exit_code: int | None
    phase: Phase
    ready: str
    succeeded: str
    others: tuple[str, ...]
    reason: str
    message: str


P, T, F = Phase, "True", "False"
REMEDY = "Diverged: the loss is nan -> lower it"
AGAIN = "interrupted; run the same command again to go on from the last checkpoint"
DIED = "the trainer died without a word; read the log, then run the same command again"

ROWS = {
    "starting": Row(
        told(TrainerPhase.STARTING), None, P.STARTING, F, "Unknown", ("Reconciling",), "Starting", "Starting"
    ),
    "loading": Row(
        told(TrainerPhase.LOADING), None, P.STARTING, F, "Unknown", ("Reconciling",), "Starting", "Starting"
    ),
    "training": Row(told(TrainerPhase.TRAINING, step=3), None, P.RUNNING, T, "Unknown", (), "Training", "step 3 of 24"),
    "evaluating": Row(
        told(TrainerPhase.EVALUATING, step=3), None, P.RUNNING, T, "Unknown", (), "Training", "step 3 of 24"
    ),
    "saving": Row(told(TrainerPhase.SAVING, step=3), None, P.RUNNING, T, "Unknown", (), "Training", "step 3 of 24"),
    "exporting": Row(told(TrainerPhase.EXPORTING), None, P.EXPORTING, T, "Unknown", (), "Exporting", "Exporting"),
    "succeeded": Row(told(TrainerPhase.SUCCEEDED), None, P.SUCCEEDED, T, T, (), "Succeeded", "Succeeded"),
    "interrupted": Row(told(TrainerPhase.INTERRUPTED), None, P.SUSPENDED, F, "Unknown", (), "Interrupted", AGAIN),
    "failed": Row(told(TrainerPhase.FAILED, failure=DIVERGED), None, P.FAILED, F, F, ("Stalled",), "Diverged", REMEDY),
    "ended well": Row(told(TrainerPhase.SUCCEEDED), 0, P.SUCCEEDED, T, T, (), "Succeeded", "Succeeded"),
    "ended by a signal while it loaded": Row(
        told(TrainerPhase.LOADING), 6, P.SUSPENDED, F, "Unknown", (), "Interrupted", AGAIN
    ),
    "ended with a reason": Row(
        told(TrainerPhase.FAILED, failure=DIVERGED), 5, P.FAILED, F, F, ("Stalled",), "Diverged", REMEDY
    ),
    "killed while it trained": Row(
        told(TrainerPhase.TRAINING, step=3), 1, P.FAILED, F, F, ("Stalled",), "Unknown", DIED
    ),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_the_trainer_tells_becomes_a_status(row: Row) -> None:
    result = status(row.told, exit_code=row.exit_code)
    assert result.phase is row.phase
    assert result.message == row.message
    expected = {"Accepted": T, "Ready": row.ready, "Succeeded": row.succeeded, "CheckpointAvailable": F}
    assert conditions(result) == expected | dict.fromkeys(row.others, T)
    reasons = {condition.type: condition.reason for condition in result.conditions}
    assert reasons[ConditionType.READY] == reasons[ConditionType.SUCCEEDED] == row.reason
    ended = row.phase in (Phase.SUCCEEDED, Phase.FAILED)
    assert (result.completion_time == NOW) is ended


def test_a_condition_keeps_the_time_of_its_last_change() -> None:
    before = status(told(TrainerPhase.LOADING))
    running = status(told(TrainerPhase.TRAINING, step=1), before, now=LATER)
    since = {condition.type: condition.last_transition_time for condition in running.conditions}
    assert since[ConditionType.ACCEPTED] == NOW
    assert since[ConditionType.SUCCEEDED] == NOW
    assert since[ConditionType.READY] == LATER
    again = status(told(TrainerPhase.TRAINING, step=2), running, now=LATER + timedelta(minutes=1))
    assert {c.type: c.last_transition_time for c in again.conditions} == since


def test_a_committed_checkpoint_is_a_condition() -> None:
    progress = told(TrainerPhase.TRAINING, step=7).model_copy(
        update={"checkpoints": Checkpoints(latest=CHECKPOINT, retained=(CHECKPOINT,))}
    )
    available = {c.type: c for c in status(progress).conditions}[ConditionType.CHECKPOINT_AVAILABLE]
    assert (available.status, available.reason, available.message) == (T, "Committed", "step 6")


def test_an_attempt_is_told_from_start_to_end() -> None:
    training = status(told(TrainerPhase.TRAINING, step=3))
    [attempt] = training.attempts
    assert (attempt.start_time, attempt.end_time, attempt.to_step, attempt.exit_code) == (NOW, None, 3, None)
    failed = status(told(TrainerPhase.FAILED, step=4, failure=DIVERGED), training, now=LATER, exit_code=5)
    [attempt] = failed.attempts
    assert (attempt.start_time, attempt.end_time, attempt.to_step, attempt.exit_code) == (NOW, LATER, 4, 5)
    assert attempt.failure_class is FailureClass.DIVERGED
    assert attempt.message == "the loss is nan"


def test_the_next_attempt_keeps_what_is_known_and_the_earlier_attempts() -> None:
    first = status(told(TrainerPhase.INTERRUPTED, step=3), exit_code=6)
    progress = told(TrainerPhase.LOADING).model_copy(update={"attempt": 2})
    second = status(progress, first, now=LATER)
    assert [attempt.number for attempt in second.attempts] == [1, 2]
    assert second.attempts[0] == first.attempts[0]
    assert second.progress == first.progress
    assert second.start_time == NOW
    assert second.attempt == 2


def test_the_last_attempts_are_kept_when_there_are_many() -> None:
    current: FineTuneStatus | None = None
    for number in range(1, MAX_ATTEMPTS + 3):
        progress = told(TrainerPhase.INTERRUPTED).model_copy(update={"attempt": number})
        current = status(progress, current, exit_code=6)
    assert current is not None
    assert [attempt.number for attempt in current.attempts] == list(range(3, MAX_ATTEMPTS + 3))
    assert current.start_time == NOW


def test_a_long_message_is_cut_to_what_the_schema_allows() -> None:
    failure = DIVERGED.model_copy(update={"message": "x" * 4096})
    failed = status(told(TrainerPhase.FAILED, failure=failure), exit_code=5)
    assert len(failed.message or "") == 4096
    assert len(failed.attempts[0].message or "") == 1024


def test_what_the_first_attempt_found_stays_known():
    found = Inputs(model_revision="c0ffee", data_digest="sha256:1")
    first = status(told(TrainerPhase.TRAINING).model_copy(update={"resolved": found}))
    later = status(told(TrainerPhase.STARTING), first, now=LATER)
    assert later.resolved is not None
    assert (later.resolved.model_revision, later.resolved.data_digest) == ("c0ffee", "sha256:1")
    assert later.resolved.storage_prefix == PREFIX
