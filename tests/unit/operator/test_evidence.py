"""Why an attempt ended, told by who saw it best: the trainer, the kubelet, Kubernetes, Ray. And that it is kept."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dsft_api.conditions import ConditionType, FailureClass, Phase
from dsft_api.progress import TrainerFailure, TrainerPhase
from dsft_api.status import Attempt
from dsft_operator.adapters.reading import pod_of
from dsft_operator.core.observed import Ended, Head, Observed, Pod, RayJob, Unknown
from dsft_operator.core.plan import plan
from dsft_operator.core.summary import condition_of
from tests.unit.operator.fake_ports import operator_in
from tests.unit.operator.situations import (
    CONFIG,
    NOW,
    WHOLE,
    after,
    begin,
    cluster,
    job,
    names,
    pods,
    submitted,
    told,
)
from tests.unit.operator.world import KEY, World

Json = dict[str, Any]


def ended(reason: str, code: int | None = 1, role: Any = "worker", **facts: Any) -> Ended:
    return Ended(f"chat-{role}", role, "node-1", reason, code, **{"at": NOW, **facts})


def tells(kind: FailureClass, message: str = "rank 1 is gone") -> Any:
    failure = TrainerFailure(failure_class=kind, message=message, remedy="mend it", exit_code=1)
    return told(TrainerPhase.FAILED, failure=failure)


RAY_OOM = "Task failed.\n1 worker(s) were killed due to the node running low on memory.\nMore text"
LOST = tells(FailureClass.WORKER_LOST)
KILLED = ended("OOMKilled", 137)
DRAINED = ended("EvictionByEvictionAPI", None, message="Eviction API: evicting", disrupted=True)
SEGFAULT = ended("Error", 139, message="loading\nSegmentation fault (core dumped)\n")

# situation: job, document, evidence -> class, words of the message
CAUSES: dict[str, tuple[RayJob, Any, tuple[Ended, ...], FailureClass, list[str]]] = {
    "the trainer knows": (
        job("FAILED", exit_code=2),
        tells(FailureClass.DATA_INVALID, "no column label"),
        (),
        FailureClass.DATA_INVALID,
        ["no column label"],
    ),
    "the trainer knows, and a pod was killed later": (
        job("FAILED", exit_code=4),
        tells(FailureClass.CUDA_OOM, "CUDA out of memory"),
        (KILLED,),
        FailureClass.CUDA_OOM,
        ["CUDA out of memory", "OOMKilled"],
    ),
    "the kernel killed a worker": (
        job("FAILED", exit_code=1),
        LOST,
        (KILLED,),
        FailureClass.HOST_OOM,
        ["worker chat-worker on node-1: OOMKilled, exit code 137", "spec.nodePools[].resources"],
    ),
    "the kernel killed a worker of an earlier attempt": (
        job("FAILED", exit_code=1),
        LOST,
        (replace(KILLED, at=NOW - timedelta(minutes=9)),),
        FailureClass.WORKER_LOST,
        ["rank 1 is gone"],
    ),
    "Ray's memory monitor, in the job's message": (
        job("FAILED", exit_code=1, message=RAY_OOM),
        None,
        (),
        FailureClass.HOST_OOM,
        ["1 worker(s) were killed due to the node running low on memory."],
    ),
    "Ray's memory monitor, in the trainer's words": (
        job("FAILED", exit_code=1),
        tells(FailureClass.UNKNOWN, f"ControllerError: {RAY_OOM}"),
        (),
        FailureClass.HOST_OOM,
        ["running low on memory"],
    ),
    "a node was drained": (
        job("FAILED", exit_code=1),
        LOST,
        (DRAINED,),
        FailureClass.PREEMPTED,
        ["EvictionByEvictionAPI: Eviction API: evicting"],
    ),
    "a worker crashed": (
        job("FAILED", exit_code=1),
        LOST,
        (SEGFAULT,),
        FailureClass.WORKER_LOST,
        [
            "rank 1 is gone",
            "(seen: worker chat-worker on node-1: Error, exit code 139: Segmentation fault (core dumped))",
        ],
    ),
    "Ray lost the driver": (
        job("FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED"),
        None,
        (),
        FailureClass.HEAD_LOST,
        ["JOB_SUPERVISOR_ACTOR_DIED"],
    ),
    "nothing is known but the exit code": (job("FAILED", exit_code=5), None, (), FailureClass.DIVERGED, ["FAILED"]),
    "nothing is known": (job("FAILED", exit_code=1), None, (), FailureClass.UNKNOWN, ["the driver ended as FAILED"]),
}


@pytest.mark.parametrize("name", CAUSES)
def test_why_the_driver_failed(name: str) -> None:
    driver, document, evidence, kind, words = CAUSES[name]
    seen, _ = after(replace(submitted(), job=driver, progress=document, evidence=evidence))
    attempt = last(seen)
    assert attempt.failure_class is kind
    assert [word for word in words if word not in (attempt.message or "")] == []


def last(seen: Observed) -> Attempt:
    return seen.run.status.attempts[-1]


# evidence -> class, words
HEADS: dict[str, tuple[tuple[Ended, ...], FailureClass, list[str]]] = {
    "nobody saw why": ((), FailureClass.HEAD_LOST, ["the Ray head restarted"]),
    "for memory": ((ended("OOMKilled", 137, "head"),), FailureClass.HOST_OOM, ["spec.head.resources"]),
    "its node was drained": (
        (replace(DRAINED, role="head"),),
        FailureClass.PREEMPTED,
        ["head chat-worker on node-1: EvictionByEvictionAPI"],
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_why_the_head_restarted(name: str) -> None:
    evidence, kind, words = HEADS[name]
    seen, decision = after(replace(submitted(), head=Head("session-2", "2.60.0"), job=None, evidence=evidence))
    assert names(decision) == [], "a head that is back is used again"
    assert last(seen).failure_class is kind
    assert [word for word in words if word not in (last(seen).message or "")] == []


def test_a_head_that_lost_its_driver_is_replaced() -> None:
    seen = replace(submitted(), job=job("FAILED", error_type="JOB_SUPERVISOR_ACTOR_START_TIMEOUT"))
    assert names(plan(seen, NOW, CONFIG)) == ["DeleteCluster"]


def test_memory_is_retried_once_without_progress() -> None:
    seen, at = submitted(), 0
    for number, phase in ((1, Phase.PENDING), (2, Phase.FAILED)):
        oom = job("FAILED", number, exit_code=1, message=RAY_OOM)
        seen, _ = after(replace(seen, job=oom, progress=None), at)
        assert seen.run.status.phase is phase
        at += 60
        seen, _ = after(replace(seen, job=None), at)
    assert "give the pods more memory" in (seen.run.status.message or "")
    assert seen.run.status.attempts[-1].failure_class is FailureClass.HOST_OOM


def test_the_kubelet_is_given_a_moment_to_tell_what_the_driver_felt() -> None:
    felt = job("FAILED", exit_code=1, ended=NOW)
    seen = replace(submitted(), job=felt, progress=LOST)
    seen, early = after(seen, 2)
    assert early.status is None
    assert early.requeue_after == 2
    by_kernel, _ = after(replace(seen, evidence=(KILLED,)), 4)
    assert last(by_kernel).failure_class is FailureClass.HOST_OOM
    by_nobody, _ = after(seen, 5)
    assert last(by_nobody).failure_class is FailureClass.WORKER_LOST


def test_a_message_has_a_bound() -> None:
    long = ended("Error", 1, message="x" * 900)
    evidence = tuple(replace(long, pod=f"pod-{n}") for n in range(9))
    document = tells(FailureClass.WORKER_LOST, "y" * 4000)
    seen, _ = after(replace(submitted(), job=job("FAILED", exit_code=1), progress=document, evidence=evidence))
    message = last(seen).message or ""
    assert len(message) <= 1024
    assert "pod-8" not in message[:500]
    assert message.endswith("-> mend it")


def test_what_to_do_is_said_also_where_what_happened_is_long() -> None:
    """A traceback, say: what is kept of it in storage is named."""
    where = "s3://bucket/runs/ml/chat/logs/attempt-1/last-lines-rank-3.txt"
    document = tells(FailureClass.USER_CODE, "ValueError: the data has holes\n" + "y" * 2000)
    assert document.failure is not None
    document = document.model_copy(update={"failure": document.failure.model_copy(update={"evidence": where})})
    for evidence in ((), (SEGFAULT,)):
        ended_badly = replace(submitted(), job=job("FAILED", exit_code=1), progress=document, evidence=evidence)
        attempt = last(after(ended_badly)[0])
        assert attempt.evidence == where
        assert attempt.message is not None
        assert len(attempt.message) <= 1024
        assert attempt.message.startswith("UserCode: ValueError: the data has holes")
        assert attempt.message.endswith(" -> mend it")
    assert last(after(replace(submitted(), job=job("FAILED", exit_code=1)))[0]).evidence is None


def lacking(seen: Observed, **facts: Any) -> Observed:
    """A worker pod is lost, and its successor finds no node."""
    workers = (pods()[0], pods()[1], Pod("chat-gpu-3", "worker", "gpu", unscheduled="0/3 nodes are available"))
    return replace(
        seen,
        cluster=cluster(begin(), **{**WHOLE, "ready_workers": 1}),
        pods=workers,
        progress=told(TrainerPhase.TRAINING, step=5),
        **facts,
    )


def test_an_attempt_that_waits_for_lost_pods_says_so() -> None:
    seen, _ = after(lacking(submitted()))
    seen, decision = after(replace(seen, progress=Unknown("timeout")), 10)
    assert decision.actions == ()
    assert seen.run.status.phase is Phase.RUNNING
    message = seen.run.status.message or ""
    assert message.startswith("step 5 of 100; meanwhile pool gpu has 1 of 2 pods ready: chat-gpu-3: 0/3 nodes")
    assert message.count("meanwhile") == 1
    ready = condition_of(seen.run.status, ConditionType.CLUSTER_READY)
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "Unschedulable")
    whole, _ = after(replace(seen, cluster=cluster(begin(), **WHOLE), progress=told(TrainerPhase.TRAINING, step=6)), 20)
    ready = condition_of(whole.run.status, ConditionType.CLUSTER_READY)
    assert ready is not None
    assert ready.status == "True"
    assert whole.run.status.message == "step 6 of 100"


def test_an_attempt_waits_for_lost_pods_no_longer_than_it_may() -> None:
    seen, _ = after(lacking(submitted({"deadlines": {"provisionSeconds": 60}})), 100)
    assert after(seen, 159)[1].actions == ()
    seen, decision = after(seen, 160)
    assert names(decision) == ["StopJob"]
    assert seen.run.status.phase is Phase.FAILED
    assert last(seen).failure_class is FailureClass.PROVISION_TIMEOUT
    assert "0/3 nodes are available" in (last(seen).message or "")
    assert last(seen).to_step == 5


def raw_pod(**status: Any) -> Json:
    return {
        "metadata": {"name": "p", "uid": "1", "labels": {"ray.io/node-type": "worker", "ray.io/group": "gpu"}},
        "spec": {"nodeName": "node-1"},
        "status": status,
    }


def test_ends_are_read_with_their_time() -> None:
    terminated = {"reason": "OOMKilled", "exitCode": 137, "finishedAt": "2026-01-01T12:00:00Z", "message": "x"}
    statuses = [
        {"name": "ray-worker", "state": {"running": {}}, "lastState": {"terminated": terminated}},
        {"name": "sidecar", "state": {"terminated": terminated}},
    ]
    assert pod_of(raw_pod(containerStatuses=statuses)).ended == (
        Ended("p", "worker", "node-1", "OOMKilled", 137, "x", NOW),
    )


@pytest.mark.parametrize(
    ("status", "reason", "disrupted"),
    [
        ({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}, "Evicted", True),
        (
            {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no GPU"},
            "UnexpectedAdmissionError",
            False,
        ),
        (
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]},
            "PreemptionByScheduler",
            True,
        ),
    ],
)
def test_pods_that_had_to_go_are_read(status: Json, reason: str, *, disrupted: bool) -> None:
    (found,) = pod_of(raw_pod(**status)).ended
    assert (found.reason, found.disrupted, found.exit_code) == (reason, disrupted, None)


def test_evidence_outlives_its_pods() -> None:
    world = World()
    operator = operator_in(world)
    while world.seen_status.phase is not Phase.RUNNING:
        if asyncio.run(operator.reconcile(KEY)) != 0.0:
            world.tick()
    world.pods = (Pod("gpu-1", "worker", "gpu", ended=(replace(KILLED, at=world.now),)),)
    asyncio.run(operator.reconcile(KEY))
    world.pods = ()
    world.lose_worker()
    while (attempt := world.seen_status.attempts[-1]).end_time is None:
        asyncio.run(operator.reconcile(KEY))
    assert attempt.failure_class is FailureClass.HOST_OOM
    assert "OOMKilled, exit code 137" in (attempt.message or "")
