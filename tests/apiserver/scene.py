"""A namespace with a run, an operator that is a process with its real rights, and a fake Ray head: what the tests act on."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from kubernetes.client import CoreV1Api, CustomObjectsApi, NetworkingV1Api

from tests.apiserver.fake_head import FakeHead
from tests.apiserver.server import ApiServer, Runs
from tests.unit.operator.situations import SPEC

ROOT = Path(__file__).parents[2]
SECONDS = 120.0
ROOT_KEY = "dsft-root-key"
Document = dict[str, Any]


@dataclass
class Operator:
    """`python -m dsft_operator` for one namespace."""

    folder: Path
    kubeconfig: Path
    namespace: str
    port: int
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0
    options: Document = field(default_factory=dict[str, Any])
    environment: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def log_file(self) -> Path:
        return self.folder / "operator.log"

    def start(self) -> None:
        file = self.folder / "config.yaml"
        document = {
            "kind": "OperatorConfig",
            "watchNamespaces": [self.namespace],
            "image": {"trainer": "registry.test/dsft-trainer:1"},
            "ray": {"dashboardPort": self.port},
            "intervals": {"provisioningSeconds": 1, "runningSeconds": 0.5, "backoffSeconds": 1, "queuedSeconds": 1},
            "httpPort": 0,
            # One is killed often, and the next one should not wait for the end of its Lease.
            "leaderElection": {"enabled": False},
            **self.options,
        }
        file.write_text(yaml.safe_dump(document))
        self.starts += 1
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dsft_operator"],
                env={
                    **os.environ,
                    **self.environment,
                    "KUBECONFIG": str(self.kubeconfig),
                    "DSFT_CONFIG": str(file),
                    "PYTHONPATH": os.pathsep.join([str(ROOT / "operator"), str(ROOT / "trainer_image")]),
                },
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def log(self) -> str:
        return self.log_file.read_text()[-6000:]


def a_worker(api: ApiServer, namespace: str) -> str:
    """The name of a worker pod."""
    pods = CoreV1Api(api.client).list_namespaced_pod(namespace, label_selector="ray.io/node-type=worker")
    return pods.items[0].metadata.name


def kill(api: ApiServer, namespace: str, pod: str, message: str = "") -> None:
    """The pod ends as one that had too little memory, and is gone, as by KubeRay."""
    core = CoreV1Api(api.client)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    end = {"reason": "OOMKilled", "exitCode": 137, "finishedAt": now, "startedAt": now, "message": message}
    image = {"image": "x", "imageID": "", "ready": False, "restartCount": 0}
    ended = {"name": "ray-worker", "state": {"terminated": end}, **image}
    core.patch_namespaced_pod_status(pod, namespace, {"status": {"containerStatuses": [ended]}})
    core.delete_namespaced_pod(pod, namespace, grace_period_seconds=0)


@dataclass
class Scene:
    """A namespace with a run in it."""

    api: ApiServer
    runs: Runs
    operator: Operator
    head: FakeHead
    name: str = "chat"

    def apply(self, **spec: Any) -> Document:
        body = {
            "apiVersion": "dsft.dev/v1alpha1",
            "kind": "DeepSpeedFineTune",
            "metadata": {"name": self.name, "namespace": self.runs.namespace},
            "spec": {**SPEC, **spec},
        }
        return self.runs.create(body)

    def edit(self, **spec: Any) -> None:
        document = self.runs.get(self.name)
        self.runs.replace({**document, "spec": {**document["spec"], **spec}})

    def status(self) -> Document:
        return self.runs.get(self.name).get("status") or {}

    def condition(self, kind: str) -> Document:
        return next((c for c in self.status().get("conditions", ()) if c["type"] == kind), {})

    def clusters(self) -> list[Document]:
        objects = CustomObjectsApi(self.api.client)
        return objects.list_namespaced_custom_object("ray.io", "v1", self.runs.namespace, "rayclusters")["items"]

    def children(self) -> list[str]:
        """What is there of the run's Secrets, NetworkPolicies and pods."""
        core, namespace = CoreV1Api(self.api.client), self.runs.namespace
        secrets = [secret.metadata.name for secret in core.list_namespaced_secret(namespace).items]
        policies = NetworkingV1Api(self.api.client).list_namespaced_network_policy(namespace).items
        others = [*policies, *core.list_namespaced_pod(namespace).items]
        return [name for name in secrets if name != ROOT_KEY] + [each.metadata.name for each in others]

    def exists(self) -> bool:
        """Whether the resource is there, deleted or not."""
        return self.name in self.runs.names()

    def until(self, what: str, fact: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not fact():
            assert time.monotonic() < deadline, (
                f"never {what}: {self.status() if self.exists() else 'gone'}\n{self.operator.log()}"
            )
            time.sleep(0.05)

    def until_phase(self, phase: str) -> None:
        self.until(phase, lambda: self.status().get("phase") == phase)
