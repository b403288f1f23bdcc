"""The decisions of a run one after the other: attempts, retries, deadlines, suspend, delete, and what stays as it is."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dsft_api.conditions import ConditionType, FailureClass, Phase
from dsft_api.job import JOB_ENV, Job
from dsft_api.progress import TrainerPhase
from dsft_api.status import Inputs
from dsft_operator.core.decision import CreateCluster, Decision, DeleteCluster, SubmitJob
from dsft_operator.core.observed import Ended, Observed, Pod, Unknown
from dsft_operator.core.plan import plan
from dsft_operator.core.summary import condition_of
from tests.unit.operator.situations import (
    CONFIG,
    NOW,
    OUTPUT,
    UID,
    WHOLE,
    advance,
    after,
    begin,
    deleted,
    failure,
    job,
    names,
    pods,
    provisioning,
    submitted,
    submitted_and,
    the,
    told,
    whole,
)

SUSPEND = {"suspend": True}
QUEUED = {"queue": {"name": "team-a"}}


def job_told(decision: Decision) -> Job:
    """What the attempt that is submitted is told."""
    submission = the(SubmitJob, decision)
    assert isinstance(submission, SubmitJob)
    return Job.model_validate_json(submission.environment[JOB_ENV])


def test_the_same_run_gets_the_same_cluster() -> None:
    first, again = (the(CreateCluster, plan(begin(), NOW, CONFIG)) for _ in range(2))
    assert first == again
    assert first.manifest["metadata"]["name"] == f"chat-{UID[:5]}"
    assert first.manifest["metadata"]["ownerReferences"][0]["uid"] == UID


def test_the_intent_is_in_the_status_before_the_submission() -> None:
    seen, decision = after(whole())
    assert decision.actions == ()
    assert seen.run.status.attempt == 1
    assert seen.run.status.job is not None
    assert seen.run.status.job.submission_id == f"{UID[:8]}-a1"
    sent = the(SubmitJob, plan(seen, NOW, CONFIG))
    assert sent.submission_id == f"{UID[:8]}-a1"
    assert sent.entrypoint == "python -m dsft_trainer run"


def test_an_attempt_is_submitted_once() -> None:
    seen = submitted()
    for state in ("PENDING", "RUNNING"):
        assert "SubmitJob" not in names(plan(replace(seen, job=job(state)), NOW, CONFIG))
    assert "SubmitJob" not in names(plan(replace(seen, job=None), NOW, CONFIG))


def test_a_driver_that_starts_is_looked_at_often() -> None:
    """Nothing but looking tells that Ray began: no event comes."""
    seen, _ = after(whole())
    assert plan(seen, NOW, CONFIG).requeue_after == 0.25
    assert plan(replace(seen, job=job("PENDING")), NOW, CONFIG).requeue_after == 2
    assert plan(replace(seen, job=job("RUNNING")), NOW, CONFIG).requeue_after == CONFIG.intervals.running_seconds


def fail_again(seen: Observed, seconds: float, committed: int = 0) -> tuple[Observed, Decision]:
    """From a whole cluster: submit the next attempt, and lose a worker."""
    seen, _ = after(replace(seen, job=None, progress=None), seconds)
    number = seen.run.status.attempt or 0
    lost = told(TrainerPhase.FAILED, number, committed=committed, failure=failure(FailureClass.WORKER_LOST))
    return after(replace(seen, job=job("FAILED", number), progress=lost), seconds)


def test_retries_are_counted_without_progress_and_come_later_and_later() -> None:
    seen = whole({"retry": {"limit": 2}})
    seen, _ = fail_again(seen, 0)
    waits = plan(replace(seen, job=None, progress=None), NOW, CONFIG)
    assert waits.requeue_after == 10
    assert "next one starts at" in (waits.status.message if waits.status else "")
    seen, _ = fail_again(seen, 10)
    assert plan(replace(seen, job=None, progress=None), NOW + timedelta(seconds=10), CONFIG).requeue_after == 20
    seen, _ = fail_again(seen, 30, committed=50)
    assert seen.run.status.retries == 0
    for begin_at, phase in ((40, Phase.PENDING), (50, Phase.PENDING), (70, Phase.FAILED)):
        seen, _ = fail_again(seen, begin_at)
        assert seen.run.status.phase is phase
    assert "3 attempts in a row" in (seen.run.status.message or "")
    assert "retry.token" in (seen.run.status.message or "")


def test_a_new_retry_token_goes_on() -> None:
    bad = told(TrainerPhase.FAILED, failure=failure(FailureClass.DATA_INVALID, 2))
    seen, _ = after(replace(submitted(), job=job("FAILED"), progress=bad))
    assert seen.run.status.completion_time == NOW
    assert names(plan(seen, NOW, CONFIG)) == ["DeleteCluster"]
    seen = replace(seen, cluster=None, job=None, progress=None)
    assert plan(seen, NOW, CONFIG) == Decision()
    renewed = begin({"retry": {"token": "2"}}).run.spec
    seen = replace(seen, run=replace(seen.run, spec=renewed))
    seen, decision = after(seen)
    assert decision.status is not None
    assert decision.status.phase is Phase.PENDING
    seen, _ = after(seen)
    made = the(CreateCluster, plan(seen, NOW, CONFIG))
    assert made.manifest["metadata"]["name"] == f"chat-{UID[:5]}-2"
    assert seen.run.status.completion_time is None


def test_a_finished_run_stays_as_it_is() -> None:
    done = replace(submitted(), job=job("SUCCEEDED"), progress=told(TrainerPhase.SUCCEEDED, output=OUTPUT))
    seen, decision = after(done)
    assert decision.status is not None
    assert decision.status.output == OUTPUT
    freed = plan(seen, NOW, CONFIG)
    assert isinstance(freed.actions[0], DeleteCluster)
    assert freed.status is None
    assert plan(replace(seen, cluster=None), NOW + timedelta(days=9), CONFIG) == Decision()


def test_the_cluster_is_held_when_asked() -> None:
    done = replace(
        submitted({"keepClusterSeconds": 600}),
        job=job("SUCCEEDED"),
        progress=told(TrainerPhase.SUCCEEDED, output=OUTPUT),
    )
    seen, _ = after(done)
    assert plan(seen, NOW, CONFIG) == Decision(requeue_after=600)
    assert names(plan(seen, NOW + timedelta(seconds=600), CONFIG)) == ["DeleteCluster"]


@pytest.mark.parametrize(
    ("spec", "facts", "kind", "words"),
    [
        ({"deadlines": {"provisionSeconds": 60}}, {}, FailureClass.PROVISION_TIMEOUT, "0/3 nodes"),
        (
            {**QUEUED, "deadlines": {"queueSeconds": 60}},
            {"suspended": True},
            FailureClass.QUEUE_TIMEOUT,
            "in queue team-a",
        ),
    ],
    ids=["provision", "queue"],
)
def test_a_wait_has_a_deadline(spec: Any, facts: Any, kind: FailureClass, words: str) -> None:
    stuck = (Pod("p", "worker", "gpu", unscheduled="0/3 nodes are available"),)
    seen = replace(provisioning(spec, **facts), pods=stuck)
    seen, decision = after(seen, 59)
    assert decision.requeue_after == pytest.approx(1)
    seen, decision = after(seen, 60)
    assert decision.status is not None
    assert decision.status.phase is Phase.FAILED
    assert kind in (decision.status.message or "")
    assert words in (decision.status.message or "")


def test_training_time_has_a_deadline_over_all_attempts() -> None:
    seen = submitted({"deadlines": {"runSeconds": 100}})
    assert names(plan(seen, NOW + timedelta(seconds=99), CONFIG)) == []
    decision = plan(seen, NOW + timedelta(seconds=100), CONFIG)
    assert names(decision) == ["StopJob"]
    stopping = advance(seen, decision)
    assert stopping.run.status.attempts[-1].end_time is None, "its last commit is waited for"
    for progress in (None, told(TrainerPhase.INTERRUPTED, step=7, committed=7)):
        stopped, _ = after(replace(stopping, job=job("STOPPED"), progress=progress), 110)
        assert stopped.run.status.phase is Phase.FAILED
        assert stopped.run.status.attempts[-1].failure_class is FailureClass.RUN_TIMEOUT
    assert stopped.run.status.attempts[-1].to_step == 7
    patience = 100 + 60 + 30
    assert names(plan(stopping, NOW + timedelta(seconds=patience - 1), CONFIG)) == ["StopJob"]
    deaf, decision = after(stopping, patience)
    assert names(decision) == ["StopJob"]
    assert deaf.run.status.phase is Phase.FAILED
    assert deaf.run.status.attempts[-1].failure_class is FailureClass.RUN_TIMEOUT


def test_the_trainer_is_told_when_its_time_is_over() -> None:
    """In all: what earlier attempts trained counts."""
    seen, _ = after(whole({"deadlines": {"runSeconds": 100}}))
    assert job_told(plan(seen, NOW, CONFIG)).end_by == NOW + timedelta(seconds=100)
    seen, _ = after(replace(seen, job=job("RUNNING")))
    seen, _ = after(replace(seen, job=job("FAILED", exit_code=1)), 30)
    seen = replace(seen, job=None)
    seen, _ = after(seen, seconds=600)
    _, decision = after(seen, seconds=600)
    assert job_told(decision).end_by == NOW + timedelta(seconds=670)
    unbounded, _ = after(whole())
    assert job_told(plan(unbounded, NOW, CONFIG)).end_by is None


def test_a_silent_head_is_given_up_and_its_cluster_replaced() -> None:
    seen, first = after(replace(submitted(), head=Unknown("refused"), job=None))
    assert first.actions == ()
    assert seen.run.status.phase is Phase.STARTING
    seen, decision = after(seen, 180)
    assert names(decision) == ["DeleteCluster"]
    assert seen.run.status.attempts[-1].failure_class is FailureClass.HEAD_LOST


def test_memory_is_told_from_other_losses() -> None:
    lost = told(TrainerPhase.FAILED, failure=failure(FailureClass.WORKER_LOST))
    killed = Ended("chat-gpu-1", "worker", "node-1", "OOMKilled", 137)
    seen = replace(submitted(), job=job("FAILED", exit_code=1), progress=lost)
    by_kernel, _ = after(replace(seen, evidence=(killed,)))
    assert by_kernel.run.status.attempts[-1].failure_class is FailureClass.HOST_OOM
    assert "chat-gpu-1 on node-1" in (by_kernel.run.status.attempts[-1].message or "")
    words = "1 worker(s) were killed due to the node running low on memory"
    by_ray, _ = after(replace(seen, job=job("FAILED", message=words)))
    assert by_ray.run.status.attempts[-1].failure_class is FailureClass.HOST_OOM


def test_suspended_and_back() -> None:
    seen = replace(submitted_and(SUSPEND), progress=told(TrainerPhase.TRAINING, step=5, committed=3))
    seen, _ = after(seen)
    seen, _ = after(replace(seen, job=job("STOPPED")))
    assert seen.run.status.attempts[-1].end_time is not None
    seen, _ = after(replace(seen, cluster=None, job=None))
    assert seen.run.status.phase is Phase.SUSPENDED
    assert seen.run.status.checkpoints is not None
    assert after(seen)[1].status is not None
    back = replace(seen, run=replace(seen.run, spec=begin().run.spec))
    back, _ = after(back)
    assert the(CreateCluster, plan(back, NOW, CONFIG)).manifest["metadata"]["name"].endswith("-2")


def test_suspend_waits_for_the_commit_no_longer_than_it_may() -> None:
    seen, _ = after(submitted_and(SUSPEND))
    assert names(after(seen, 89)[1]) == ["StopJob"]
    assert names(after(seen, 90)[1]) == ["DeleteCluster"]


def test_a_deleted_resource_is_let_go_in_a_minute() -> None:
    seen = deleted(submitted())
    assert names(plan(seen, NOW + timedelta(seconds=30), CONFIG)) == ["DeleteCluster"]
    assert names(plan(seen, NOW + timedelta(seconds=50), CONFIG)) == ["RemoveFinalizer"]
    unreadable = replace(seen, cluster=Unknown("500"))
    assert names(plan(unreadable, NOW + timedelta(seconds=49), CONFIG)) == []
    assert names(plan(unreadable, NOW + timedelta(seconds=50), CONFIG)) == ["RemoveFinalizer"]


def test_an_edit_that_is_refused_does_not_disturb_what_runs() -> None:
    seen = replace(
        submitted_and({"deepspeed": {"offload": {"params": "cpu"}}}), progress=told(TrainerPhase.TRAINING, step=1)
    )
    problems = begin({"deepspeed": {"offload": {"params": "cpu"}}}).run.problems
    seen = replace(seen, run=replace(seen.run, problems=problems))
    decision = plan(seen, NOW, CONFIG)
    assert decision.actions == ()
    assert decision.status is not None
    assert decision.status.phase is Phase.RUNNING
    accepted = condition_of(decision.status, ConditionType.ACCEPTED)
    assert accepted is not None
    assert (accepted.status, accepted.reason) == ("False", "NotSupported")


def test_other_pods_are_another_cluster() -> None:
    seen = provisioning(**WHOLE)
    changed = begin({"nodePools": [{"name": "gpu", "nodes": 2, "gpusPerNode": 1, "nodeSelector": {"gpu": "h100"}}]})
    seen = replace(seen, run=replace(seen.run, spec=changed.run.spec))
    seen, decision = after(seen)
    assert names(decision) == ["DeleteCluster"]
    seen, _ = after(replace(seen, cluster=None))
    made = the(CreateCluster, plan(seen, NOW, CONFIG)).manifest
    assert made["metadata"]["name"] == f"chat-{UID[:5]}-2"
    assert made["spec"]["workerGroupSpecs"][0]["template"]["spec"]["nodeSelector"] == {"gpu": "h100"}


def test_times_of_conditions_change_with_their_status_alone() -> None:
    seen, _ = after(replace(submitted(), progress=told(TrainerPhase.TRAINING, step=1)), 10)
    seen, _ = after(replace(seen, progress=told(TrainerPhase.TRAINING, step=2)), 20)
    ready = condition_of(seen.run.status, ConditionType.READY)
    assert ready is not None
    assert ready.last_transition_time == NOW + timedelta(seconds=10)
    assert ready.message == "step 2 of 100"


def test_nothing_new_is_no_new_status() -> None:
    seen = replace(submitted(), progress=told(TrainerPhase.TRAINING, step=1), pods=pods())
    seen, _ = after(seen)
    decision = plan(seen, NOW + timedelta(seconds=60), CONFIG)
    assert decision.status is not None
    assert decision.status.to_wire() == seen.run.status.to_wire()
    assert advance(seen, decision).run.status == seen.run.status


def test_what_the_first_attempt_found_binds_the_next() -> None:
    found = Inputs(model_revision="c0ffee", data_digest="sha256:1")
    seen = replace(submitted(), progress=told(TrainerPhase.TRAINING, resolved=found))
    seen, decision = after(seen)
    assert decision.status is not None
    assert decision.status.resolved is not None
    assert decision.status.resolved.model_revision == "c0ffee"
    assert decision.status.resolved.storage_prefix == f"s3://bucket/runs/ml/chat-{UID[:8]}"

    ended = replace(seen, job=job("FAILED", exit_code=1), progress=told(TrainerPhase.TRAINING, resolved=found))
    seen, _ = after(ended)
    seen = replace(seen, job=None, progress=None)
    seen, _ = after(seen, seconds=600)
    _, decision = after(seen, seconds=600)
    assert job_told(decision).resolved == found


def test_nothing_that_is_pinned_changes() -> None:
    seen = replace(submitted(), progress=told(TrainerPhase.TRAINING, resolved=Inputs(data_digest="sha256:1")))
    seen, _ = after(seen)
    other = Inputs(model_revision="c0ffee", data_digest="sha256:2")
    _, decision = after(replace(seen, progress=told(TrainerPhase.TRAINING, resolved=other)))
    assert decision.status is not None
    assert decision.status.resolved is not None
    assert decision.status.resolved.data_digest == "sha256:1"
    assert decision.status.resolved.model_revision == "c0ffee"


def test_the_status_names_the_folder_of_the_attempts_logs() -> None:
    status = submitted().run.status
    assert status.logs is not None
    assert status.logs.uri == f"s3://bucket/runs/ml/chat-{UID[:8]}/logs/attempt-1"
