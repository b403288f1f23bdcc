"""SIGKILL for the operator, as when its node loses power; the Deployment makes another one at once."""

from tests.cluster.kubectl import Document
from tests.cluster.node_runtime import ctr
from tests.cluster.operator_install import NAME, Install


def kill(operator: Install, *, on_this_machine: bool) -> None:
    """End the operator's process without a word, and wait until another one is ready.

    A container can't be killed from inside, so on another machine's cluster the pod is deleted without grace: the
    kubelet then sends SIGTERM two seconds before SIGKILL.
    """
    pods = operator.kubectl.read("pods", f"--selector=app.kubernetes.io/name={NAME}")["items"]
    for pod in pods:
        if on_this_machine:
            for container in _containers(pod):
                ctr("tasks", "kill", "--signal", "SIGKILL", container)
        # Not for the kubelet to start again: it would wait longer each time.
        operator.kubectl("delete", "pod", pod["metadata"]["name"], "--force", "--grace-period=0")
    operator.wait_ready()


def _containers(pod: Document) -> list[str]:
    """Ids of the containers that run, as containerd knows them."""
    statuses = pod["status"].get("containerStatuses") or ()
    return [c["containerID"].partition("://")[2] for c in statuses if "running" in c["state"]]
