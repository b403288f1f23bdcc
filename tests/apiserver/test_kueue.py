"""Runs under a real Kueue on a real API server: the operator as a process, KubeRay's stand-in, a fake head for each run."""

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from kubernetes.client import CustomObjectsApi
from kubernetes.config import new_client_from_config

from dsft_api.conditions import WAITS
from dsft_operator.core.naming import RUN_LABEL
from tests.apiserver.fake_head import FakeHead
from tests.apiserver.scene import ROOT, Scene
from tests.apiserver.server import ApiServer
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import our_crds, raycluster_crd
from tests.cluster.kubectl import Kubectl
from tests.cluster.kuberay.controller import Standin
from tests.cluster.kueue.manager import start_kueue
from tests.cluster.kueue.queues import RACK, Flavor, Queues
from tests.cluster.processes import Process
from tests.cluster.scratch import scratch_folder
from tests.unit.operator.situations import SPEC

# A drill, since Kueue has to be built for it.
pytestmark = [pytest.mark.timeout(180), pytest.mark.drill]

TEAM = {"queue": {"name": "team-a"}}
GPU = "nvidia.com/gpu"
POOL = {"cloud.test/pool": "gpu"}
# What one run asks for.
ONE = Flavor("gpu-nodes", {GPU: 2}, POOL)
# Each run has a head of its own, at the same port.
ADDRESSES = {
    "chat": "127.0.0.1",
    "second": "127.0.0.2",
    "third": "127.0.0.3",
    "urgent": "127.0.0.4",
    "elsewhere": "127.0.0.5",
}


@pytest.fixture(scope="module")
def api_server() -> Iterator[ApiServer]:
    """A server of its own: Kueue changes what others see there."""
    with scratch_folder("dsft-kueue-") as folder:
        plane = ControlPlane.start(folder / "plane")
        plane.install(*our_crds(), raycluster_crd())
        kueue = start_kueue(Kubectl(plane.admin), folder / "kueue")
        with new_client_from_config(str(plane.admin)) as client:
            yield ApiServer(plane, client)
        kueue.process.kill()


@pytest.fixture(scope="module")
def garbage_collector(api_server: ApiServer) -> Process:
    return api_server.plane.start_controller_manager("garbage-collector-controller", "namespace-controller")


@pytest.fixture(scope="module", autouse=True)
def kuberay(api_server: ApiServer, garbage_collector: Process) -> Iterator[None]:
    client = new_client_from_config(str(api_server.kubeconfig))
    # Other tests may have left runs of other names.
    controller = Standin(client, mark_ready=lambda pod: ADDRESSES.get(pod["metadata"]["labels"][RUN_LABEL]))
    thread = threading.Thread(target=controller.run, daemon=True)
    thread.start()
    yield
    controller.stop()
    thread.join(30)


@pytest.fixture
def queues(api_server: ApiServer, namespace: str) -> Queues:
    return Queues(api_server.client, namespace)


@pytest.fixture
def others(scene: Scene) -> Iterator[dict[str, Scene]]:
    """More runs beside the scene's, by their names."""
    heads = {name: FakeHead() for name in ADDRESSES if name != scene.name}
    for name, head in heads.items():
        head.start(ADDRESSES[name], scene.operator.port)
    yield {name: replace(scene, name=name, head=head) for name, head in heads.items()}
    for head in heads.values():
        head.stop()


def is_running(scene: Scene) -> bool:
    return (scene.status().get("job") or {}).get("state") == "RUNNING"


def reason(scene: Scene) -> str:
    return scene.condition("ClusterReady").get("reason", "")


def message(scene: Scene) -> str:
    return scene.status().get("message", "")


def cluster_of(scene: Scene) -> dict[str, Any]:
    """Its RayCluster, by its name in the status."""
    name = scene.status()["rayCluster"]["name"]
    (found,) = [each for each in scene.clusters() if each["metadata"]["name"] == name]
    return found


def start_running(scene: Scene, **spec: Any) -> None:
    scene.head.hold = True
    scene.apply(**{**TEAM, **spec})
    scene.until("running", lambda: is_running(scene))


