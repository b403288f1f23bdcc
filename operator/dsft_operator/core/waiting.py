"""Why a run is not running yet, in one line: which pool, how many pods short, the words of whoever says no, what to do.

The words are those of the scheduler, the kubelet, KubeRay, Kueue or Ray; only the reason and the remedy are ours.
"""

import re

from dsft_api.conditions import WAITS, FailureClass, Reason
from dsft_api.spec import FineTuneSpec
from dsft_operator.core.avoidance import words as kept_away_from
from dsft_operator.core.observed import Cluster, Head, Observed, Pod, Queueing, Unknown
from dsft_operator.core.summary import Fact

# Waiting reasons of the kubelet that mean the image, and those that mean the pod's own references.
IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
# The scheduler's words where a claim and not a node is what is missing.
_VOLUME_WORDS = re.compile("persistentvolumeclaim|volume node affinity", re.IGNORECASE)
_VOLUME_EVENTS = ("FailedMount", "FailedAttachVolume", "FailedMapVolume", "VolumeFailedDelete", "ProvisioningFailed")
_SHOWN = 1000


def explain(spec: FineTuneSpec, seen: Observed, cluster: Cluster) -> Fact:
    """ClusterReady=False: the first obstacle in the order of its weight, how many pods are short, and what to do."""
    short = ""
    if cluster.managed_by is not None:
        # MultiKueue: neither its Secret nor its head's address is any good there.
        where = f"{cluster.managed_by}, which runs it on another Kubernetes cluster"
        reason, words = (
            Reason.QUEUE_CLOSED,
            f"RayCluster {cluster.name} is given to {where}: it cannot be followed there",
        )
    elif cluster.suspended:
        reason, words = _queued(spec, cluster, seen.queue)
    else:
        reason, words = _obstacle(cluster, seen.pods, seen.head)
        short = _short(spec, cluster, seen.pods)
    remedy = WAITS.get(reason)
    text = ": ".join(filter(None, (short, words[:_SHOWN])))
    if reason == FailureClass.UNSCHEDULABLE:
        text += kept_away_from(seen.run.status.avoided_nodes)
    return Fact(value=False, reason=reason, message=f"{text} -> {remedy}" if remedy else text)


def _queued(spec: FineTuneSpec, cluster: Cluster, said: Queueing | Unknown | None) -> tuple[str, str]:
    if spec.queue is None:
        return Reason.QUEUED, f"RayCluster {cluster.name} is suspended, and not by spec.queue: unsuspend it to go on"
    if isinstance(said, Queueing):
        place = f"{_ordinal(said.place[0])} of {said.place[1]} waiting here" if said.place is not None else ""
        return said.reason, ": ".join(filter(None, (f"queue {spec.queue.name}", place, said.message)))
    words = said.reason if said is not None else "Kueue has not looked at it yet"
    return Reason.QUEUED, f"waiting in queue {spec.queue.name}: {words}"


def _ordinal(number: int) -> str:
    teens = 10 < number % 100 < 20
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _obstacle(cluster: Cluster, pods: tuple[Pod, ...], head: Head | Unknown | None) -> tuple[str, str]:
    if cluster.problem:
        return Reason.CLUSTER_REFUSED, f"KubeRay cannot make the pods: {cluster.problem}"
    if cluster.warning:
        return Reason.CLUSTER_REFUSED, f"KubeRay refuses it: {cluster.warning.reason}: {cluster.warning.message}"
    if not cluster.seen_by_kuberay:
        return Reason.PROVISIONING, "KubeRay has not taken the RayCluster up yet; is its operator running?"
    found = [obstacle for pod in pods if (obstacle := pod_obstacle(pod)) is not None]
    if found:
        # Of several, the one that will not pass by itself: a pod may wait for a node while another's image is missing.
        return min(found, key=lambda obstacle: _WEIGHTS.index(obstacle[0]))
    if not cluster.head_ready:
        words = f"head: {cluster.head_message}" if cluster.head_message else "pods are starting"
        return Reason.PROVISIONING, words
    waiting = [pod.name for pod in pods if pod.waits_for_head]
    if waiting:
        return Reason.WAITING_FOR_RAY, f"{waiting[0]} asks the Ray head whether it is up"
    if isinstance(head, Unknown) and all(pod.ready for pod in pods):
        return Reason.WAITING_FOR_RAY, f"the Ray head does not answer yet: {head.reason}"
    leaving = [pod.name for pod in pods if pod.deleting]
    if leaving:
        return Reason.PROVISIONING, f"{leaving[0]} is being deleted; KubeRay makes another one when it has ended"
    return Reason.PROVISIONING, "pods are starting"


_WEIGHTS = (
    FailureClass.IMAGE_PULL,
    Reason.POD_CONFIG_INVALID,
    Reason.VOLUME_UNAVAILABLE,
    FailureClass.UNSCHEDULABLE,
    Reason.POD_FAILED,
    Reason.PROVISIONING,
)


def pod_obstacle(pod: Pod) -> tuple[str, str] | None:
    """A reason of ours and the words of whoever says no; None if a pod is on its way."""
    if pod.waiting and pod.waiting[0] in IMAGE_REASONS:
        return FailureClass.IMAGE_PULL, f"{pod.name}: {': '.join(filter(None, pod.waiting))}"
    if pod.waiting and pod.waiting[0] in CONFIG_REASONS:
        return Reason.POD_CONFIG_INVALID, f"{pod.name}: {': '.join(filter(None, pod.waiting))}"
    if pod.unscheduled is not None:
        is_volume = _VOLUME_WORDS.search(pod.unscheduled)
        reason = Reason.VOLUME_UNAVAILABLE if is_volume else FailureClass.UNSCHEDULABLE
        return reason, f"{pod.name}: {pod.unscheduled or 'no node fits'}"
    if pod.warning is not None:
        is_volume = pod.warning.reason in _VOLUME_EVENTS
        words = f"{pod.name}: {pod.warning.reason}: {pod.warning.message}"
        return Reason.VOLUME_UNAVAILABLE if is_volume else Reason.PROVISIONING, words
    if pod.ended and not pod.ready and not pod.deleting:
        last = pod.ended[-1]
        said = f": {last.message.strip()[-300:]}" if last.message.strip() else ""
        return Reason.POD_FAILED, f"{pod.name} ended: {last.reason}, exit code {last.exit_code}{said}"
    return None


def _short(spec: FineTuneSpec, cluster: Cluster, pods: tuple[Pod, ...]) -> str:
    parts = [] if cluster.head_ready else ["the head is not ready"]
    for pool in spec.node_pools:
        ready = sum(pod.ready for pod in pods if pod.role == "worker" and pod.pool == pool.name)
        if ready < pool.nodes:
            parts.append(f"pool {pool.name} has {ready} of {pool.nodes} pods ready")
    return ", ".join(parts)
