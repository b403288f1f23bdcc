"""Why a run waits, from what the API server has: pods, RayCluster, Events and Kueue Workloads as they were seen on real ones."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dsft_api.conditions import WAITS, ConditionType, FailureClass, Phase, Reason
from dsft_operator.adapters.kueue import MISSING, queueing_of
from dsft_operator.adapters.reading import cluster_of, pod_of, warnings_of
from dsft_operator.core.decision import Decision
from dsft_operator.core.observed import Head, Observed, Queueing, Unknown
from dsft_operator.core.plan import plan
from dsft_operator.core.summary import condition_of
from tests.unit.operator.situations import CONFIG, NOW, UID, after, begin, cluster, names, provisioning

Json = dict[str, Any]
QUEUED = {"queue": {"name": "team-a"}}
AT = "2026-01-01T11:59:00Z"


def condition(kind: str, status: str, reason: str = "", message: str = "") -> Json:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": AT}


def pod(
    name: str = "chat-gpu-1", *, conditions: Any = None, containers: Any = (), init: Any = (), **status: Any
) -> Json:
    """A pod of KubeRay's; by default scheduled, and nothing else."""
    is_head = name.endswith("head")
    labels = {"ray.io/node-type": "head" if is_head else "worker", "ray.io/group": "headgroup" if is_head else "gpu"}
    return {
        "metadata": {"name": name, "uid": f"{name}-uid", "labels": labels},
        "spec": {"nodeName": "node-1"},
        "status": {
            "conditions": [condition("PodScheduled", "True")] if conditions is None else conditions,
            "containerStatuses": list(containers),
            "initContainerStatuses": list(init),
            **status,
        },
    }


def container(name: str = "ray-worker", **state: Any) -> Json:
    return {"name": name, "state": state}


def waiting(reason: str, message: str = "", name: str = "ray-worker") -> Json:
    return container(name, waiting={"reason": reason, "message": message})


READY = [condition("PodScheduled", "True"), condition("Ready", "True")]
HEAD = pod("chat-head", conditions=READY, containers=[container("ray-head", running={"startedAt": AT})])
UNSCHEDULED = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
NO_CLAIM = '0/1 nodes are available: persistentvolumeclaim "runs" not found.'
NO_CONFIG_MAP = 'MountVolume.SetUp failed for volume "ca" : configmap "corp-ca" not found'
NO_DISK = 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) other'


def observed(*pods: Json, head: Head | Unknown | None = None, event: Json | None = None, **facts: Any) -> Observed:
    """What is seen of a run whose cluster has these pods; `event` is about the last of them."""
    read = [pod_of(raw) for raw in pods]
    if event is not None:
        read[-1] = replace(read[-1], warning=warnings_of([event])[-1])
    ready = {"head_ready": True} if pods and pods[0] is HEAD else {}
    return replace(provisioning(**{**ready, **facts}), pods=tuple(read), head=head)


def warning(reason: str, message: str) -> Json:
    return {"reason": reason, "message": message, "lastTimestamp": AT, "metadata": {}}


