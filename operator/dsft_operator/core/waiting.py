"""Why a run is not running yet, in one line: which pool, how many pods short, and the words of whoever says no."""

from dsft_api.conditions import FailureClass, Reason
from dsft_api.spec import FineTuneSpec
from dsft_operator.core.observed import Cluster, Pod
from dsft_operator.core.summary import Fact

# Waiting reasons of the kubelet that mean the image, and those that mean the pod's own references.
IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


def explain(spec: FineTuneSpec, cluster: Cluster, pods: tuple[Pod, ...]) -> Fact:
    """ClusterReady=False: the first obstacle in the order of its weight, and how many pods are short."""
    reason, words = _obstacle(cluster, pods)
    short = _short(spec, cluster, pods)
    return Fact(value=False, reason=reason, message=": ".join(filter(None, (short, words))))


def _obstacle(cluster: Cluster, pods: tuple[Pod, ...]) -> tuple[str, str]:
    if cluster.problem:
        return Reason.CLUSTER_REFUSED, f"KubeRay cannot make the pods: {cluster.problem}"
    for pod in pods:
        if pod.waiting and pod.waiting[0] in IMAGE_REASONS:
            return FailureClass.IMAGE_PULL, f"{pod.name}: {': '.join(filter(None, pod.waiting))}"
    for pod in pods:
        if pod.unscheduled:
            return FailureClass.UNSCHEDULABLE, f"{pod.name}: {pod.unscheduled}"
    for pod in pods:
        if pod.waiting and pod.waiting[0] in CONFIG_REASONS:
            return Reason.POD_CONFIG_INVALID, f"{pod.name}: {': '.join(filter(None, pod.waiting))}"
    for pod in pods:
        if pod.ended and not pod.ready:
            last = pod.ended[-1]
            return Reason.POD_FAILED, f"{pod.name} ended: {last.reason}, exit code {last.exit_code}"
    if cluster.head_message and not cluster.head_ready:
        return Reason.PROVISIONING, f"head: {cluster.head_message}"
    return Reason.PROVISIONING, "pods are starting"


def _short(spec: FineTuneSpec, cluster: Cluster, pods: tuple[Pod, ...]) -> str:
    parts = [] if cluster.head_ready else ["the head is not ready"]
    for pool in spec.node_pools:
        ready = sum(pod.ready for pod in pods if pod.role == "worker" and pod.pool == pool.name)
        if ready < pool.nodes:
            parts.append(f"pool {pool.name} has {ready} of {pool.nodes} pods ready")
    return ", ".join(parts)
