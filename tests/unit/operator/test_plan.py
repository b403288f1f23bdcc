"""The decision, situation by situation: what is done, what the status says."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from dsft_api.conditions import ConditionType, FailureClass, Phase
from dsft_api.progress import TrainerPhase
from dsft_operator.core.observed import Head, Observed, Pod, Unknown
from dsft_operator.core.plan import plan
from dsft_operator.core.summary import condition_of
from tests.unit.operator.situations import (
    CONFIG,
    NOW,
    OUTPUT,
    UID,
    WHOLE,
    after,
    begin,
    cluster,
    deleted,
    failure,
    job,
    names,
    provisioning,
    submitted,
    submitted_and,
    told,
    whole,
)

SUSPEND = {"suspend": True}
QUEUED = {"queue": {"name": "team-a"}}

# situation, what is done, phase, reason of Ready
SITUATIONS: dict[str, tuple[Callable[[], Observed], list[str], Phase | None, str | None]] = {
    "just applied": (begin, ["AddFinalizer", "CreateCluster"], Phase.PROVISIONING, "Provisioning"),
    "just applied, no finalizer": (
        lambda: begin(finalizers=[]),
        ["AddFinalizer", "CreateCluster"],
        Phase.PROVISIONING,
        "Provisioning",
    ),
    "applied with a queue": (lambda: begin(QUEUED), ["AddFinalizer", "CreateCluster"], Phase.QUEUED, "Provisioning"),
    "no KubeRay": (
        lambda: replace(begin(), kuberay_installed=False),
        [],
        Phase.PENDING,
        "KubeRayMissing",
    ),
    "RayClusters cannot be read": (lambda: replace(begin(), cluster=Unknown("500")), [], None, None),
    "a field that is not built": (
        lambda: begin({"deepspeed": {"offload": {"params": "cpu"}}}),
        [],
        Phase.FAILED,
        "NotSupported",
    ),
    "a spec that cannot be parsed": (lambda: begin({"nodePools": "two"}), [], Phase.FAILED, "Invalid"),
    "no pools": (lambda: begin({"nodePools": []}), [], Phase.FAILED, "Invalid"),
    "a pod template beyond the allow-list": (
        lambda: begin({"nodePools": [{"name": "gpu", "podTemplate": {"spec": {"nodeName": "n"}}}]}),
        [],
        Phase.FAILED,
        "Invalid",
    ),
    "a pod template beyond the policy": (
        lambda: begin({"nodePools": [{"name": "gpu", "podTemplate": {"spec": {"hostNetwork": True}}}]}),
        [],
        Phase.FAILED,
        "NotAllowed",
    ),
    "somebody else's RayCluster": (
        lambda: replace(begin(), cluster=cluster(begin(), owned=False)),
        [],
        Phase.PENDING,
        "NameConflict",
    ),
    "the cluster is new": (
        lambda: replace(after(begin())[0], cluster=cluster(begin())),
        ["CreateToken", "CreateChild"],
        Phase.PROVISIONING,
        "Provisioning",
    ),
    "pods are starting": (provisioning, [], Phase.PROVISIONING, "Provisioning"),
    "the queue decides": (lambda: provisioning(QUEUED, suspended=True), [], Phase.QUEUED, "Queued"),
    "the image cannot be pulled": (
        lambda: replace(provisioning(), pods=(Pod("p", "worker", "gpu", waiting=("ImagePullBackOff", "not found")),)),
        [],
        Phase.PROVISIONING,
        "ImagePull",
    ),
    "no node fits": (
        lambda: replace(provisioning(), pods=(Pod("p", "worker", "gpu", unscheduled="0/3 nodes are available"),)),
        [],
        Phase.PROVISIONING,
        "Unschedulable",
    ),
    "a Secret is missing": (
        lambda: replace(
            provisioning(), pods=(Pod("p", "worker", "gpu", waiting=("CreateContainerConfigError", 'secret "s3"')),)
        ),
        [],
        Phase.PROVISIONING,
        "PodConfigInvalid",
    ),
    "quota refuses pods": (
        lambda: provisioning(problem="exceeded quota"),
        [],
        Phase.PROVISIONING,
        "ClusterRefused",
    ),
    "the head does not answer yet": (
        lambda: replace(provisioning(**WHOLE), head=Unknown("refused")),
        [],
        Phase.PROVISIONING,
        "WaitingForRay",
    ),
    "all is ready": (whole, [], Phase.STARTING, "Starting"),
    "the intent is written": (lambda: after(whole())[0], ["SubmitJob"], None, None),
    "the driver starts": (
        lambda: replace(after(whole())[0], job=job("PENDING")),
        [],
        Phase.STARTING,
        "Starting",
    ),
    "the trainer loads": (
        lambda: replace(submitted(), progress=told(TrainerPhase.LOADING)),
        [],
        Phase.STARTING,
        "Starting",
    ),
    "it trains": (
        lambda: replace(submitted(), progress=told(TrainerPhase.TRAINING, step=3)),
        [],
        Phase.RUNNING,
        "Training",
    ),
    "it exports": (
        lambda: replace(submitted(), progress=told(TrainerPhase.EXPORTING)),
        [],
        Phase.EXPORTING,
        "Exporting",
    ),
    "Ray does not answer for a moment": (
        lambda: replace(submitted(), job=Unknown("timeout")),
        [],
        Phase.STARTING,
        "RayUnreachable",
    ),
    "the head restarted": (
        lambda: replace(submitted(), head=Head("session-2", "2.60.0"), job=None),
        [],
        Phase.PENDING,
        "Restarting",
    ),
    "Ray forgot the submission": (lambda: replace(submitted(), job=None), [], Phase.PENDING, "Restarting"),
    "the queue took the nodes back": (
        lambda: replace(submitted(), cluster=cluster(begin(), suspended=True), head=Unknown("gone"), job=None),
        [],
        Phase.PENDING,
        "Restarting",
    ),
    "the RayCluster is being deleted": (
        lambda: replace(submitted(), cluster=cluster(begin(), deleting=True)),
        [],
        Phase.PENDING,
        "Restarting",
    ),
    "its pods miss the Secret": (
        lambda: replace(
            provisioning(),
            pods=(Pod("h", "head", "", waiting=("CreateContainerConfigError", f'secret "chat-{UID[:5]}" not found')),),
        ),
        ["CreateToken", "CreateChild"],
        Phase.PROVISIONING,
        "PodConfigInvalid",
    ),
    "its pods miss a Secret of the user": (
        lambda: replace(
            provisioning(),
            pods=(Pod("h", "head", "", waiting=("CreateContainerConfigError", 'secret "s3" not found')),),
        ),
        [],
        Phase.PROVISIONING,
        "PodConfigInvalid",
    ),
    "the RayCluster is gone": (
        lambda: replace(submitted(), cluster=None, job=None),
        ["DeleteCluster"],
        Phase.PENDING,
        "Restarting",
    ),
    "done": (
        lambda: replace(
            submitted(), job=job("SUCCEEDED", exit_code=0), progress=told(TrainerPhase.SUCCEEDED, output=OUTPUT)
        ),
        [],
        Phase.SUCCEEDED,
        "Succeeded",
    ),
    "done, and then stopped": (
        lambda: replace(submitted(), job=job("STOPPED"), progress=told(TrainerPhase.SUCCEEDED, output=OUTPUT)),
        [],
        Phase.SUCCEEDED,
        "Succeeded",
    ),
    "bad data": (
        lambda: replace(
            submitted(),
            job=job("FAILED", exit_code=2),
            progress=told(TrainerPhase.FAILED, failure=failure(FailureClass.DATA_INVALID, 2)),
        ),
        [],
        Phase.FAILED,
        "DataInvalid",
    ),
    "a worker was lost": (
        lambda: replace(
            submitted(),
            job=job("FAILED", exit_code=1),
            progress=told(TrainerPhase.FAILED, failure=failure(FailureClass.WORKER_LOST)),
        ),
        [],
        Phase.PENDING,
        "Restarting",
    ),
    "suspended before it began": (lambda: begin(SUSPEND), [], Phase.SUSPENDED, "Suspended"),
    "suspended while it trains": (lambda: submitted_and(SUSPEND), ["StopJob"], Phase.SUSPENDING, "Suspended"),
    "suspended, and the driver has ended": (
        lambda: replace(submitted_and(SUSPEND), job=job("STOPPED")),
        ["DeleteCluster"],
        Phase.SUSPENDING,
        "Suspended",
    ),
    "deleted while it trains": (lambda: deleted(submitted()), ["StopJob"], None, None),
    "deleted, the driver has ended": (
        lambda: deleted(replace(submitted(), job=job("STOPPED"))),
        ["DeleteCluster"],
        None,
        None,
    ),
    "deleted, Ray does not answer": (
        lambda: deleted(replace(submitted(), job=Unknown("timeout"))),
        ["DeleteCluster"],
        None,
        None,
    ),
    "deleted, the cluster is on its way out": (
        lambda: deleted(replace(submitted(), cluster=cluster(begin(), deleting=True))),
        ["RemoveFinalizer"],
        None,
        None,
    ),
    "deleted before anything was made": (lambda: deleted(begin()), ["RemoveFinalizer"], None, None),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    seen, actions, phase, reason = (SITUATIONS[name][0](), *SITUATIONS[name][1:])
    decision = plan(seen, NOW, CONFIG)
    assert names(decision) == actions
    if phase is None:
        assert decision.status is None
        return
    status = decision.status
    assert status is not None
    assert status.phase is phase
    ready = condition_of(status, ConditionType.READY)
    assert ready is not None
    assert ready.reason == reason
    assert status.message == ready.message != ""
    # kstatus: never both, and a failed one is Stalled.
    kinds = {condition.type for condition in status.conditions if condition.status == "True"}
    assert not {ConditionType.RECONCILING, ConditionType.STALLED} <= kinds
    assert (ConditionType.STALLED in kinds) == (phase is Phase.FAILED)