# situation, reason of ClusterReady, words of the message
WAITING: dict[str, tuple[Observed, str, list[str]]] = {
    "no pod is there yet": (observed(), Reason.PROVISIONING, ["the head is not ready", "0 of 2", "pods are starting"]),
    "KubeRay does not act": (
        observed(seen_by_kuberay=False),
        Reason.PROVISIONING,
        ["KubeRay has not taken the RayCluster up yet"],
    ),
    "KubeRay refuses it by an Event alone": (
        observed(
            seen_by_kuberay=False,
            warning=warnings_of([warning("InvalidRayClusterSpec", "head group has no containers")])[0],
        ),
        Reason.CLUSTER_REFUSED,
        ["InvalidRayClusterSpec: head group has no containers"],
    ),
    "quota refuses a pod": (
        observed(HEAD, problem='FailedCreateWorkerPod: pods "x" is forbidden: exceeded quota: gpus'),
        Reason.CLUSTER_REFUSED,
        ["pool gpu has 0 of 2 pods ready", "exceeded quota: gpus"],
    ),
    "no node has the GPUs": (
        observed(HEAD, pod(conditions=[condition("PodScheduled", "False", "Unschedulable", UNSCHEDULED)])),
        FailureClass.UNSCHEDULABLE,
        ["pool gpu has 0 of 2 pods ready", UNSCHEDULED],
    ),
    "a claim is missing": (
        observed(HEAD, pod(conditions=[condition("PodScheduled", "False", "Unschedulable", NO_CLAIM)])),
        Reason.VOLUME_UNAVAILABLE,
        [NO_CLAIM],
    ),
    "a ConfigMap that is mounted is missing": (
        observed(HEAD, pod(containers=[waiting("ContainerCreating")]), event=warning("FailedMount", NO_CONFIG_MAP)),
        Reason.VOLUME_UNAVAILABLE,
        ["FailedMount", 'configmap "corp-ca" not found'],
    ),
    "a disk is held by another node": (
        observed(HEAD, pod(containers=[waiting("ContainerCreating")]), event=warning("FailedAttachVolume", NO_DISK)),
        Reason.VOLUME_UNAVAILABLE,
        ["FailedAttachVolume", "already used"],
    ),
    "the network of a pod is not made": (
        observed(
            HEAD, pod(containers=[waiting("ContainerCreating")]), event=warning("FailedCreatePodSandBox", "no IP")
        ),
        Reason.PROVISIONING,
        ["FailedCreatePodSandBox: no IP"],
    ),
    "a Secret is missing": (
        observed(HEAD, pod(containers=[waiting("CreateContainerConfigError", 'secret "s3" not found')])),
        Reason.POD_CONFIG_INVALID,
        ['secret "s3" not found'],
    ),
    "the image cannot be pulled, in the init container": (
        observed(HEAD, pod(init=[waiting("ImagePullBackOff", "Back-off pulling image", "wait-gcs-ready")])),
        FailureClass.IMAGE_PULL,
        ["chat-gpu-1: ImagePullBackOff: Back-off pulling image"],
    ),
    "one pod waits for a node, another for an image that is not there": (
        observed(
            HEAD,
            pod("a", conditions=[condition("PodScheduled", "False", "Unschedulable", UNSCHEDULED)]),
            pod("b", containers=[waiting("ErrImagePull", "not found")]),
        ),
        FailureClass.IMAGE_PULL,
        ["b: ErrImagePull: not found"],
    ),
    "a container ends again and again": (
        observed(
            HEAD,
            pod(
                containers=[
                    {
                        **waiting("CrashLoopBackOff", "back-off 40s"),
                        "lastState": {
                            "terminated": {"reason": "Error", "exitCode": 127, "message": "bash: ray: not found\n"}
                        },
                    }
                ]
            ),
        ),
        Reason.POD_FAILED,
        ["chat-gpu-1 ended: Error, exit code 127: bash: ray: not found"],
    ),
    "the head is slow": (
        observed(head_message="PodInitializing: containers with unready status"),
        Reason.PROVISIONING,
        ["the head is not ready", "head: PodInitializing"],
    ),
    "a worker asks for the head": (
        observed(HEAD, pod(init=[container("wait-gcs-ready", running={"startedAt": AT})])),
        Reason.WAITING_FOR_RAY,
        ["pool gpu has 0 of 2 pods ready", "chat-gpu-1 asks the Ray head"],
    ),
    "all are ready, and Ray refuses the token": (
        observed(
            HEAD,
            pod("a", conditions=READY),
            pod("b", conditions=READY),
            head=Unknown("the Ray head refused our token (401)"),
            ready_workers=2,
        ),
        Reason.WAITING_FOR_RAY,
        ["refused our token (401)"],
    ),
}


@pytest.mark.parametrize("name", WAITING)
def test_why_pods_are_waited_for(name: str) -> None:
    seen, reason, words = WAITING[name]
    told_by(plan(seen, NOW, CONFIG), Phase.PROVISIONING, reason, words)


