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
from dsft_operator.core.pods import head_pod, run_labels, worker_pod

Manifest = dict[str, Any]

RAY_API_VERSION = "ray.io/v1"
_QUEUE_LABELS = {
    "kueue": ("kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"),
    "volcano": ("volcano.sh/queue-name", "ray.io/priority-class-name"),
    "yunikorn": ("yunikorn.apache.org/queue", None),
    "kai": ("kai.scheduler/queue", None),
}


def ray_cluster(run: Run, spec: FineTuneSpec, config: OperatorConfig, incarnation: int) -> Manifest:
    """The RayCluster of one incarnation. Pure: the same run gives the same object."""
    name = naming.cluster_name(run.name, run.uid, incarnation)
    body = _spec(run, spec, config, name)
    labels = run_labels(run.name, run.uid) | _queue_labels(spec)
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
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "name": run.name,
                    "uid": run.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": body,
    }


def template_digest(run: Run, spec: FineTuneSpec, config: OperatorConfig) -> str:
    """Digest of what the pods are made of and where they queue: another one calls for another cluster."""
    return digest([_spec(run, spec, config, cluster_name="-"), _queue_labels(spec)])


def network_policy(run: Run, config: OperatorConfig, cluster_name: str, cluster_uid: str) -> Manifest:
    """Ray's ports are open to the run's own pods, and the dashboard to the operator: whoever reaches it runs code."""
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
                            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": config.namespace}},
                            "podSelector": {"matchLabels": {"app.kubernetes.io/name": naming.MANAGED_BY}},
                        }
                    ],
                    "ports": [{"protocol": "TCP", "port": config.ray.dashboard_port}],
                },
            ],
        },
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
    # On CPU a node is one rank: Ray must not put two of them on one. On GPUs the number is said here, since KubeRay
    # reads it off the limits only where the resource's name ends in "gpu".
    parameters = {"num-gpus": str(pool.gpus_per_node)} if spec.trains_on_gpus else {"num-cpus": "1", "num-gpus": "0"}
    return {
        "groupName": pool.name,
        "replicas": pool.nodes,
        "minReplicas": pool.nodes,
        "maxReplicas": pool.nodes,
        "rayStartParams": parameters,
        "template": kept_away(worker_pod(spec, pool, config, labels), avoided),
    }


def _queue_labels(spec: FineTuneSpec) -> dict[str, str]:
    if spec.queue is None:
        return {}
    queue, priority = _QUEUE_LABELS[spec.queue.scheduler]
    labels = {queue: spec.queue.name}
    if spec.queue.priority_class and priority:
        labels[priority] = spec.queue.priority_class
    return labels