def test_two_runs_and_quota_for_one(scene: Scene, queues: Queues, others: dict[str, Scene]) -> None:
    queues.prepare(ONE)
    scene.operator.start()
    start_running(scene)
    scene.until("its quota is used", lambda: queues.used(GPU) == "2")
    second = others["second"]
    second.apply(**TEAM)
    second.until("told why", lambda: "insufficient unused quota" in message(second))
    assert second.status()["phase"] == "Queued"
    assert reason(second) == "Queued"
    assert "queue team-a: 1st of 1 waiting here: " in message(second)
    assert "nvidia.com/gpu in flavor gpu-nodes, 2 more needed" in message(second)
    assert not second.head.posts
    scene.head.hold = False
    scene.until_phase("Succeeded")
    second.until_phase("Succeeded")
    for each in (scene, second):
        assert [(a["number"], a["exitCode"]) for a in each.status()["attempts"]] == [(1, 0)]
    scene.until("quota is free", lambda: queues.used(GPU) == "0")
    scene.until("nothing is left", lambda: not queues.workloads() and not scene.clusters() and not scene.children())
    # Nothing for a GitOps tool to see.
    document = scene.runs.get("second")
    assert not {"labels", "annotations"} & document["metadata"].keys()
    assert document["metadata"]["generation"] == 1


def test_the_head_gets_a_flavor_without_gpus_if_that_is_the_first(
    scene: Scene, queues: Queues, others: dict[str, Scene]
) -> None:
    queues.prepare(Flavor("cpu-nodes", {GPU: 0}, {"cloud.test/pool": "cpu"}), ONE)
    scene.operator.start()
    start_running(scene)
    spec = cluster_of(scene)["spec"]
    assert spec["headGroupSpec"]["template"]["spec"]["nodeSelector"] == {"cloud.test/pool": "cpu"}
    assert spec["workerGroupSpecs"][0]["template"]["spec"]["nodeSelector"] == POOL
    assert scene.status()["rayCluster"]["incarnation"] == 1, "what Kueue writes there calls for no other RayCluster"
    second = others["second"]
    second.apply(**TEAM)
    # The flavor without GPUs would never do; the other one will.
    second.until("told", lambda: "> maximum capacity (0), insufficient unused quota" in message(second))
    assert reason(second) == "Queued"


# quota for GPUs, Kueue's words
TOO_LITTLE: dict[str, tuple[dict[str, int], str]] = {
    "too few": ({GPU: 1}, "(2) > maximum capacity (1)"),
    "none at all": ({}, "resource nvidia.com/gpu unavailable in ClusterQueue"),
}


@pytest.mark.parametrize("name", TOO_LITTLE)
def test_it_can_never_fit(scene: Scene, queues: Queues, name: str) -> None:
    quota, words = TOO_LITTLE[name]
    queues.prepare(replace(ONE, quota=quota))
    scene.operator.start()
    scene.apply(**TEAM)
    scene.until("told", lambda: reason(scene) == "NeverFits")
    assert scene.status()["phase"] == "Queued"
    assert words in message(scene)
    assert message(scene).endswith(WAITS["NeverFits"] or "?")
    assert "waiting here" not in message(scene), "it has no turn"


def test_what_can_never_fit_does_once_it_asks_for_less(scene: Scene, queues: Queues) -> None:
    queues.prepare(replace(ONE, quota={GPU: 1}))
    scene.operator.start()
    scene.apply(**TEAM)
    scene.until("told", lambda: reason(scene) == "NeverFits")
    pools = [{**SPEC["nodePools"][0], "nodes": 1}]
    scene.edit(nodePools=pools)
    scene.until_phase("Succeeded")


def test_a_higher_priority_takes_the_nodes_and_gives_them_back(
    scene: Scene, queues: Queues, others: dict[str, Scene]
) -> None:
    queues.prepare(ONE)
    scene.operator.start()
    start_running(scene, queue={"name": "team-a", "priorityClass": "low"}, retry={"limit": 0})
    before = scene.status()["rayCluster"]
    urgent = others["urgent"]
    start_running(urgent, queue={"name": "team-a", "priorityClass": "high"})
    scene.until("preempted", lambda: scene.status()["attempts"][0].get("class") == "Preempted")
    assert "the queue took the nodes back (Preempted to accommodate" in scene.status()["attempts"][0]["message"]
    scene.until("queued", lambda: "1st of 1 waiting here: Preempted: " in message(scene))
    assert scene.status()["phase"] == "Queued"
    assert scene.status()["retries"] == 0
    assert [each["metadata"]["name"] for each in scene.clusters() if not each["spec"]["suspend"]] == [
        urgent.status()["rayCluster"]["name"]
    ]
    # The pods are gone, and Ray with them.
    scene.head.restart()
    scene.head.hold = urgent.head.hold = False
    urgent.until_phase("Succeeded")
    scene.until_phase("Succeeded")
    after = scene.status()["rayCluster"]
    assert (after["uid"], after["incarnation"]) == (before["uid"], 1)
    assert after["session"] != before["session"]
    assert [(a["number"], a.get("class")) for a in scene.status()["attempts"]] == [(1, "Preempted"), (2, None)]
    assert len(scene.head.posts) == len(set(scene.head.posts)) == 2


