"""The KubeRay stand-in's loop on a real API server, in the kubelet's place too: it marks the pods as ready itself."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from kubernetes.config import new_client_from_config

from tests.apiserver.server import ApiServer
from tests.cluster.kuberay.api import CLUSTERS, CORE, Api
from tests.cluster.kuberay.controller import Standin
from tests.cluster.processes import Process

Object = dict[str, Any]
SECONDS = 30.0


@dataclass(frozen=True)
class Scene:
    """One RayCluster called `run` in a namespace of its own."""

    api: Api
    namespace: str

    @property
    def core(self) -> str:
        return f"{CORE}/namespaces/{self.namespace}"

    @property
    def path(self) -> str:
        return f"{CLUSTERS}/namespaces/{self.namespace}/rayclusters"

    def create(self, **spec: Any) -> None:
        self.api.create(self.path, ray_cluster(self.namespace, **spec))

    def cluster(self) -> Object:
        return self.api.get(f"{self.path}/run")

    def state(self) -> str:
        return (self.cluster().get("status") or {}).get("state", "")

    def condition(self, kind: str) -> tuple[str, str]:
        conditions = (self.cluster().get("status") or {}).get("conditions") or []
        return next(((found["status"], found["reason"]) for found in conditions if found["type"] == kind), ("", ""))

    def pods(self, group: str = "") -> dict[str, Object]:
        selector = "ray.io/cluster=run" + (f",ray.io/group={group}" if group else "")
        return {pod["metadata"]["name"]: pod for pod in self.api.items(f"{self.core}/pods", selector)}

    def events(self) -> dict[str, str]:
        return {event["reason"]: event["message"] for event in self.api.items(f"{self.core}/events", "")}

    def wait(self, what: str, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not reached():
            assert time.monotonic() < deadline, f"never {what}: {self.cluster().get('status')}, {self.events()}"
            time.sleep(0.1)


def ray_cluster(namespace: str, **spec: Any) -> Object:
    def template(name: str) -> Object:
        return {"spec": {"containers": [{"name": name, "image": "registry.test/any:1"}]}}

    worker = {
        "groupName": "w",
        "replicas": 2,
        "minReplicas": 2,
        "maxReplicas": 2,
        "rayStartParams": {},
        "numOfHosts": 1,
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "run", "namespace": namespace},
        "spec": {
            "rayVersion": "2.60.0",
            "authOptions": {"mode": "token"},
            "headGroupSpec": {"rayStartParams": {}, "template": template("head")},
            "workerGroupSpecs": [{**worker, "template": template("worker")}],
            **spec,
        },
    }


@pytest.fixture(scope="module")
def standin(api_server: ApiServer) -> Iterator[Api]:
    client = new_client_from_config(str(api_server.kubeconfig))
    controller = Standin(client, mark_ready=lambda _: "127.0.0.1")
    thread = threading.Thread(target=controller.run, daemon=True)
    thread.start()
    yield Api(client)
    controller.stop()
    thread.join(SECONDS)


@pytest.fixture
def scene(standin: Api, namespace: str) -> Scene:
    return Scene(standin, namespace)


def test_a_cluster_becomes_ready(scene: Scene) -> None:
    scene.create()
    scene.wait("ready", lambda: scene.state() == "ready")
    found = scene.cluster()["status"]
    service = scene.api.get(f"{scene.core}/services/run-head-svc")
    assert (found["readyWorkerReplicas"], found["desiredWorkerReplicas"]) == (2, 2)
    assert found["head"]["serviceName"] == service["metadata"]["name"]
    assert found["endpoints"]["dashboard"] == "8265"
    assert scene.condition("RayClusterProvisioned") == ("True", "AllPodRunningAndReadyFirstTime")
    assert "auth_token" in scene.api.get(f"{scene.core}/secrets/run")["data"]
    assert len(scene.pods("headgroup")) == 1
    assert {"CreatedHeadPod", "CreatedWorkerPod", "CreatedService"} <= scene.events().keys()


def test_a_failed_worker_is_deleted_and_made_anew(scene: Scene) -> None:
    scene.create()
    scene.wait("ready", lambda: scene.state() == "ready")
    before = scene.pods("w")
    lost = next(iter(before))
    scene.api.merge(f"{scene.core}/pods/{lost}/status", {"status": {"phase": "Failed"}})
    scene.wait("replaced", lambda: lost not in scene.pods("w") and len(scene.pods("w")) == 2)
    assert f"Deleted worker Pod {scene.namespace}/{lost}; Pod status: Failed" in scene.events()["DeletedWorkerPod"]
    scene.wait("whole again", lambda: scene.cluster()["status"]["readyWorkerReplicas"] == 2)
    assert scene.state() == "ready", "it latches"


def test_a_lost_head_is_made_anew_unless_the_annotation_forbids_it(scene: Scene) -> None:
    scene.create()
    scene.wait("ready", lambda: scene.state() == "ready")
    (head,) = scene.pods("headgroup")
    scene.api.delete(f"{scene.core}/pods/{head}")
    scene.wait("a new head", lambda: bool(scene.pods("headgroup")) and head not in scene.pods("headgroup"))

    forbidden = {"metadata": {"annotations": {"ray.io/disable-provisioned-head-restart": "true"}}}
    scene.api.merge(f"{scene.path}/run", forbidden)
    scene.wait("ready head", lambda: scene.condition("HeadPodReady")[0] == "True")
    (head,) = scene.pods("headgroup")
    scene.api.delete(f"{scene.core}/pods/{head}")
    scene.wait("no head", lambda: scene.condition("HeadPodReady") == ("False", "HeadPodNotFound"))
    assert not scene.pods("headgroup")


def test_suspend_takes_the_pods_away_and_resume_brings_new_ones(scene: Scene) -> None:
    scene.create(suspend=True)
    scene.wait("suspended", lambda: scene.condition("RayClusterSuspended")[0] == "True")
    assert not scene.pods()
    assert scene.state() == "suspended"

    scene.api.merge(f"{scene.path}/run", {"spec": {"suspend": False}})
    scene.wait("ready", lambda: scene.state() == "ready")
    scene.api.merge(f"{scene.path}/run", {"spec": {"suspend": True}})
    scene.wait("suspended again", lambda: scene.state() == "suspended")
    assert not scene.pods()


def test_pods_that_the_server_refuses_are_a_replica_failure(scene: Scene) -> None:
    bad = {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "Not_A_Name", "image": "x"}]}}}
    scene.create(headGroupSpec=bad)
    scene.wait("refused", lambda: scene.condition("ReplicaFailure") == ("True", "FailedCreateHeadPod"))
    assert "Not_A_Name" in scene.events()["FailedToCreateHeadPod"]


def test_a_cluster_that_kuberay_refuses_gets_an_event_and_nothing_else(scene: Scene) -> None:
    scene.create(rayVersion="2.51.0")
    scene.wait("an event", lambda: "InvalidRayClusterSpec" in scene.events())
    assert "minimum Ray version is 2.52.0" in scene.events()["InvalidRayClusterSpec"]
    assert not scene.pods()
    assert not scene.cluster().get("status")


def test_a_deleted_cluster_takes_its_pods_along(scene: Scene, garbage_collector: Process) -> None:
    scene.create()
    scene.wait("ready", lambda: scene.state() == "ready")
    scene.api.delete(f"{scene.path}/run")
    deadline = time.monotonic() + SECONDS
    while scene.pods():
        assert time.monotonic() < deadline, f"pods stay: {sorted(scene.pods())}"
        time.sleep(0.1)
