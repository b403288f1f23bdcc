"""The operator as a process on a real API server, with the KubeRay stand-in (no kubelet) and a fake Ray head."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import CoreV1Api, CustomObjectsApi, NetworkingV1Api
from kubernetes.config import new_client_from_config

from dsft_operator.install import FILE, NAME, NAMESPACE
from tests.apiserver.fake_head import FakeHead
from tests.apiserver.server import ApiServer, Runs
from tests.cluster.kuberay.controller import Standin
from tests.cluster.processes import Process
from tests.unit.operator.situations import SPEC

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
Document = dict[str, Any]

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def kuberay(api_server: ApiServer, garbage_collector: Process) -> Iterator[None]:
    controller = Standin(new_client_from_config(str(api_server.kubeconfig)), mark_ready=lambda _: True)
    thread = threading.Thread(target=controller.run, daemon=True)
    thread.start()
    yield
    controller.stop()
    thread.join(30)


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

    def start(self) -> None:
        file = self.folder / "config.yaml"
        document = {
            "kind": "OperatorConfig",
            "watchNamespaces": [self.namespace],
            "image": {"trainer": "registry.test/dsft-trainer:1"},
            "ray": {"dashboardPort": self.port},
            "intervals": {"provisioningSeconds": 1, "runningSeconds": 0.5, "backoffSeconds": 1, "queuedSeconds": 1},
            "httpPort": 0,
            **self.options,
        }
        file.write_text(yaml.safe_dump(document))
        self.starts += 1
        with (self.folder / "operator.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dsft_operator"],
                env={
                    **os.environ,
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
        return (self.folder / "operator.log").read_text()[-6000:]


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

    def until(self, what: str, fact: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not fact():
            assert time.monotonic() < deadline, f"never {what}: {self.status()}\n{self.operator.log()}"
            time.sleep(0.05)

    def until_phase(self, phase: str) -> None:
        self.until(phase, lambda: self.status().get("phase") == phase)


@pytest.fixture(scope="module")
def operator_account(api_server: ApiServer) -> Path:
    """A kubeconfig with the rights of the installed operator, and no others: a right that is missing fails a test."""
    api_server.plane.kubectl("apply", f"--filename={ROOT / FILE}")
    user = f"system:serviceaccount:{NAMESPACE}:{NAME}"
    return api_server.plane.kubeconfig("operator", user, ["system:serviceaccounts", "system:authenticated"])


@pytest.fixture
def scene(api_server: ApiServer, operator_account: Path, runs: Runs, tmp_path: Path) -> Iterator[Scene]:
    head = FakeHead()
    operator = Operator(tmp_path, operator_account, runs.namespace, head.start())
    yield Scene(api_server, runs, operator, head)
    if operator.process is not None:
        operator.kill()
    head.stop()


def test_a_run_from_apply_to_the_end(scene: Scene, kuberay: None) -> None:
    scene.operator.start()
    scene.apply()
    scene.until_phase("Succeeded")
    status = scene.status()
    assert status["output"]["uri"] == "s3://bucket/runs/export"
    assert status["resolved"]["storagePrefix"].startswith(f"s3://bucket/runs/{scene.runs.namespace}/chat-")
    assert [(a["number"], a["exitCode"]) for a in status["attempts"]] == [(1, 0)]
    assert scene.condition("Succeeded")["status"] == scene.condition("Ready")["status"] == "True"
    scene.until("cluster freed", lambda: not scene.clusters())
    core = CoreV1Api(scene.api.client)
    namespace = scene.runs.namespace

    def left() -> list[str]:
        secrets = [s.metadata.name for s in core.list_namespaced_secret(namespace).items]
        policies = NetworkingV1Api(scene.api.client).list_namespaced_network_policy(namespace).items
        pods = core.list_namespaced_pod(namespace).items
        return [n for n in secrets if n != "dsft-root-key"] + [o.metadata.name for o in (*policies, *pods)]

    scene.until("children gone", lambda: not left())
    # Its spec, labels and annotations are as they were applied: nothing for a GitOps tool to see.
    document = scene.runs.get(scene.name)
    assert "labels" not in document["metadata"]
    assert "annotations" not in document["metadata"]
    assert document["metadata"]["generation"] == 1
    (post,) = scene.head.posts
    assert post == status["job"]["submissionId"]
    reasons = [e.reason for e in core.list_namespaced_event(namespace).items if e.involved_object.name == "chat"]
    assert {"Provisioning", "Starting", "Running", "Succeeded"} <= set(reasons)
    assert len(reasons) == len(set(reasons)), "an event for each transition, once"


def test_the_token_is_always_on(scene: Scene, kuberay: None) -> None:
    scene.head.hold = True
    scene.operator.start()
    scene.apply()
    scene.until("submitted", lambda: scene.head.posts)
    (cluster,) = scene.clusters()
    secret = CoreV1Api(scene.api.client).read_namespaced_secret(cluster["metadata"]["name"], scene.runs.namespace)
    assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": cluster["metadata"]["name"]}
    assert secret.metadata.owner_references[0].uid == cluster["metadata"]["uid"]
    import base64

    token = base64.b64decode(secret.data["auth_token"]).decode()
    assert scene.head.authorizations == {f"Bearer {token}"}
    told = yaml.safe_dump([scene.runs.get(scene.name), scene.head.bodies])
    assert token not in told


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_moment_it_goes_on(scene: Scene, kuberay: None, seed: int) -> None:
    """One RayCluster, one submission, the same end: the operator is killed at five moments of a run."""
    import random

    chance = random.Random(seed)
    seen: set[str] = set()
    scene.operator.start()
    scene.apply()
    for _ in range(5):
        pause = threading.Event()
        pause.wait(chance.uniform(0.1, 1.5))
        seen |= {cluster["metadata"]["uid"] for cluster in scene.clusters()}
        scene.operator.kill()
        scene.operator.start()
    scene.until_phase("Succeeded")
    scene.until("cluster freed", lambda: not scene.clusters())
    assert len(seen) <= 1
    assert len(set(scene.head.posts)) == 1
    assert len(scene.head.bodies) == 1
    assert scene.status()["attempt"] == 1


def test_a_lost_head_is_another_attempt_on_the_same_cluster(scene: Scene, kuberay: None) -> None:
    scene.head.hold = True
    scene.operator.start()
    scene.apply()
    scene.until("running", lambda: (scene.status().get("job") or {}).get("state") == "RUNNING")
    (before,) = scene.clusters()
    scene.head.restart()
    scene.head.hold = False
    scene.until_phase("Succeeded")
    attempts = scene.status()["attempts"]
    assert [(a["number"], a.get("class")) for a in attempts] == [(1, "HeadLost"), (2, None)]
    assert scene.status()["rayCluster"]["uid"] == before["metadata"]["uid"]


def test_how_a_pod_ended_is_kept_though_the_pod_is_gone(scene: Scene, kuberay: None) -> None:
    scene.head.hold = True
    scene.operator.start()
    scene.apply()
    scene.until("running", lambda: (scene.status().get("job") or {}).get("state") == "RUNNING")
    core, namespace = CoreV1Api(scene.api.client), scene.runs.namespace
    pod = core.list_namespaced_pod(namespace, label_selector="ray.io/node-type=worker").items[0].metadata.name
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    end = {"reason": "OOMKilled", "exitCode": 137, "finishedAt": now, "startedAt": now, "message": "step 7"}
    image = {"image": "x", "imageID": "", "ready": False, "restartCount": 0}
    ended = {"name": "ray-worker", "state": {"terminated": end}, **image}
    core.patch_namespaced_pod_status(pod, namespace, {"status": {"containerStatuses": [ended]}})
    core.delete_namespaced_pod(pod, namespace, grace_period_seconds=0)
    with scene.head.lock:
        scene.head.jobs = dict.fromkeys(scene.head.jobs, "FAILED")
    scene.until("ended", lambda: scene.status()["attempts"][0].get("endTime"))
    attempt = scene.status()["attempts"][0]
    assert attempt["class"] == "HostOOM"
    assert f"worker {pod} on" in attempt["message"]
    assert "OOMKilled, exit code 137: step 7" in attempt["message"]


def test_words_that_yaml_cannot_hold_reach_the_status(scene: Scene, kuberay: None) -> None:
    """An applied body is read as YAML, which has no surrogates and takes no control characters."""
    scene.head.last_words = "loss went to the moon \U0001f680, then \x1b[31mred\x7f\x85\u2028\ufeff"
    scene.operator.start()
    scene.apply()
    scene.until_phase("Failed")
    assert scene.status()["attempts"][-1]["class"] == "Diverged"
    assert "moon \U0001f680, then" in scene.status()["message"]
    scene.until("cluster freed", lambda: not scene.clusters())


def test_suspend_frees_the_cluster_and_resume_goes_on(scene: Scene, kuberay: None) -> None:
    scene.head.hold = True
    scene.operator.start()
    scene.apply()
    scene.until("running", lambda: (scene.status().get("job") or {}).get("state") == "RUNNING")
    scene.edit(suspend=True)
    scene.until_phase("Suspended")
    assert scene.clusters() == []
    assert "STOPPED" in scene.head.jobs.values()
    scene.head.hold = False
    scene.edit(suspend=False)
    scene.until_phase("Succeeded")
    assert scene.status()["rayCluster"]["incarnation"] == 2


def test_deleted_while_it_runs(scene: Scene, kuberay: None) -> None:
    scene.head.hold = True
    scene.operator.start()
    scene.apply()
    scene.until("running", lambda: (scene.status().get("job") or {}).get("state") == "RUNNING")
    CustomObjectsApi(scene.api.client).delete_namespaced_custom_object(
        "dsft.dev", "v1alpha1", scene.runs.namespace, "deepspeedfinetunes", scene.name
    )

    def gone() -> bool:
        objects = CustomObjectsApi(scene.api.client)
        found = objects.list_namespaced_custom_object(
            "dsft.dev", "v1alpha1", scene.runs.namespace, "deepspeedfinetunes"
        )
        return not found["items"]

    deadline = time.monotonic() + SECONDS
    while not gone() or scene.clusters():
        assert time.monotonic() < deadline, scene.operator.log()
        time.sleep(0.05)
    assert "STOPPED" in scene.head.jobs.values()


def test_somebody_elses_cluster_is_left_alone(scene: Scene, kuberay: None) -> None:
    uid = scene.apply()["metadata"]["uid"]
    foreign = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": f"chat-{uid[:5]}", "namespace": scene.runs.namespace},
        "spec": {"headGroupSpec": {"template": {"spec": {"containers": [{"name": "h", "image": "i"}]}}}},
    }
    objects = CustomObjectsApi(scene.api.client)
    made = objects.create_namespaced_custom_object("ray.io", "v1", scene.runs.namespace, "rayclusters", foreign)
    scene.operator.start()
    scene.until("told", lambda: scene.condition("ClusterReady").get("reason") == "NameConflict")
    (kept,) = scene.clusters()
    assert kept["metadata"]["uid"] == made["metadata"]["uid"]
    assert "deletionTimestamp" not in kept["metadata"]
    objects.delete_namespaced_custom_object(
        "ray.io", "v1", scene.runs.namespace, "rayclusters", foreign["metadata"]["name"]
    )
    scene.until_phase("Succeeded")


def test_what_is_not_built_is_refused_by_name(scene: Scene, kuberay: None) -> None:
    scene.operator.start()
    scene.apply(startFrom={"run": "old"})
    scene.until("refused", lambda: scene.condition("Accepted").get("status") == "False")
    assert scene.condition("Accepted")["reason"] == "NotSupported"
    assert "spec.startFrom" in scene.status()["message"]
    assert scene.condition("Stalled")["status"] == "True"
    assert scene.clusters() == []