def test_a_queue_that_does_not_exist_until_its_name_is_corrected(scene: Scene, queues: Queues) -> None:
    queues.prepare(ONE)
    scene.operator.start()
    scene.apply(queue={"name": "team-x"})
    scene.until("told", lambda: reason(scene) == "QueueClosed")
    assert "queue team-x: LocalQueue team-x doesn't exist" in message(scene)
    assert "correct spec.queue.name" in message(scene)
    scene.edit(**TEAM)
    scene.until_phase("Succeeded")
    assert scene.status()["rayCluster"]["incarnation"] == 2


def test_a_stopped_queue_drains_and_goes_on_when_it_is_opened(scene: Scene, queues: Queues) -> None:
    queues.prepare(ONE)
    scene.operator.start()
    start_running(scene)
    uid = scene.status()["rayCluster"]["uid"]
    queues.stop("HoldAndDrain")
    scene.until("told", lambda: reason(scene) == "QueueClosed")
    assert scene.status()["phase"] == "Queued"
    assert "ClusterQueueStopped" in message(scene)
    (attempt,) = scene.status()["attempts"]
    assert attempt["class"] == "Preempted"
    scene.until("quota is free", lambda: queues.used(GPU) == "0")
    scene.head.restart()
    scene.head.hold = False
    queues.stop("None")
    scene.until_phase("Succeeded")
    assert scene.status()["rayCluster"]["uid"] == uid
    assert scene.status()["retries"] == 0


def queue_behind(first: Scene, then: Scene, **spec: Any) -> None:
    """One run holds the quota, and the other one waits for it."""
    first.operator.start()
    start_running(first)
    then.apply(**TEAM, **spec)
    then.until("queued", lambda: "insufficient unused quota" in message(then))


def test_suspended_by_its_user_while_queued(scene: Scene, queues: Queues, others: dict[str, Scene]) -> None:
    second = others["second"]
    queues.prepare(ONE)
    queue_behind(scene, second)
    second.edit(suspend=True)
    second.until_phase("Suspended")
    second.until("out of the queue", lambda: len(queues.workloads()) == 1)
    scene.head.hold = False
    scene.until_phase("Succeeded")
    scene.until("quota is free", lambda: queues.used(GPU) == "0")
    assert second.status()["phase"] == "Suspended"
    second.edit(suspend=False)
    second.until_phase("Succeeded")
    assert second.status()["rayCluster"]["incarnation"] == 2


def test_deleted_while_queued(scene: Scene, queues: Queues, others: dict[str, Scene]) -> None:
    second = others["second"]
    queues.prepare(ONE)
    queue_behind(scene, second)
    second.runs.delete("second")
    second.until("gone", lambda: not second.exists() and len(second.clusters()) == 1)
    second.until("out of the queue", lambda: len(queues.workloads()) == 1)
    assert not second.head.posts
    assert is_running(scene)


def test_it_waits_no_longer_than_it_may(scene: Scene, queues: Queues, others: dict[str, Scene]) -> None:
    second = others["second"]
    queues.prepare(ONE)
    queue_behind(scene, second, deadlines={"queueSeconds": 3})
    second.until_phase("Failed")
    assert second.condition("Succeeded")["reason"] == "QueueTimeout"
    assert "not admitted within 3 s (Queued: queue team-a: " in message(second)
    assert "insufficient unused quota" in message(second)
    second.until("out of the queue", lambda: len(queues.workloads()) == 1 == len(second.clusters()))
    assert is_running(scene)


