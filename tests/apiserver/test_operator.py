"""The operator as a process on a real API server, with the KubeRay stand-in (no kubelet) and a fake Ray head."""

import base64
import random
import threading

import pytest
import yaml
from kubernetes.client import CoreV1Api, CustomObjectsApi

from tests.apiserver.scene import Scene, a_worker, kill

pytestmark = pytest.mark.timeout(180)


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
    scene.until("children gone", lambda: not scene.children())
    # Its spec, labels and annotations are as they were applied: nothing for a GitOps tool to see.
    document = scene.runs.get(scene.name)
    assert "labels" not in document["metadata"]
    assert "annotations" not in document["metadata"]
    assert document["metadata"]["generation"] == 1
    (post,) = scene.head.posts
    assert post == status["job"]["submissionId"]
    events = CoreV1Api(scene.api.client).list_namespaced_event(scene.runs.namespace).items
    reasons = [event.reason for event in events if event.involved_object.name == scene.name]
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
    token = base64.b64decode(secret.data["auth_token"]).decode()
    assert scene.head.authorizations == {f"Bearer {token}"}
    told = yaml.safe_dump([scene.runs.get(scene.name), scene.head.bodies])
    assert token not in told


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_moment_it_goes_on(scene: Scene, kuberay: None, seed: int) -> None:
    """One RayCluster, one submission, the same end: the operator is killed at five moments of a run."""
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
    pod = a_worker(scene.api, scene.runs.namespace)
    kill(scene.api, scene.runs.namespace, pod, "step 7")
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
    scene.apply(deepspeed={"offload": {"params": "cpu"}})
    scene.until("refused", lambda: scene.condition("Accepted").get("status") == "False")
    assert scene.condition("Accepted")["reason"] == "NotSupported"
    assert "spec.deepspeed.offload.params" in scene.status()["message"]
    assert scene.condition("Stalled")["status"] == "True"
    assert scene.clusters() == []
