"""A pod that was deleted and does not end, since its node is dead: another RayCluster, once the ranks are missing."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dsft_api.conditions import FailureClass, Phase
from dsft_api.progress import TrainerPhase
from dsft_operator.adapters.reading import pod_of
from dsft_operator.core.node_rules import STRANDED_SECONDS
from dsft_operator.core.observed import Observed, Pod, Unknown
from tests.unit.operator.situations import NOW, after, cluster, job, names, pods, provisioning, submitted, told

GONE_BY = NOW - timedelta(seconds=STRANDED_SECONDS)
SHORT = {"head_ready": True, "ready_workers": 1}


def leaving(**facts: Any) -> tuple[Pod, ...]:
    """Head and a worker are well; the other worker is on its way out."""
    head, first, second = pods()
    return head, first, replace(second, **{"ready": False, "deleting": True, "gone_by": GONE_BY, **facts})


def losing(phase: TrainerPhase) -> Observed:
    """An attempt whose cluster is not whole, and whose trainer is in this phase."""
    seen = replace(submitted(), cluster=cluster(submitted(), **SHORT), pods=leaving())
    return replace(seen, job=job("RUNNING"), progress=told(phase, step=3, committed=2))


def test_an_attempt_whose_ranks_wait_for_it_ends_with_its_cluster() -> None:
    seen, decision = after(losing(TrainerPhase.STARTING))
    assert names(decision) == [], "the attempt's end is in the book before its cluster goes"
    (attempt,) = seen.run.status.attempts
    assert attempt.failure_class is FailureClass.WORKER_LOST
    assert "worker chat-gpu-2 on node-2 was deleted and has not ended" in (attempt.message or "")
    seen, decision = after(seen)
    assert names(decision) == ["DeleteCluster"]
    seen, decision = after(replace(seen, cluster=None, job=None, progress=None, pods=()))
    assert seen.run.status.ray_cluster is not None
    assert seen.run.status.ray_cluster.incarnation == 2


def test_between_attempts_the_cluster_is_replaced_too() -> None:
    seen = replace(provisioning(**SHORT), pods=leaving())
    seen, decision = after(seen)
    assert names(decision) == ["DeleteCluster"]
    assert seen.run.status.phase is Phase.PENDING
    assert "has not ended" in (seen.run.status.message or "")


def test_a_lost_head_is_called_so() -> None:
    head, *workers = pods()
    held = (replace(head, deleting=True, gone_by=GONE_BY), *workers)
    seen, _ = after(replace(losing(TrainerPhase.STARTING), pods=held))
    assert seen.run.status.attempts[-1].failure_class is FailureClass.HEAD_LOST


@pytest.mark.parametrize(
    "seen",
    [
        replace(losing(TrainerPhase.STARTING), pods=leaving(gone_by=GONE_BY + timedelta(seconds=1))),
        replace(losing(TrainerPhase.STARTING), cluster=cluster(submitted(), head_ready=True, ready_workers=2)),
        replace(losing(TrainerPhase.STARTING), progress=Unknown("timeout")),
        losing(TrainerPhase.TRAINING),
        losing(TrainerPhase.SAVING),
        replace(losing(TrainerPhase.STARTING), pods=pods()),
        replace(provisioning(**SHORT), pods=leaving(gone_by=GONE_BY + timedelta(seconds=1))),
    ],
    ids=["in its grace", "whole", "nobody knows", "training", "saving", "nobody leaves", "in its grace, no attempt"],
)
def test_nothing_is_given_up_that_may_go_on(seen: Observed) -> None:
    _, decision = after(seen)
    assert names(decision) == []


def test_a_run_that_is_over_is_over() -> None:
    ended = replace(losing(TrainerPhase.SUCCEEDED), job=job("SUCCEEDED"))
    seen, _ = after(ended)
    assert seen.run.status.phase is Phase.SUCCEEDED


def test_a_pod_says_when_it_should_be_gone() -> None:
    meta = {"name": "p", "labels": {"ray.io/node-type": "worker"}, "deletionTimestamp": "2026-01-01T12:00:00Z"}
    assert pod_of({"metadata": meta}).gone_by == NOW
    del meta["deletionTimestamp"]
    assert pod_of({"metadata": meta}).gone_by is None
