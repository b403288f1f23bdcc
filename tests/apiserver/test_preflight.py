"""The preflight on a real API server, with Kubernetes' own Job controller: a Job, its pod's words, nothing left."""

from collections.abc import Iterator

import pytest
from kubernetes.client import BatchV1Api, CoreV1Api

from dsft_api.conditions import FailureClass
from dsft_api.preflight import Finding
from tests.apiserver.preflights import ended
from tests.apiserver.scene import Scene

pytestmark = pytest.mark.timeout(300)

LOOKS = {"preflight": {"enabled": True}}
FINDING = Finding(
    failure_class=FailureClass.STORAGE_DENIED,
    field="spec.storage",
    message='cannot write s3://bucket: "NoSuchBucket"',
    remedy="create the bucket",
)


@pytest.fixture
def finds(scene: Scene) -> Iterator[list[Finding]]:
    """What preflights find; to be changed by a test."""
    found: list[Finding] = []
    with ended(scene.api.client, lambda: tuple(found)):
        yield found


def jobs(scene: Scene) -> list[str]:
    """The Jobs there are, and the pods of Jobs."""
    namespace = scene.runs.namespace
    made = BatchV1Api(scene.api.client).list_namespaced_job(namespace).items
    pods = CoreV1Api(scene.api.client).list_namespaced_pod(namespace, label_selector="batch.kubernetes.io/job-name")
    return [each.metadata.name for each in (*made, *pods.items)]


def test_nothing_is_found(scene: Scene, kuberay: None, finds: list[Finding]) -> None:
    scene.operator.start()
    scene.apply(**LOOKS)
    scene.until_phase("Succeeded")
    preflighted = scene.condition("Preflighted")
    assert (preflighted["status"], preflighted["reason"]) == ("True", "PreflightPassed")
    assert scene.status()["preflight"]["endTime"]
    scene.until("all is gone", lambda: not scene.clusters() and not jobs(scene))
    assert scene.status()["attempt"] == 1


def test_what_is_found_refuses_the_run_until_it_is_mended(scene: Scene, kuberay: None, finds: list[Finding]) -> None:
    finds.append(FINDING)
    scene.operator.start()
    scene.apply(**LOOKS)
    scene.until_phase("Failed")
    assert scene.status()["message"] == (
        'StorageDenied: preflight: spec.storage: cannot write s3://bucket: "NoSuchBucket" -> create the bucket; '
        "then set a new spec.retry.token"
    )
    assert "rayCluster" not in scene.status()
    assert scene.clusters() == []
    scene.until("its Job is gone", lambda: not jobs(scene))
    finds.clear()
    scene.edit(retry={"token": "2"}, storage={"uri": "s3://another/runs"})
    scene.until_phase("Succeeded")
    assert scene.status()["resolved"]["storagePrefix"].startswith("s3://another/runs/")


def test_a_run_that_is_deleted_takes_its_job_along(scene: Scene, kuberay: None) -> None:
    """Nobody ends the pod here."""
    scene.operator.start()
    scene.apply(**LOOKS)
    scene.until("a pod that is told of", lambda: "is starting" in scene.status().get("message", ""))
    assert len(jobs(scene)) == 2
    scene.runs.delete(scene.name)
    scene.until("gone", lambda: not scene.exists() and not jobs(scene))
