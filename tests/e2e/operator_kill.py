"""SIGKILL for the replica that acts, as when its node loses power; the other one takes over when the Lease has run out."""

import threading
import time

from tests.cluster.kubectl import Document
from tests.cluster.node_runtime import ctr
from tests.cluster.operator_install import Install

# A bound for what hangs. What is promised is in the tests.
TAKEOVER_SECONDS = 120.0


def kill(operator: Install, *, on_this_machine: bool) -> float:
    """End the leader's process without a word, and wait until another one leads and two are ready; seconds until it led.

    A container can't be killed from inside, so on another machine's cluster the pod is deleted without grace: the
    kubelet then sends SIGTERM two seconds before SIGKILL.
    """
    leader = operator.leader()
    if on_this_machine:
        signal_leader(operator, "SIGKILL")
    # Not for the kubelet to start again: it would wait longer each time.
    operator.kubectl("delete", "pod", leader, "--force", "--grace-period=0")
    took = until_another_leads(operator, leader)
    operator.wait_ready()
    return took


def signal_leader(operator: Install, name: str, leader: str | None = None) -> str:
    """Send a signal to the process of the leader, or of who was it, on this machine's cluster; its pod."""
    leader = leader or operator.leader()
    (pod,) = [pod for pod in operator.pods() if pod["metadata"]["name"] == leader]
    for container in _containers(pod):
        ctr("tasks", "kill", "--signal", name, container)
    return leader


def until_another_leads(operator: Install, before: str) -> float:
    """Seconds until another pod than `before` holds the Lease."""
    began, pause = time.monotonic(), threading.Event()
    while operator.leader() in ("", before):
        assert time.monotonic() - began < TAKEOVER_SECONDS, f"{before} still leads\n{operator.log()}"
        pause.wait(0.2)
    return time.monotonic() - began


def _containers(pod: Document) -> list[str]:
    """Ids of the containers that run, as containerd knows them."""
    statuses = pod["status"].get("containerStatuses") or ()
    return [c["containerID"].partition("://")[2] for c in statuses if "running" in c["state"]]
