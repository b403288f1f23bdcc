"""The story of a failed test, once: its runs, their events and pods, the ends of the logs of operator and driver."""

from collections.abc import Iterator
from typing import Any

from dsft_api import PLURAL
from tests.cluster.kubectl import KubectlError
from tests.cluster.operator_install import Install
from tests.e2e.tenant import Tenant

Document = dict[str, Any]
LINES = 60


def story(tenant: Tenant, operator: Install) -> str:
    """All that helps to understand a failure; what cannot be had is said, not raised."""
    return "\n".join(_parts(tenant, operator))


def _parts(tenant: Tenant, operator: Install) -> Iterator[str]:
    yield from _told("runs", lambda: _runs(tenant))
    yield from _told("pods", lambda: tenant.kubectl("get", "pods,rayclusters", "--output=wide"))
    yield from _told("what pods wait for, or how they ended", lambda: _containers(tenant))
    sort = "--sort-by=.metadata.creationTimestamp"
    yield from _told("events", lambda: _tail(tenant.kubectl("get", "events", sort), LINES))
    yield from _told("operator", lambda: operator.log(LINES))
    for pod in _heads(tenant):
        yield from _told(f"log of {pod}", lambda pod=pod: tenant.kubectl("logs", pod, f"--tail={LINES}"))


def _told(title: str, read: Any) -> Iterator[str]:
    yield f"--- {title}"
    try:
        yield read().rstrip()
    except KubectlError as error:
        yield str(error)


def _runs(tenant: Tenant) -> str:
    runs = tenant.kubectl.read(PLURAL)["items"]
    return "\n".join(line for run in runs for line in _run(run["metadata"]["name"], run.get("status") or {}))


def _run(name: str, status: Document) -> Iterator[str]:
    """A run in a few lines; a condition's words only where they are not the run's own."""
    yield f"{name}: {status.get('phase')}: {status.get('message')}"
    for condition in status.get("conditions", ()):
        words = "" if condition["message"] == status.get("message") else f": {condition['message']}"
        yield f"  {condition['type']}={condition['status']} {condition['reason']}{words}"
    yield from (f"  attempt {attempt}" for attempt in status.get("attempts", ()))
    parts = {key: status[key] for key in ("rayCluster", "job", "progress", "checkpoints") if key in status}
    yield f"  {parts}"


def _containers(tenant: Tenant) -> str:
    lines: list[str] = []
    for pod in tenant.pods():
        status: Document = pod.get("status") or {}
        for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
            states = {name: container.get(name) or {} for name in ("state", "lastState")}
            told = {name: state for name, state in states.items() if state and "running" not in state}
            lines += [f"{pod['metadata']['name']}/{container['name']}: {told}"] if told else []
    return "\n".join(lines)


def _heads(tenant: Tenant) -> list[str]:
    labels = [pod["metadata"] for pod in tenant.pods()]
    return [meta["name"] for meta in labels if (meta.get("labels") or {}).get("ray.io/node-type") == "head"]


def _tail(text: str, lines: int) -> str:
    return "\n".join(text.splitlines()[-lines:])
