"""The operator in a cluster, installed by Helm as its users do, and what a tenant's namespace needs.

What an admin decides for all runs is the OperatorConfig here: the trainer image, the storage, and short intervals.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft_operator.config import OperatorConfig
from dsft_operator.install import NAME, NAMESPACE
from tests.cluster.crds import ROOT
from tests.cluster.helm_command import helm
from tests.cluster.images import Images
from tests.cluster.kubectl import Kubectl
from tests.cluster.up import Storage

CHART = ROOT / "charts" / "dsft-operator"
S3_SECRET = "s3"
LEASE = OperatorConfig().leader_election.lease_name
ROLLOUT_SECONDS = 300
Document = dict[str, Any]


@dataclass(frozen=True)
class Install:
    """The operator of one cluster: a release of the chart."""

    kubectl: Kubectl
    image: str
    config: Document

    @classmethod
    def apply(cls, kubectl: Kubectl, images: Images, storage: Storage, storage_uri: str) -> "Install":
        """Install it, or bring the one that is there to this image and these settings; returns when it is ready."""
        config = operator_config(images.trainer, storage, storage_uri)
        install = cls(kubectl.within(NAMESPACE), images.operator, config)
        install.restore()
        return install

    def restore(self) -> None:
        """As it was, whatever was done to it."""
        self.upgrade(CHART, self.values(self.image))

    def upgrade(self, chart: Path, values: Document) -> None:
        """`helm upgrade --install --wait`."""
        # A CRD that somebody applied before is the release's from now on.
        options = ("--install", "--create-namespace", "--take-ownership", "--wait", f"--timeout={ROLLOUT_SECONDS}s")
        self._helm("upgrade", NAME, str(chart), *options, "--values=-", stdin=json.dumps(values))

    def uninstall(self) -> None:
        """`helm uninstall --wait`: the CRD stays, and what the operator itself made."""
        self._helm("uninstall", NAME, "--wait", f"--timeout={ROLLOUT_SECONDS}s")

    def test(self) -> str:
        """`helm test --logs`; what its pod said."""
        return self._helm("test", NAME, "--logs", f"--timeout={ROLLOUT_SECONDS}s")

    def metrics(self) -> str:
        """What the leader tells Prometheus."""
        port = OperatorConfig().http_port
        return self.kubectl("get", "--raw", f"/api/v1/namespaces/{NAMESPACE}/pods/{self.leader()}:{port}/proxy/metrics")

    def wait_ready(self) -> None:
        """Until the newest pods are ready and the only ones."""
        seconds = f"--timeout={ROLLOUT_SECONDS}s"
        self.kubectl("rollout", "status", f"deployment/{NAME}", seconds, seconds=ROLLOUT_SECONDS + 10)

    def pods(self) -> list[Document]:
        """Its pods, also those on their way out."""
        return self.kubectl.read("pods", f"--selector=app.kubernetes.io/name={NAME}")["items"]

    def leader(self) -> str:
        """The pod that acts; empty if none does."""
        return self.kubectl.read("lease", LEASE)["spec"].get("holderIdentity") or ""

    def address(self, pod: str) -> str:
        """A pod's IP."""
        return self.kubectl.read("pod", pod)["status"]["podIP"]

    def values(self, image: str) -> Document:
        """Values of the chart for an operator image by its digest, or by a tag."""
        name, at, digest = image.partition("@")
        name, _, tag = (name, "", "") if at else name.rpartition(":")
        return {
            "image": {"repository": name, "digest": digest, "tag": tag},
            "config": self.config,
            # There is one node only: `kubectl drain` would wait for ever for the second replica.
            "podDisruptionBudget": {"enabled": False},
        }

    def log(self, lines: int = 100) -> str:
        """The ends of its pods' logs."""
        return self.kubectl("logs", f"--selector=app.kubernetes.io/name={NAME}", "--prefix", f"--tail={lines}")

    def _helm(self, *arguments: str, stdin: str | None = None) -> str:
        place = (f"--kubeconfig={self.kubectl.kubeconfig}", f"--namespace={NAMESPACE}")
        folder = self.kubectl.kubeconfig.with_name("helm")
        done = helm(folder, *arguments, *place, stdin=stdin, seconds=ROLLOUT_SECONDS + 30)
        if done.returncode:
            raise AssertionError(f"helm {arguments[0]}: {done.stdout}{done.stderr.strip()}")
        return done.stdout


def operator_config(trainer_image: str, storage: Storage, storage_uri: str) -> Document:
    """What the admin of a test cluster decides."""
    return {
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
