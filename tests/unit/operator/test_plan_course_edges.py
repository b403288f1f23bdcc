"""Courses of a run that are seldom: what was not seen, came late, or came twice."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dsft_api.conditions import ConditionType, FailureClass, Phase
from dsft_api.progress import Progress, TrainerFailure, TrainerPhase
from dsft_api.status import Attempt, CheckpointRef, Checkpoints, Loss
from dsft_operator.core.decision import Decision
from dsft_operator.core.observed import Head, Observed, Unknown
from dsft_operator.core.plan import plan
from dsft_operator.core.resource_rules import SOON
from dsft_operator.core.summary import condition_of
from tests.unit.operator.situations import (
    CONFIG,
    NOW,
    OUTPUT,
    after,
    begin,
    cluster,
    done,
    edited,
    job,
    next_attempt,
    submitted,
    told,
    whole,
)

SUSPEND = {"suspend": True}
REFUSED = {"deepspeed": {"offload": {"params": "cpu"}}}


def ended_by(seen: Observed) -> Attempt:
    return seen.run.status.attempts[-1]


def test_an_attempt_whose_cluster_is_gone_is_closed() -> None:
    refused = edited(submitted(), {"deepspeed": {"offload": {"params": "cpu"}}})
    seen, _ = after(replace(refused, cluster=None, job=None))
    assert ended_by(seen).failure_class is FailureClass.HEAD_LOST
    assert seen.run.status.job is None


def test_an_api_that_is_away_for_a_moment_ends_no_attempt() -> None:
    seen, _ = after(replace(submitted(), cluster=None, kuberay_installed=False, head=None, job=None))
    assert ended_by(seen).end_time is None
    back, _ = after(replace(submitted(), run=seen.run), 5)
    assert back.run.status.attempt == 1
    assert back.run.status.phase is Phase.STARTING


def test_an_edit_of_a_finished_run_is_acknowledged_once() -> None:
    seen, decision = after(edited(done(), {"keepClusterSeconds": 1}))
    assert decision.status is not None
    assert decision.status.observed_generation == 2
    assert plan(seen, NOW, CONFIG) == Decision()


def resumed(committed: int) -> Observed:
    """Attempt 2 has begun on the same cluster, after attempt 1 committed a step."""
    seen = replace(submitted(), progress=told(TrainerPhase.TRAINING, step=committed, committed=committed))
    seen, _ = after(replace(seen, head=Head("session-2", "2.60.0"), job=None))
    seen, _ = after(replace(seen, job=None, progress=None), 10)
    assert seen.run.status.attempt == 2
    return seen


def test_an_attempt_that_died_without_a_word_made_no_progress() -> None:
    seen = resumed(50)
    assert ended_by(seen).from_step == 50
    for session in ("session-3", "session-4"):
        seen, _ = after(replace(seen, head=Head(session, "2.60.0")), 10)
        seen, _ = after(replace(seen, job=None), 400)
    assert seen.run.status.retries == 2


def progress(step: int, committed: int, **facts: Any) -> Progress:
    return told(TrainerPhase.TRAINING, 1, step=step, committed=committed, **facts)


def test_a_group_that_started_again_does_not_hide_what_the_attempt_committed() -> None:
    seen, _ = after(replace(submitted(), progress=progress(30, 20)))
    assert ended_by(seen).restarts is None
    loss = Loss(failure_class=FailureClass.WORKER_LOST, step=30, time=NOW)
    seen, _ = after(replace(seen, progress=progress(25, 20, group=2, from_step=20, restarts=1, losses=(loss,))))
    assert ended_by(seen).from_step == 0
    assert (ended_by(seen).restarts, ended_by(seen).losses) == (1, (loss,))
    seen, _ = after(replace(seen, head=Head("session-2", "2.60.0"), job=None))
    assert seen.run.status.retries == 0


def test_commits_are_not_unmade_by_a_trainer_that_has_not_listed_them_yet() -> None:
    seen = resumed(50)
    early = told(TrainerPhase.LOADING, 2).model_copy(update={"checkpoints": Checkpoints()})
    seen, _ = after(replace(seen, job=job("RUNNING", 2), progress=early), 10)
    latest = seen.run.status.checkpoints and seen.run.status.checkpoints.latest
    assert isinstance(latest, CheckpointRef)
    available = condition_of(seen.run.status, ConditionType.CHECKPOINT_AVAILABLE)
    assert available is not None
    assert (available.status, available.message) == ("True", "step 50")


@pytest.mark.parametrize(
    ("step", "status", "message"),
    [
        (50, "True", "step 50; saves that failed since: 2; StorageDenied: no"),
        (0, "False", "saves that failed since: 2; StorageDenied: no"),
    ],
)
def test_saves_that_fail_are_told_beside_the_last_commit(step: int, status: str, message: str) -> None:
    document = told(TrainerPhase.TRAINING, step=60, committed=step)
    assert document.checkpoints is not None
    failing = document.checkpoints.model_copy(update={"failures": 2, "failure": "StorageDenied: no"})
    document = document.model_copy(update={"checkpoints": failing})
    seen, _ = after(replace(submitted(), job=job("RUNNING"), progress=document))
    available = condition_of(seen.run.status, ConditionType.CHECKPOINT_AVAILABLE)
    assert available is not None
    assert (available.status, available.message) == (status, message)


def test_the_end_does_not_leave_a_silence_behind() -> None:
    """Ray did not answer once, and then told of the failure: the last status speaks of no silence."""
    silent, _ = after(replace(submitted(), head=Unknown("refused"), job=None))
    failure = TrainerFailure(failure_class=FailureClass.DATA_INVALID, message="bad", remedy="mend", exit_code=2)
    progress = told(TrainerPhase.FAILED, committed=7, failure=failure)
    seen, _ = after(replace(silent, head=whole().head, job=job("FAILED"), progress=progress))
    stated = {kind: condition_of(seen.run.status, kind) for kind in ConditionType}
    submission, checkpoint = stated[ConditionType.JOB_SUBMITTED], stated[ConditionType.CHECKPOINT_AVAILABLE]
    assert submission is not None
    assert submission.status == "True"
    assert checkpoint is not None
    assert checkpoint.status == "True"


@pytest.mark.parametrize("silent_before", [0, 170])
@pytest.mark.parametrize(
    ("state", "progress", "patience"),
    [("SUCCEEDED", Unknown("reset"), 180), ("SUCCEEDED", None, 180), ("FAILED", Unknown("reset"), 20)],
)
def test_the_last_words_are_asked_for_again_however_long_ago_the_driver_ended(
    state: str, progress: Unknown | None, patience: int, silent_before: int
) -> None:
    """The operator was away at the end, or the head was silent; and the first read of the document is lost."""
    seen = submitted()
    if silent_before:
        seen, _ = after(replace(seen, head=Unknown("refused"), job=None), -silent_before)
    ended = job(state, ended=NOW - timedelta(hours=1))
    seen, decision = after(replace(seen, head=whole().head, job=ended, progress=progress))
    assert decision.requeue_after == SOON
    assert seen.run.status.attempts[-1].end_time is None
    seen, _ = after(seen)
    seen, _ = after(seen, patience - 1)
    assert seen.run.status.attempts[-1].end_time is None
    given_up, _ = after(seen, patience)
    assert given_up.run.status.attempts[-1].end_time is not None
    heard, _ = after(replace(seen, progress=told(TrainerPhase.SUCCEEDED, output=OUTPUT)), patience)
    assert heard.run.status.phase is Phase.SUCCEEDED


def test_time_in_which_nobody_looked_is_not_training() -> None:
    """The driver was stopped after a minute, and the operator comes back after an hour."""
    progress = told(TrainerPhase.INTERRUPTED, step=5, committed=5)
    seen = replace(submitted({"deadlines": {"runSeconds": 1000}}), job=job("FAILED", exit_code=6), progress=progress)
    seen = replace(seen, job=job("FAILED", exit_code=6, ended=NOW + timedelta(seconds=60)))
    seen, _ = after(seen, 3600)
    attempt = ended_by(seen)
    assert attempt.failure_class is FailureClass.PREEMPTED
    assert attempt.end_time == NOW + timedelta(seconds=60)
    assert seen.run.status.usage is not None
    assert seen.run.status.usage.trained_seconds == 60


def test_a_time_limit_that_is_long_over_leaves_the_driver_its_time_to_commit() -> None:
    """The limit was set, or the operator came back, when it was over by hours."""
    seen, decision = after(replace(submitted({"deadlines": {"runSeconds": 60}}), job=job("RUNNING")), 7200)
    assert [type(action).__name__ for action in decision.actions] == ["StopJob"]
    assert seen.run.status.phase is Phase.SUSPENDING
    assert seen.run.status.completion_time is None
    spec = seen.run.spec
    assert spec is not None
    patience = spec.checkpoint.drain_seconds + 30
    seen, _ = after(seen, 7200 + patience - 1)
    assert seen.run.status.completion_time is None
    committed = told(TrainerPhase.INTERRUPTED, step=9, committed=9)
    heard, _ = after(replace(seen, job=job("STOPPED"), progress=committed), 7200 + patience - 1)
    assert heard.run.status.phase is Phase.FAILED
    assert ended_by(heard).failure_class is FailureClass.RUN_TIMEOUT
    assert ended_by(heard).to_step == 9
    seen, _ = after(seen, 7200 + patience)
    assert ended_by(seen).failure_class is FailureClass.RUN_TIMEOUT


def test_a_suspension_by_the_user_costs_no_retry() -> None:
    seen, _ = after(replace(edited(submitted(), SUSPEND), job=job("STOPPED")))
    assert ended_by(seen).failure_class is FailureClass.PREEMPTED
    assert seen.run.status.retries == 0


def test_a_token_that_was_changed_before_the_attempt_is_not_a_retry_of_it() -> None:
    seen, _ = after(edited(whole({"retry": {"token": "1"}}), {"retry": {"token": "2"}}))
    assert seen.run.status.attempt == 1
    assert seen.run.status.retry_token == "2"


def test_a_clock_that_went_back_gives_no_negative_time() -> None:
    seen, _ = after(replace(submitted(), head=Head("session-2", "2.60.0"), job=None), -600)
    attempt = ended_by(seen)
    assert attempt.end_time == attempt.start_time
    assert seen.run.status.usage is not None
    assert seen.run.status.usage.trained_seconds == 0


def test_training_time_counts_attempts_that_the_list_has_forgotten() -> None:
    seen, at = submitted({"retry": {"limit": 100}}), 0
    for _ in range(25):
        number = seen.run.status.attempt or 0
        seen, _ = after(replace(seen, job=job("FAILED", number), progress=None), at + 10)
        at += 400
        seen, _ = after(replace(seen, job=None), at)
    status = seen.run.status
    assert len(status.attempts) == 20
    assert status.usage is not None
    assert status.usage.trained_seconds == 250


def test_the_last_commit_of_a_preempted_attempt_is_heard() -> None:
    seen = replace(submitted(), cluster=cluster(begin(), suspended=True, head_ready=True))
    seen, _ = after(replace(seen, progress=told(TrainerPhase.SAVING, step=7, committed=7)))
    seen, _ = after(replace(seen, head=Unknown("gone"), job=None), 10)
    assert ended_by(seen).failure_class is FailureClass.PREEMPTED
    assert ended_by(seen).to_step == 7
    assert seen.run.status.retries == 0


def test_training_that_waits_for_storage_says_so() -> None:
    seen, _ = after(replace(submitted(), progress=told(TrainerPhase.SAVING, step=7)))
    assert seen.run.status.message == "step 7 of 100; training waits for a checkpoint to be saved"
    seen, _ = after(replace(seen, progress=told(TrainerPhase.TRAINING, step=8)))
    assert seen.run.status.message == "step 8 of 100"


def test_waiting_for_the_next_attempt_is_told_with_its_time() -> None:
    decision = plan(next_attempt(), NOW + timedelta(seconds=1), CONFIG)
    assert decision.requeue_after == 9
    assert decision.status is not None
    assert "attempt 1 ended (HeadLost: the Ray head restarted" in (decision.status.message or "")
    assert "the next one starts at 12:00:10 UTC" in (decision.status.message or "")


def test_a_driver_on_its_way_out_does_not_go_back_to_running() -> None:
    """Its last word is said, and Ray has not seen its end: the phase before lasts until then."""
    exporting, _ = after(replace(submitted(), progress=told(TrainerPhase.EXPORTING, step=100)))
    leaving, decision = after(replace(exporting, progress=told(TrainerPhase.SUCCEEDED, step=100, output=OUTPUT)))
    assert decision.status is not None
    assert decision.status.phase is Phase.EXPORTING
    _, decision = after(replace(leaving, job=job("SUCCEEDED")))
    assert decision.status is not None
    assert decision.status.phase is Phase.SUCCEEDED
