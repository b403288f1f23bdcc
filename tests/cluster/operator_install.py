"""The operator in a cluster, as a pod from its image under its own ServiceAccount, and what a tenant's namespace needs.

What an admin decides for all runs is the OperatorConfig here: the trainer image, the storage, and short intervals.
"""

from dataclasses import dataclass
from typing import Any

import yaml

from dsft_api.resource import digest
from tests.cluster.images import Images
from tests.cluster.kubectl import Kubectl
from tests.cluster.up import Storage

NAMESPACE = "dsft-system"
NAME = "dsft-operator"
S3_SECRET = "s3"
ROLLOUT_SECONDS = 180
Document = dict[str, Any]


@dataclass(frozen=True)
class Install:
    """The operator of one cluster."""

    kubectl: Kubectl

    @classmethod
    def apply(cls, kubectl: Kubectl, images: Images, storage: Storage, storage_uri: str) -> "Install":
        """Install it, or bring the one that is there to this image and these settings; returns when it is ready."""
        install = cls(kubectl.within(NAMESPACE))
        config = operator_config(images.trainer, storage, storage_uri)
        kubectl.apply(*manifests(images.operator, config))
        install.wait_ready()
        return install

    def wait_ready(self) -> None:
        """Until the newest pod is ready and the only one."""
        seconds = f"--timeout={ROLLOUT_SECONDS}s"
        self.kubectl("rollout", "status", f"deployment/{NAME}", seconds, seconds=ROLLOUT_SECONDS + 10)

    def log(self, lines: int = 100) -> str:
        """The end of its log."""
        return self.kubectl("logs", f"deployment/{NAME}", f"--tail={lines}")


def operator_config(trainer_image: str, storage: Storage, storage_uri: str) -> Document:
    """What the admin of a test cluster decides."""
    return {
        "apiVersion": "config.dsft.dev/v1alpha1",
        "kind": "OperatorConfig",
        "image": {"trainer": trainer_image},
        "storage": {
            "uri": storage_uri,
            "endpointUrl": storage.endpoint,
            "region": "us-east-1",
            "credentials": {"secretName": S3_SECRET},
        },
        "intervals": {"provisioningSeconds": 2, "runningSeconds": 2, "backoffSeconds": 2},
    }


def tenant_namespace(name: str, storage: Storage) -> list[Document]:
    """A namespace, and the Secret that the admin's storage asks for."""
    secret = s3_secret(S3_SECRET, storage.access_key, storage.secret_key)
    secret["metadata"]["namespace"] = name
    return [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}, secret]


def s3_secret(name: str, access_key: str, secret_key: str) -> Document:
    """Keys for S3, as `spec.storage.credentials` wants them."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "stringData": {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key},
    }


def manifests(image: str, config: Document) -> list[Document]:
    """Everything of the operator but the CRD."""
    account = {"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NAME, "namespace": NAMESPACE}},
        _rbac("ClusterRole", {"name": NAME}, rules=_CLUSTER_RULES),
        _rbac("ClusterRoleBinding", {"name": NAME}, roleRef=_role("ClusterRole"), subjects=[account]),
        _rbac("Role", {"name": NAME, "namespace": NAMESPACE}, rules=_OWN_RULES),
        _rbac("RoleBinding", {"name": NAME, "namespace": NAMESPACE}, roleRef=_role("Role"), subjects=[account]),
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": NAME, "namespace": NAMESPACE},
            "data": {"config.yaml": yaml.safe_dump(config, sort_keys=False)},
        },
        # A changed ConfigMap alone would start no new pod.
        _deployment(image, annotations={"dsft.dev/config-digest": digest(config)}),
    ]


_CLUSTER_RULES = [
    {"apiGroups": ["dsft.dev"], "resources": ["deepspeedfinetunes"], "verbs": ["get", "list", "watch", "patch"]},
    {"apiGroups": ["dsft.dev"], "resources": ["deepspeedfinetunes/status"], "verbs": ["get", "patch"]},
    {"apiGroups": ["dsft.dev"], "resources": ["deepspeedfinetunes/finalizers"], "verbs": ["update"]},
    {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get", "list", "watch", "create", "delete"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["secrets", "events"], "verbs": ["create"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["create"]},
]
_OWN_RULES = [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["dsft-root-key"], "verbs": ["get"]}]


def _rbac(kind: str, metadata: Document, **fields: Any) -> Document:
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": metadata, **fields}


def _role(kind: str) -> Document:
    return {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": NAME}


def _deployment(image: str, annotations: dict[str, str]) -> Document:
    labels = {"app.kubernetes.io/name": NAME}
    probe = {"periodSeconds": 5, "timeoutSeconds": 5}
    container = {
        "name": "operator",
        "image": image,
        "env": [
            {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
            {"name": "DSFT_CONFIG", "value": "/etc/dsft/config.yaml"},
        ],
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": "http"}, **probe},
        "livenessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "failureThreshold": 6, **probe},
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "config", "mountPath": "/etc/dsft", "readOnly": True}],
    }
    pod = {
        "serviceAccountName": NAME,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": NAME}}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME, "namespace": NAMESPACE, "labels": labels},
        "spec": {
            "replicas": 1,
            # Two at once would do no harm, and no good either.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
        },
    }
