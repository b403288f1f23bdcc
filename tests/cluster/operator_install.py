"""The operator in a cluster, as a pod from its image under its own ServiceAccount, and what a tenant's namespace needs.

What an admin decides for all runs is the OperatorConfig here: the trainer image, the storage, and short intervals.
"""

from dataclasses import dataclass
from typing import Any

from dsft_operator.install import NAME, NAMESPACE, manifests
from tests.cluster.images import Images
from tests.cluster.kubectl import Kubectl
from tests.cluster.up import Storage

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
