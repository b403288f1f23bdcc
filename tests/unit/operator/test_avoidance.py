"""Keeping away from nodes that fail a run: which, from when on, and until when."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dsft_api.conditions import FailureClass, Phase
from dsft_api.progress import TrainerFailure, TrainerPhase
from dsft_api.status import MAX_AVOIDED, Attempt, FineTuneStatus
from dsft_operator.core.avoidance import avoided, blamed, forgiven, kept_away
from dsft_operator.core.observed import Ended, Observed, Pod
from dsft_operator.core.raycluster import ray_cluster, template_digest
from tests.unit.operator.situations import CONFIG, NOW, after, begin, cluster, job, names, pods, submitted, told

POOL: dict[str, Any] = {"name": "gpu", "nodes": 2, "gpusPerNode": 1, "avoidFailedNodes": True}
AVOIDS = {"nodePools": [POOL], "retry": {"token": "1"}}
KILLED = Ended("chat-gpu-1", "worker", "node-1", "Error", 139, at=NOW + timedelta(days=1))
F = FailureClass

# class, how containers ended, the pod of the rank that told -> the nodes that are blamed
BLAMES: dict[str, tuple[FailureClass, tuple[Ended, ...], str | None, tuple[str, ...]]] = {
    "a GPU fault, told by its rank": (F.GPU_FAULT, (), "chat-gpu-2", ("node-2",)),
    "a GPU fault of nobody knows whom": (F.GPU_FAULT, (), None, ()),
    "a GPU fault in a pod that is gone": (F.GPU_FAULT, (), "chat-gpu-9", ()),
    "a worker crashed": (F.WORKER_LOST, (KILLED,), "chat-gpu-2", ("node-1",)),
    "two crashed": (F.WORKER_LOST, (KILLED, replace(KILLED, node="node-0")), None, ("node-0", "node-1")),
    "killed for memory": (F.HOST_OOM, (replace(KILLED, reason="OOMKilled", exit_code=137),), None, ("node-1",)),
    "a worker is lost without a trace": (F.WORKER_LOST, (), "chat-gpu-2", ()),
    "a worker that ended well": (F.WORKER_LOST, (replace(KILLED, exit_code=0),), None, ()),
    "it was drained": (F.WORKER_LOST, (replace(KILLED, exit_code=None, disrupted=True),), None, ()),
    "it was preempted": (F.PREEMPTED, (KILLED,), None, ()),
    "the head crashed": (F.UNKNOWN, (replace(KILLED, role="head"),), None, ()),
    "the user's own error": (F.USER_CODE, (KILLED,), "chat-gpu-1", ()),
}


@pytest.mark.parametrize("name", BLAMES)
def test_which_nodes_are_blamed(name: str) -> None:
    kind, ends, host, nodes = BLAMES[name]
    assert blamed(kind, ends, pods(), host) == nodes


def attempts(*ends: tuple[FailureClass, str]) -> FineTuneStatus:
    return FineTuneStatus(
        attempts=tuple(
            Attempt(number=number, start_time=NOW, failure_class=kind, failed_nodes=(node,))
            for number, (kind, node) in enumerate(ends, 1)
        )
    )


@pytest.mark.parametrize(
    ("ends", "nodes"),
    [
        ([(F.WORKER_LOST, "a")], ()),
        ([(F.WORKER_LOST, "a"), (F.WORKER_LOST, "b")], ()),
        ([(F.WORKER_LOST, "a"), (F.HOST_OOM, "b"), (F.HOST_OOM, "a")], ("a",)),
        ([(F.GPU_FAULT, "a")], ("a",)),
        ([(F.WORKER_LOST, "b"), (F.GPU_FAULT, "a"), (F.UNKNOWN, "b")], ("a", "b")),
    ],
)
def test_a_gpu_fault_is_enough_and_so_are_two_losses(
    ends: list[tuple[FailureClass, str]], nodes: tuple[str, ...]
) -> None:
    spec = begin(AVOIDS).run.spec
    assert avoided(attempts(*ends), spec) == nodes
    assert avoided(attempts(*ends), begin().run.spec) == (), "no pool asks for it"
    forgotten = attempts(*ends).model_copy(update=forgiven(attempts(*ends)))
    assert avoided(forgotten, spec) == ()


def test_the_last_nodes_are_kept_also_when_their_attempts_are_forgotten() -> None:
    spec = begin(AVOIDS).run.spec
    many = attempts(*((F.GPU_FAULT, f"n{number}") for number in range(MAX_AVOIDED + 2)))
    nodes = avoided(many, spec)
    assert nodes == tuple(f"n{number}" for number in range(2, MAX_AVOIDED + 2))
    assert avoided(FineTuneStatus(avoided_nodes=nodes), spec) == nodes


RULES = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in ("a", "b")]
ZONE = {"key": "zone", "operator": "In", "values": ["z"]}
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


@pytest.mark.parametrize(
    ("affinity", "terms"),
    [
        (None, [{"matchFields": RULES}]),
        ({"podAntiAffinity": {"x": 1}}, [{"matchFields": RULES}]),
        (
            {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [ZONE]}, {"matchFields": [1]}]}}},
            [{"matchExpressions": [ZONE], "matchFields": RULES}, {"matchFields": [1, *RULES]}],
        ),
    ],
)
def test_the_rule_is_added_to_what_the_user_asks_for(affinity: dict[str, Any] | None, terms: list[Any]) -> None:
    template = {"metadata": {}, "spec": {"containers": []} | ({"affinity": affinity} if affinity else {})}
    made = kept_away(template, ("a", "b"))["spec"]
    assert made["affinity"]["nodeAffinity"][REQUIRED] == {"nodeSelectorTerms": terms}
    assert made["affinity"].get("podAntiAffinity") == (affinity or {}).get("podAntiAffinity")
    assert kept_away(template, ()) == template


def faulty(spec: dict[str, Any]) -> Observed:
    """Rank 1, on node-2, has a GPU fault."""
    failure = TrainerFailure(
        failure_class=F.GPU_FAULT, message="Xid 79", remedy="look", exit_code=8, rank=1, host="chat-gpu-2"
    )
    document = told(TrainerPhase.FAILED, step=5, committed=5, failure=failure)
    seen, _ = after(replace(submitted(spec), pods=pods(), job=job("FAILED", exit_code=8), progress=document))
    return replace(seen, job=None, progress=None)


def test_the_next_attempt_is_made_elsewhere() -> None:
    seen = faulty(AVOIDS)
    assert seen.run.status.avoided_nodes == seen.run.status.attempts[-1].failed_nodes == ("node-2",)
    # Pods of a live RayCluster are made from its spec: another incarnation has the rule.
    seen, decision = after(seen, 60)
    assert names(decision) == ["DeleteCluster"]
    assert seen.run.spec is not None
    groups = ray_cluster(seen.run, seen.run.spec, CONFIG, 2)["spec"]["workerGroupSpecs"]
    (term,) = groups[0]["template"]["spec"]["affinity"]["nodeAffinity"][REQUIRED]["nodeSelectorTerms"]
    assert term == {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-2"]}]}


def test_a_pool_that_does_not_ask_for_it_keeps_its_cluster() -> None:
    seen = faulty({"nodePools": [{**POOL, "avoidFailedNodes": False}]})
    assert seen.run.status.avoided_nodes == ()
    seen, decision = after(seen, 60)
    assert names(decision) == []
    assert seen.run.status.attempt == 2


def waits(seen: Observed) -> Observed:
    """The next incarnation finds no node."""
    assert seen.run.spec is not None
    digest = template_digest(seen.run, seen.run.spec, CONFIG)
    pending = (Pod("chat-gpu-3", "worker", "gpu", unscheduled="0/3 nodes are available"),)
    known = seen.run.status.ray_cluster
    assert known is not None
    made = cluster(begin(AVOIDS), name=known.name, uid=known.uid, template_digest=digest, head_ready=True)
    return replace(seen, cluster=made, pods=pending)


def test_a_wait_names_the_nodes_and_a_new_token_lets_them_be_used_again() -> None:
    seen, decision = after(waits(faulty(AVOIDS)), 60)
    assert names(decision) == []
    assert seen.run.status.phase is Phase.PROVISIONING
    message = seen.run.status.message or ""
    assert "0/3 nodes are available" in message
    assert "kept away from nodes that failed: node-2 (a new spec.retry.token lets them be used again)" in message
    assert seen.run.spec is not None
    spec = seen.run.spec.model_copy(update={"retry": seen.run.spec.retry.model_copy(update={"token": "2"})})
    seen, decision = after(replace(seen, run=replace(seen.run, spec=spec)), 70)
    status = seen.run.status
    assert (status.avoided_nodes, status.attempts[-1].failed_nodes, status.retry_token) == ((), (), "2")
    seen, decision = after(seen, 70)
    assert names(decision) == ["DeleteCluster"], "its pods would still keep away"
    assert seen.run.status.avoided_nodes == ()
