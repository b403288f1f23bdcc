"""Ways to break what a run stands on: its processes from inside a pod, and the parts of the disposable cluster."""

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from tests.cluster.images import registry_answers
from tests.cluster.node_layout import ADDRESS, FOLDERS, NODE
from tests.cluster.processes import restart_recorded
from tests.cluster.up import api_server_answers
from tests.e2e.tenant import Tenant
from tests.s3_faults import FaultyS3, faulty

UP_SECONDS = 60.0
DRAIN_SECONDS = 180
# A rank's process is named after the actor that it is.
_RANKS = """
import os, signal, time
def ranks():
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            name = open(f"/proc/{pid}/cmdline").read()
        except OSError:
            continue
        if name.startswith("ray::RayTrainWorker"):
            found.add(int(pid))
    return found
"""
_STOP_A_RANK = f"""{_RANKS}
for pid in ranks():
    os.kill(pid, signal.SIGSTOP)
    print(pid)
"""
# Takes memory, and touches it, slowly enough for Ray's monitor, until a rank in the container is gone. In several processes:
# the kernel kills the largest, as it counts, and that must be the rank.
_EAT_MEMORY = f"""{_RANKS}
doomed, eaten = ranks(), []
for _ in range(7):
    if not os.fork():
        break
while doomed <= ranks():
    eaten.append(b"x" * 2**20)
    time.sleep(0.1)
"""


def pause(seconds: float) -> None:
    """Let the fault last: its length is what the test is about."""
    threading.Event().wait(seconds)


def workers(tenant: Tenant) -> list[str]:
    """Names of the worker pods that are not on their way out."""
    pods = [pod["metadata"] for pod in tenant.pods() if pod["metadata"]["labels"].get("ray.io/node-type") == "worker"]
    return sorted(meta["name"] for meta in pods if "deletionTimestamp" not in meta)


def stop_a_rank(tenant: Tenant, pod: str) -> None:
    """SIGSTOP for the rank in a worker pod: it neither goes on nor ends."""
    stopped = tenant.kubectl("exec", pod, "--container=ray-worker", "--", "python", "-c", _STOP_A_RANK)
    assert len(stopped.split()) == 1, f"one rank in {pod}: {stopped!r}"


def eat_memory(tenant: Tenant, pod: str) -> None:
    """Start a process in a worker pod that takes memory until the limit of the container has a victim."""
    eater = ("sh", "-c", 'setsid python -c "$0" >/tmp/eater.log 2>&1 &', _EAT_MEMORY)
    tenant.kubectl("exec", pod, "--container=ray-worker", "--", *eater)


def hold(tenant: Tenant, pod: str, *, held: bool) -> None:
    """A finalizer on a pod, or none: with one it stays, Terminating, when all its containers have ended."""
    finalizers = ["dsft.dev/dead-node"] if held else None
    patch = json.dumps({"metadata": {"finalizers": finalizers}})
    tenant.kubectl("patch", "pod", pod, "--type=merge", f"--patch={patch}")


def drain_node(tenant: Tenant) -> None:
    """`kubectl drain`: cordon the node and evict every pod, ours and the operator's."""
    options = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", f"--timeout={DRAIN_SECONDS}s")
    tenant.kubectl("drain", NODE, *options, seconds=DRAIN_SECONDS + 10)


def without_api_server(meanwhile: Callable[[], None]) -> None:
    """Kill kube-apiserver, and start it again afterwards; returns when it answers."""
    restart_recorded(FOLDERS.control_plane, "kube-apiserver", meanwhile).wait_until(api_server_answers, UP_SECONDS)


def without_registry(meanwhile: Callable[[], None]) -> None:
    """Kill the image registry, and start it again afterwards; returns when it answers."""
    restart_recorded(FOLDERS.state, "registry", meanwhile).wait_until(registry_answers, UP_SECONDS)


def s3_behind_proxy(tenant: Tenant) -> AbstractContextManager[FaultyS3]:
    """The cluster's S3 at another endpoint, which pods reach and tests break; nobody else uses it."""
    return faulty(tenant.storage.endpoint, ADDRESS)
