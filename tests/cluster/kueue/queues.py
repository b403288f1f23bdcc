"""Queues of Kueue for one test: a ClusterQueue with a quota, and LocalQueues that lead to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kubernetes.client import ApiClient, ApiException, CoreV1Api, CustomObjectsApi, V1Node, V1ObjectMeta

RACK = "cloud.test/rack"
GROUP, VERSION = "kueue.x-k8s.io", "v1beta2"
Document = dict[str, Any]


@dataclass(frozen=True)
class Flavor:
    """A kind of node, and how much of it there is: more than enough of what is not named."""

    name: str
    quota: Mapping[str, Any]
    node_labels: Mapping[str, str] = field(default_factory=dict[str, str])
    topology: str | None = None

    @property
    def resources(self) -> Document:
        return {"cpu": 100, "memory": "1Ti", **self.quota}

    @property
    def spec(self) -> Document:
        topology = {"topologyName": self.topology} if self.topology else {}
        return {"nodeLabels": dict(self.node_labels), **topology}

    @property
    def quotas(self) -> Document:
        quotas = [{"name": name, "nominalQuota": quota} for name, quota in self.resources.items()]
        return {"name": self.name, "resources": quotas}


@dataclass(frozen=True)
class Queues:
    """Of a namespace, whose name the ClusterQueue has too."""

    client: ApiClient
    namespace: str

    def prepare(self, *flavors: Flavor, local: str = "team-a", **spec: Any) -> None:
        """Quota of these flavors, of which Kueue tries the first one first; a higher priority preempts a lower one."""
        for flavor in flavors:
            self._make("resourceflavors", flavor.name, flavor.spec)
        for name, value in (("high", 1000), ("low", 10)):
            self._make("workloadpriorityclasses", name, value=value)
        groups = [{"coveredResources": [*flavors[0].resources], "flavors": [flavor.quotas for flavor in flavors]}]
        preemption = {"withinClusterQueue": "LowerPriority"}
        body = {"namespaceSelector": {}, "resourceGroups": groups, "preemption": preemption, **spec}
        self._make("clusterqueues", self.namespace, body)
        self.add(local)

    def prepare_multikueue(self, flavor: Flavor) -> None:
        """A queue that sends its work to other clusters. There are none, which it does not ask."""
        check = f"elsewhere-{self.namespace}"
        self._make("admissionchecks", check, {"controllerName": "kueue.x-k8s.io/multikueue"})
        self.prepare(flavor, admissionChecksStrategy={"admissionChecks": [{"name": check}]})

    def add(self, local: str) -> None:
        """Another LocalQueue."""
        body = _body("LocalQueue", local, {"clusterQueue": self.namespace})
        self._objects.create_namespaced_custom_object(GROUP, VERSION, self.namespace, "localqueues", body)

    def stop(self, policy: str) -> None:
        """HoldAndDrain, Hold or None."""
        patch = {"spec": {"stopPolicy": policy}}
        self._objects.patch_cluster_custom_object(GROUP, VERSION, "clusterqueues", self.namespace, patch)

    def used(self, resource: str) -> str:
        """What runs hold of it, as the ClusterQueue tells; `0` if nothing."""
        queue: Any = self._objects.get_cluster_custom_object(GROUP, VERSION, "clusterqueues", self.namespace)
        flavors: list[Document] = (queue.get("status") or {}).get("flavorsReservation") or []
        used = {each["name"]: each["total"] for flavor in flavors for each in flavor["resources"]}
        return str(used.get(resource, 0))

    def add_racks(
        self, topology: str, nodes: Mapping[str, str], labels: Mapping[str, str], allocatable: Document
    ) -> None:
        """Nodes of racks, alike and ready, and the topology in which Kueue sees them: node -> rack."""
        self._make("topologies", topology, {"levels": [{"nodeLabel": RACK}, {"nodeLabel": "kubernetes.io/hostname"}]})
        core, ready = CoreV1Api(self.client), {"type": "Ready", "status": "True", "reason": "Test", "message": ""}
        for name, rack in nodes.items():
            meta = V1ObjectMeta(name=name, labels={**labels, RACK: rack, "kubernetes.io/hostname": name})
            core.create_node(V1Node(metadata=meta))
            # The API server makes them with a taint, which goes when they are ready.
            core.patch_node(name, {"spec": {"taints": None}})
            core.patch_node_status(name, {"status": {"allocatable": allocatable, "conditions": [ready]}})

    def workloads(self) -> list[Document]:
        """Those that are there."""
        listed: Any = self._objects.list_namespaced_custom_object(GROUP, VERSION, self.namespace, "workloads")
        return listed["items"]

    def _make(self, plural: str, name: str, spec: Document | None = None, **more: Any) -> None:
        body = _body(_KINDS[plural], name, spec) | more
        try:
            self._objects.create_cluster_custom_object(GROUP, VERSION, plural, body)
        except ApiException as answer:
            # Flavor and priorities are those of all tests.
            if answer.status != 409:
                raise

    @property
    def _objects(self) -> CustomObjectsApi:
        return CustomObjectsApi(self.client)


_KINDS = {
    "resourceflavors": "ResourceFlavor",
    "workloadpriorityclasses": "WorkloadPriorityClass",
    "clusterqueues": "ClusterQueue",
    "admissionchecks": "AdmissionCheck",
    "topologies": "Topology",
}


def _body(kind: str, name: str, spec: Document | None) -> Document:
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": kind, "metadata": {"name": name}}
    return body if spec is None else {**body, "spec": spec}
