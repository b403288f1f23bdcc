"""A tenant's namespace: what its user does there by kubectl, and what can be seen of the runs in it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from kubernetes.client import ApiClient, BatchV1Api, CoreV1Api, CustomObjectsApi, NetworkingV1Api
from kubernetes.client.exceptions import ApiException

from dsft_api import GROUP, PLURAL, VERSION
from dsft_api.conditions import ConditionType, Phase
from dsft_api.status import Condition, FineTuneStatus
from dsft_trainer.checkpoint.store import Store, open_store
from tests.cluster.kubectl import Kubectl
from tests.cluster.operator_install import S3_SECRET
from tests.cluster.up import Storage

# Bounds are for what hangs, not for what is slow: others may use the cores.
START_SECONDS = 1500.0
GONE_SECONDS = 240.0
POLL_SECONDS = 0.5
LIST_LIMIT = 500
# Of the pods of a preflight.
JOB_LABEL = "batch.kubernetes.io/job-name"
ENDS = (Phase.SUCCEEDED, Phase.FAILED)
Document = dict[str, Any]


@dataclass(frozen=True)
class Tenant:
    """One namespace with the Secret that the admin's storage asks for."""

    kubectl: Kubectl
    client: ApiClient
    namespace: str
    storage: Storage
    storage_uri: str
    own_secrets: list[str] = field(default_factory=lambda: [S3_SECRET])

    # What a user does.

    def apply(self, manifest: Path | Mapping[str, Any]) -> None:
        """`kubectl apply -f`."""
        if isinstance(manifest, Path):
            self.kubectl("apply", "--filename", manifest)
        else:
            self.kubectl.apply(manifest)

    def patch(self, name: str, **spec: Any) -> None:
        """Change fields of the spec, as `kubectl edit` does."""
        body = {"spec": spec}
        CustomObjectsApi(self.client).patch_namespaced_custom_object(
            GROUP, VERSION, self.namespace, PLURAL, name, body, _content_type="application/merge-patch+json"
        )

    def delete(self, name: str) -> None:
        """`kubectl delete`, without waiting."""
        self.kubectl("delete", PLURAL, name, "--wait=false")

    # What can be seen.

    def resource(self, name: str) -> Document:
        """The resource as it is."""
        return CustomObjectsApi(self.client).get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)

    def exists(self, name: str) -> bool:
        try:
            self.resource(name)
        except ApiException as answer:
            if answer.status == 404:
                return False
            raise
        return True

    def status(self, name: str) -> FineTuneStatus:
        return FineTuneStatus.model_validate(self.resource(name).get("status") or {})

    def condition(self, name: str, kind: ConditionType) -> Condition | None:
        return condition_of(self.status(name), kind)

    def pods(self) -> list[Document]:
        listed = CoreV1Api(self.client).list_namespaced_pod(self.namespace, limit=LIST_LIMIT)
        return self.client.sanitize_for_serialization(listed)["items"]

    def head(self, name: str) -> str:
        """The name of the run's Ray head pod."""
        cluster = self.status(name).ray_cluster
        assert cluster is not None, f"{name} has no RayCluster"
        labels = {"ray.io/cluster": cluster.name, "ray.io/node-type": "head"}
        (pod,) = [pod for pod in self.pods() if labels.items() <= pod["metadata"]["labels"].items()]
        return pod["metadata"]["name"]

    def clusters(self) -> list[Document]:
        found = CustomObjectsApi(self.client).list_namespaced_custom_object(
            "ray.io", "v1", self.namespace, "rayclusters", limit=LIST_LIMIT
        )
        return found["items"]

    def events(self, name: str) -> list[Document]:
        """Of the resource, oldest first."""
        listed = CoreV1Api(self.client).list_namespaced_event(
            self.namespace, field_selector=f"involvedObject.name={name}", limit=LIST_LIMIT
        )
        found = self.client.sanitize_for_serialization(listed)["items"]
        return sorted(found, key=lambda event: event.get("lastTimestamp") or "")

    def left(self) -> list[str]:
        """What runs made here and is still there: RayClusters, Jobs, pods, Services, Secrets, NetworkPolicies."""
        core, networking = CoreV1Api(self.client), NetworkingV1Api(self.client)
        objects = {
            "Pod": core.list_namespaced_pod,
            "Job": BatchV1Api(self.client).list_namespaced_job,
            "Service": core.list_namespaced_service,
            "Secret": core.list_namespaced_secret,
            "NetworkPolicy": networking.list_namespaced_network_policy,
        }
        found = [
            f"{kind}/{item.metadata.name}"
            for kind, listed in objects.items()
            for item in listed(self.namespace, limit=LIST_LIMIT).items
        ]
        found += [f"RayCluster/{cluster['metadata']['name']}" for cluster in self.clusters()]
        ours = {f"Secret/{name}" for name in self.own_secrets}
        return sorted(set(found) - ours)

    def store(self, name: str) -> Store:
        """The run's folder in storage."""
        resolved = self.status(name).resolved
        assert resolved is not None, f"{name} has no folder in storage"
        assert resolved.storage_prefix is not None
        return open_store(resolved.storage_prefix, endpoint_url=self.storage.endpoint)

    # Waiting for it.

    def until(self, what: str, fact: Callable[[], object], seconds: float = START_SECONDS) -> None:
        """Look twice a second until it is so."""
        deadline = time.monotonic() + seconds
        while not fact():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
            time.sleep(POLL_SECONDS)

    def until_phase(self, name: str, wanted: Phase, seconds: float = START_SECONDS) -> FineTuneStatus:
        """Wait for a phase; fail at once if the run ends in another one. The status of that moment."""
        seen: list[FineTuneStatus] = []

        def there() -> bool:
            seen[:] = [self.status(name)]
            phase = seen[0].phase
            assert phase is wanted or phase not in ENDS, f"{name} is {phase}: {seen[0].message}"
            return phase is wanted

        self.until(f"{name} is {wanted}", there, seconds)
        return seen[0]

    def until_step(self, name: str, step: int, seconds: float = START_SECONDS) -> FineTuneStatus:
        """Wait until it trains and the status tells of this step or a later one."""
        seen: list[FineTuneStatus] = []

        def there() -> bool:
            seen[:] = [self.status(name)]
            assert seen[0].phase not in ENDS, f"{name} is {seen[0].phase}: {seen[0].message}"
            progress = seen[0].progress
            return seen[0].phase is Phase.RUNNING and progress is not None and progress.step >= step

        self.until(f"{name} is at step {step}", there, seconds)
        return seen[0]

    def until_nothing_left(self, seconds: float = GONE_SECONDS) -> None:
        """Wait until nothing that a run made is there."""
        deadline = time.monotonic() + seconds
        while left := self.left():
            assert time.monotonic() < deadline, f"still there after {seconds:.0f} s: {', '.join(left)}"
            time.sleep(POLL_SECONDS)


def condition_of(status: FineTuneStatus, kind: ConditionType) -> Condition | None:
    """The condition of a type, if it was stated."""
    return next((condition for condition in status.conditions if condition.type is kind), None)


def seconds_between(start: str | datetime | None, end: str | datetime | None) -> float:
    """Between two times of a resource."""
    first, last = (datetime.fromisoformat(time) if isinstance(time, str) else time for time in (start, end))
    assert first is not None
    assert last is not None
    return (last - first).total_seconds()