def told_by(decision: Decision, phase: Phase, reason: str, words: list[str]) -> None:
    status = decision.status
    assert status is not None
    assert status.phase is phase
    fact = condition_of(status, ConditionType.CLUSTER_READY)
    assert fact is not None
    assert (fact.status, fact.reason) == ("False", reason)
    assert fact.message == status.message
    assert [word for word in words if word not in fact.message] == []
    remedy = WAITS[reason]
    assert remedy is None or fact.message.endswith(f"-> {remedy}")


def workload(*conditions: Json, active: bool = True, checks: Any = ()) -> Json:
    return {"spec": {"active": active}, "status": {"conditions": list(conditions), "admissionChecks": list(checks)}}


PENDING = (
    "couldn't assign flavors to pod set gpu: insufficient unused quota for nvidia.com/gpu in flavor gpu, 8 more needed"
)
NEVER = (
    "couldn't assign flavors: insufficient quota for nvidia.com/gpu, current podset request (16) > maximum capacity (8)"
)
PREEMPTED = "Preempted to accommodate a workload (UID: 1) due to prioritization in the ClusterQueue"

# situation, reason, words
IN_QUEUE: dict[str, tuple[Queueing | Unknown | None, str, list[str]]] = {
    "Kueue has not looked yet": (None, Reason.QUEUED, ["waiting in queue team-a", "has not looked at it yet"]),
    "Kueue cannot be asked": (Unknown("403: forbidden"), Reason.QUEUED, ["waiting in queue team-a", "403: forbidden"]),
    "there is no Kueue": (MISSING, Reason.KUEUE_MISSING, ["team-a"]),
    "a Workload without a word": (queueing_of({}), Reason.QUEUED, ["not judged it yet"]),
    "quota is used up": (
        queueing_of(workload(condition("QuotaReserved", "False", "Pending", PENDING))),
        Reason.QUEUED,
        ["8 more needed"],
    ),
    "it can never fit": (
        queueing_of(workload(condition("QuotaReserved", "False", "Pending", NEVER))),
        Reason.NEVER_FITS,
        ["maximum capacity (8)"],
    ),
    "the queue does not exist": (
        queueing_of(workload(condition("QuotaReserved", "False", "Inadmissible", "LocalQueue team-a doesn't exist"))),
        Reason.QUEUE_CLOSED,
        ["doesn't exist"],
    ),
    "the queue was stopped": (
        queueing_of(
            workload(
                condition("QuotaReserved", "False", "Inadmissible", "ClusterQueue gpu is stopped"),
                condition("Evicted", "True", "ClusterQueueStopped", "The ClusterQueue is stopped"),
            )
        ),
        Reason.QUEUE_CLOSED,
        ["ClusterQueueStopped", "is stopped"],
    ),
    "it was preempted": (
        queueing_of(
            workload(
                condition("QuotaReserved", "False", "Pending", PREEMPTED),
                condition("Evicted", "True", "Preempted", PREEMPTED),
            )
        ),
        Reason.QUEUED,
        ["Preempted", "to accommodate"],
    ),
    "it was deactivated": (
        queueing_of(workload(condition("Evicted", "True", "Deactivated", "by an admin"), active=False)),
        Reason.QUEUE_CLOSED,
        ["Deactivated"],
    ),
    "an admission check is open": (
        queueing_of(
            workload(
                condition("QuotaReserved", "True", "QuotaReserved"),
                checks=[{"name": "nodes", "state": "Pending", "message": "provisioning 2 nodes"}],
            )
        ),
        Reason.QUEUED,
        ["nodes: provisioning 2 nodes"],
    ),
}


@pytest.mark.parametrize("name", IN_QUEUE)
def test_why_the_queue_holds_it(name: str) -> None:
    said, reason, words = IN_QUEUE[name]
    seen = replace(provisioning(QUEUED, suspended=True), queue=said)
    told_by(plan(seen, NOW, CONFIG), Phase.QUEUED, reason, words)


def test_a_cluster_that_somebody_else_suspended_says_so() -> None:
    told_by(plan(provisioning(suspended=True), NOW, CONFIG), Phase.QUEUED, Reason.QUEUED, ["not by spec.queue"])