def test_the_operator_is_away_while_the_queue_decides(scene: Scene, queues: Queues, others: dict[str, Scene]) -> None:
    second = others["second"]
    queues.prepare(ONE)
    queue_behind(scene, second)
    before = second.status()
    scene.operator.kill()
    scene.operator.start()
    others["third"].apply(**TEAM)
    second.until("seen again", lambda: "1st of 2 waiting here" in message(second))
    assert second.status()["phase"] == "Queued"
    assert second.status()["phaseTime"] == before["phaseTime"], "it has waited since then"
    scene.operator.kill()
    # The first run goes, and the second gets its nodes, while nobody looks.
    objects, first = CustomObjectsApi(scene.api.client), scene.status()["rayCluster"]["name"]
    objects.delete_namespaced_custom_object("ray.io", "v1", scene.runs.namespace, "rayclusters", first)
    second.until("admitted", lambda: not cluster_of(second)["spec"]["suspend"])
    scene.operator.start()
    second.until_phase("Succeeded")
    assert second.status()["rayCluster"]["incarnation"] == 1
    assert len(second.head.posts) == 1


def test_the_place_in_the_queue(scene: Scene, queues: Queues, others: dict[str, Scene]) -> None:
    """By priority, then by age; of this LocalQueue only."""
    queues.prepare(ONE, preemption={"withinClusterQueue": "Never"})
    queues.add("team-b")
    queue_behind(scene, others["second"])
    others["elsewhere"].apply(queue={"name": "team-b"})
    others["third"].apply(queue={"name": "team-a", "priorityClass": "low"})
    others["urgent"].apply(queue={"name": "team-a", "priorityClass": "high"})
    for name, words in (
        ("urgent", "queue team-a: 1st of 3 waiting here: "),
        ("third", "queue team-a: 2nd of 3 waiting here: "),
        ("second", "queue team-a: 3rd of 3 waiting here: "),
        ("elsewhere", "queue team-b: 1st of 1 waiting here: "),
    ):
        others[name].until(words, lambda run=others[name], words=words: words in message(run))


def test_a_queue_that_leads_to_other_clusters_is_told(scene: Scene, queues: Queues) -> None:
    """MultiKueue takes the RayCluster alone: the run would wait for pods that nobody here makes."""
    queues.prepare_multikueue(ONE)
    scene.operator.start()
    scene.apply(**TEAM)
    scene.until("told", lambda: reason(scene) == "QueueClosed")
    assert "kueue.x-k8s.io/multikueue, which runs it on another Kubernetes cluster" in message(scene)
    assert scene.status()["phase"] == "Queued"


def test_what_a_pod_template_asks_of_the_topology_is_what_kueue_gives(scene: Scene, queues: Queues) -> None:
    """Each node has one GPU, and only one rack has two nodes."""
    nodes = {"node-1": "rack-1", "node-2": "rack-2", "node-3": "rack-2"}
    queues.add_racks("racks", nodes, POOL, {"cpu": "8", "memory": "64Gi", "pods": "10", GPU: "1"})
    queues.prepare(Flavor("rack-nodes", {GPU: 8}, POOL, "racks"))
    scene.operator.start()
    annotations = {"kueue.x-k8s.io/podset-required-topology": RACK}
    pools = [{**SPEC["nodePools"][0], "podTemplate": {"metadata": {"annotations": annotations}}}]
    start_running(scene, nodePools=pools)
    (workload,) = queues.workloads()
    assigned = {each["name"]: each for each in workload["status"]["admission"]["podSetAssignments"]}
    requests = {each["name"]: each.get("topologyRequest", {}).get("required") for each in workload["spec"]["podSets"]}
    assert requests == {"head": None, "gpu": RACK}
    (part,) = assigned["gpu"]["topologyAssignment"]["slices"]
    assert part["valuesPerLevel"] == [{"individual": {"prefix": "node-", "roots": ["2", "3"]}}]


def test_the_manifests_in_the_document_are_kueues(api_server: ApiServer) -> None:
    blocks = re.findall(r"```yaml\n(apiVersion: kueue.*?)```", (ROOT / "docs/queues.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    namespace = api_server.make_namespace()
    manifest = blocks[0].replace("namespace: ml", f"namespace: {namespace}")
    told = api_server.plane.kubectl("apply", "--dry-run=server", "--validate=strict", "--filename=-", stdin=manifest)
    assert len(told.splitlines()) == manifest.count("apiVersion:")
