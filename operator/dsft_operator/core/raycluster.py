"""The RayCluster of a run, and its NetworkPolicy. Created once, then left alone: Kueue and KubeRay write to it too.

Fields: KubeRay ray.io/v1 RayCluster. `spec.suspend` is set only where a queue decides, and never touched afterwards.
"""

from collections.abc import Sequence
from typing import Any

from dsft_api import API_VERSION, KIND
from dsft_api.resource import digest
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.placement import NodePool
from dsft_operator.config import OperatorConfig
from dsft_operator.core import naming
from dsft_operator.core.avoidance import kept_away
from dsft_operator.core.observed import Run
from dsft_operator.core.pods import METRICS_PORT, head_pod, run_labels, worker_pod

Manifest = dict[str, Any]

RAY_API_VERSION = "ray.io/v1"
# Each scheduler's labels for the queue and for the priority: Kueue's own classes, Kubernetes' with the others. Kueue, Volcano
# and KAI read them off the RayCluster; YuniKorn reads the priority off the pods only.
_QUEUE_LABELS = {
    "kueue": ("kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"),
    "volcano": ("volcano.sh/queue-name", "ray.io/priority-class-name"),
    "yunikorn": ("yunikorn.apache.org/queue", None),
    "kai": ("kai.scheduler/queue", "priorityClassName"),
}
# To YuniKorn pods without an id are one application of their namespace, in the queue of the first of them; and only if asked
# does it wait until it has room for all of them.
_YUNIKORN_ID, _YUNIKORN_GANG = "yunikorn.apache.org/app-id", "ray.io/gang-scheduling-enabled"


def ray_cluster(run: Run, spec: FineTuneSpec, config: OperatorConfig, incarnation: int) -> Manifest:
    """The RayCluster of one incarnation. Pure: the same run gives the same object."""
    name = naming.cluster_name(run.name, run.uid, incarnation)
    body = _spec(run, spec, config, name)
    labels = run_labels(run.name, run.uid) | _queue_labels(spec, name)
    if spec.queue is not None and spec.queue.scheduler == "kueue":
        body["suspend"] = True
    return {
        "apiVersion": RAY_API_VERSION,
        "kind": "RayCluster",
        "metadata": {
            "name": name,
            "namespace": run.namespace,
            "labels": labels,
            "annotations": {naming.TEMPLATE_ANNOTATION: template_digest(run, spec, config)},
            "ownerReferences": [run_reference(run)],
        },
        "spec": body,
    }


def template_digest(run: Run, spec: FineTuneSpec, config: OperatorConfig) -> str:
    """Digest of what the pods are made of and where they queue: another one calls for another cluster."""
    return digest([_spec(run, spec, config, cluster_name="-"), _queue_labels(spec, cluster_name="-")])


def network_policy(run: Run, config: OperatorConfig, cluster_name: str, cluster_uid: str) -> Manifest:
    """Ray's ports are open to the run's own pods, and the dashboard to the operator: whoever reaches it runs code.

    Metrics are open to the namespaces that the admin names, as a Prometheus sends no token.
    """
    name_label = "kubernetes.io/metadata.name"
    monitoring: list[Manifest] = [
        {
            "from": [{"namespaceSelector": {"matchLabels": {name_label: namespace}}}],
            "ports": [{"protocol": "TCP", "port": METRICS_PORT}],
        }
        for namespace in config.monitoring_namespaces
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": cluster_name,
            "namespace": run.namespace,
            "labels": run_labels(run.name, run.uid),
            "ownerReferences": [cluster_reference(cluster_name, cluster_uid)],
        },
        "spec": {
            "podSelector": {"matchLabels": {"ray.io/cluster": cluster_name}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": {"ray.io/cluster": cluster_name}}}]},
                {
                    "from": [
                        {
                            "namespaceSelector": {"matchLabels": {name_label: config.namespace}},
                            "podSelector": {"matchLabels": {"app.kubernetes.io/name": naming.MANAGED_BY}},
                        }
                    ],
                    "ports": [{"protocol": "TCP", "port": config.ray.dashboard_port}],
                },
                *monitoring,
            ],
        },
    }


def run_reference(run: Run) -> Manifest:
    """The owner reference of what goes when the resource goes."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": run.name,
        "uid": run.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def cluster_reference(cluster_name: str, cluster_uid: str) -> Manifest:
    """The owner reference of what goes when the RayCluster goes."""
    return {"apiVersion": RAY_API_VERSION, "kind": "RayCluster", "name": cluster_name, "uid": cluster_uid}


def _spec(run: Run, spec: FineTuneSpec, config: OperatorConfig, cluster_name: str) -> Manifest:
    labels = run_labels(run.name, run.uid)
    return {
        "rayVersion": config.ray.version,
        "authOptions": {"mode": "token", "secretName": cluster_name},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104
            "template": head_pod(spec, config, labels),
        },
        "workerGroupSpecs": [
            _group(spec, pool, config, labels, run.status.avoided_nodes if pool.avoid_failed_nodes else ())
            for pool in spec.node_pools
        ],
    }


def _group(
    spec: FineTuneSpec, pool: NodePool, config: OperatorConfig, labels: dict[str, str], avoided: Sequence[str]
) -> Manifest:
    # On CPU a node is one rank: Ray must not put two of them on one. Datasets of a program are made by what ranks leave free;
    # then the trainer asks Ray for a node per rank. On GPUs the number is said here, since KubeRay reads it off the limits only
    # where the resource's name ends in "gpu".
    feeds = spec.program is not None and spec.program.datasets is not None
    on_cpu = {"num-cpus": "2" if feeds else "1", "num-gpus": "0"}
    parameters = {"num-gpus": str(pool.gpus_per_node)} if spec.trains_on_gpus else on_cpu
    return {
        "groupName": pool.name,
        "replicas": pool.nodes,
        "minReplicas": pool.nodes,
        "maxReplicas": pool.nodes,
        "rayStartParams": parameters,
        "template": kept_away(worker_pod(spec, pool, config, labels), avoided),
    }


def _queue_labels(spec: FineTuneSpec, cluster_name: str) -> dict[str, str]:
    if spec.queue is None:
        return {}
    queue, priority = _QUEUE_LABELS[spec.queue.scheduler]
    labels = {queue: spec.queue.name}
    if spec.queue.priority_class and priority:
        labels[priority] = spec.queue.priority_class
    if spec.queue.scheduler == "yunikorn":
        labels |= {_YUNIKORN_ID: cluster_name, _YUNIKORN_GANG: "true"}
    return labels