def test_a_cluster_that_is_sent_elsewhere_says_so() -> None:
    raw = {"metadata": {"name": "c", "uid": "u"}, "spec": {"managedBy": "kueue.x-k8s.io/multikueue", "suspend": True}}
    elsewhere = cluster_of(raw, "run").managed_by
    seen = provisioning(QUEUED, suspended=True, managed_by=elsewhere)
    told_by(plan(seen, NOW, CONFIG), Phase.QUEUED, Reason.QUEUE_CLOSED, ["multikueue", "another Kubernetes cluster"])
    raw["spec"]["managedBy"] = "ray.io/kuberay-operator"
    assert cluster_of(raw, "run").managed_by is None


def test_the_newest_warning_counts() -> None:
    old = {**warning("FailedMount", "old"), "lastTimestamp": "2026-01-01T11:00:00Z"}
    series = {
        **warning("FailedMount", "new"),
        "lastTimestamp": None,
        "series": {"lastObservedTime": "2026-01-01T11:58:00.5Z"},
    }
    assert [event.message for event in warnings_of([series, old])] == ["old", "new"]


def test_a_pod_is_mute_only_before_its_first_container_runs() -> None:
    creating = pod(containers=[waiting("ContainerCreating")])
    assert pod_of(creating).preparing_since == NOW - timedelta(minutes=1)
    assert pod_of(pod(init=[container("wait-gcs-ready", running={})])).preparing_since is None
    assert pod_of(pod(conditions=[condition("PodScheduled", "False")])).preparing_since is None


def test_a_raycluster_that_kuberay_has_not_answered_is_told_from_one_it_has() -> None:
    raw: Json = {"metadata": {"name": "chat", "uid": "1", "creationTimestamp": AT}, "spec": {}}
    assert not cluster_of(raw, UID).seen_by_kuberay
    assert cluster_of({**raw, "status": {"observedGeneration": 1}}, UID).seen_by_kuberay
    failing = {"status": {"conditions": [condition("ReplicaFailure", "True", "FailedCreateHeadPod", "exceeded quota")]}}
    assert cluster_of({**raw, **failing}, UID).problem == "FailedCreateHeadPod: exceeded quota"


@pytest.mark.parametrize(
    "name", ["no node has the GPUs", "a Secret is missing", "the image cannot be pulled, in the init container"]
)
def test_a_wait_that_is_over_keeps_its_words_and_goes_on_with_a_token(name: str) -> None:
    stuck, reason, words = WAITING[name]
    deadline = {"deadlines": {"provisionSeconds": 60}}
    seen = replace(stuck, run=replace(stuck.run, spec=begin(deadline).run.spec))
    seen, first = after(seen)
    assert first.requeue_after == 5
    seen, _ = after(seen, 60)
    status = seen.run.status
    assert (status.phase, status.attempts, status.attempt) == (Phase.FAILED, (), None)
    succeeded, ready = (condition_of(status, kind) for kind in (ConditionType.SUCCEEDED, ConditionType.CLUSTER_READY))
    assert succeeded is not None
    assert (succeeded.status, succeeded.reason) == ("False", "ProvisionTimeout")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", reason)
    for told in (succeeded.message, ready.message, status.message or ""):
        assert [word for word in words if word not in told] == []
    assert f"{WAITS[reason]}; then set a new spec.retry.token" in (status.message or "")
    assert names(plan(seen, NOW, CONFIG)) == ["DeleteCluster"]
    gone = replace(seen, cluster=None, pods=())
    assert plan(gone, NOW, CONFIG) == Decision()
    renewed = begin({**deadline, "retry": {"token": "2"}}).run.spec
    on, _ = after(replace(gone, run=replace(gone.run, spec=renewed)), 70)
    on, _ = after(on, 70)
    on, made = after(on, 70)
    assert names(made) == ["AddFinalizer", "CreateCluster"]
    on = replace(on, cluster=cluster(on, name=f"chat-{UID[:5]}-2", uid="cluster-2"))
    on, _ = after(on, 75)
    assert after(on, 129)[1].status is not None
    assert after(on, 129)[0].run.status.phase is Phase.PROVISIONING
