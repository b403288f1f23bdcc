"""The operator on a real API server where the world is not as it expects: KubeRay absent, a delete at any time, a newer CRD."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiextensionsV1Api

from dsft_api.progress import TrainerPhase
from tests.apiserver.scene import Scene
from tests.apiserver.server import ApiServer
from tests.cluster.crds import our_crds, raycluster_crd
from tests.unit.operator.situations import SPEC

RAYCLUSTERS = "rayclusters.ray.io"

pytestmark = pytest.mark.timeout(180)


def is_running(scene: Scene) -> bool:
    return (scene.status().get("job") or {}).get("state") == "RUNNING"


@dataclass(frozen=True)
class Moment:
    """How a phase is reached, and with what spec; `kuberay` False: no pod ever comes."""

    reach: Callable[[Scene], None]
    spec: dict[str, Any]
    kuberay: bool = True


def _hold(scene: Scene) -> None:
    scene.head.hold = True
    scene.until("running", lambda: is_running(scene))


def _suspend(scene: Scene) -> None:
    _hold(scene)
    scene.edit(suspend=True)


def _suspend_deaf(scene: Scene) -> None:
    scene.head.deaf = True
    _suspend(scene)


def _train(scene: Scene) -> None:
    scene.head.stay = TrainerPhase.TRAINING


def _export(scene: Scene) -> None:
    scene.head.stay = TrainerPhase.EXPORTING


def _fail(scene: Scene) -> None:
    scene.head.last_words = "the loss is not finite"


def _nothing(_: Scene) -> None:
    return


KEPT = {"keepClusterSeconds": 3600}
MOMENTS = {
    "Queued": Moment(_nothing, {"queue": {"name": "team"}}),
    "Provisioning": Moment(_nothing, {}, kuberay=False),
    "Starting": Moment(_hold, {}),
    "Running": Moment(_train, {}),
    "Exporting": Moment(_export, {}),
    "Suspending": Moment(_suspend_deaf, {}),
    "Suspended": Moment(_suspend, {}),
    "Succeeded": Moment(_nothing, KEPT),
    "Failed": Moment(_fail, KEPT),
}


@pytest.mark.parametrize("phase", MOMENTS)
def test_deleted_in_any_phase_it_leaves_nothing(scene: Scene, phase: str, request: pytest.FixtureRequest) -> None:
    moment = MOMENTS[phase]
    if moment.kuberay:
        request.getfixturevalue("kuberay")
    scene.operator.start()
    scene.apply(**moment.spec)
    moment.reach(scene)
    scene.until_phase(phase)
    submitted = list(scene.head.posts)
    scene.runs.delete(scene.name)
    scene.head.deaf = False
    scene.until("gone", lambda: not scene.exists() and not scene.clusters() and not scene.children())
    assert not {"PENDING", "RUNNING"} & set(scene.head.jobs.values()), "no driver is left"
    assert scene.head.posts == submitted, "and none was started"


@pytest.fixture
def newer_crd(api_server: ApiServer, tmp_path: Path) -> Iterator[None]:
    """Our CRD as a later release may have it: a new field, and a new word for an old one."""
    (file,) = our_crds()
    crd = yaml.safe_load(file.read_text())
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    spec["training"]["properties"]["curriculum"] = {"type": "string"}
    spec["model"]["properties"]["task"]["enum"].append("token-classification")
    newer = tmp_path / "newer.yaml"
    newer.write_text(yaml.safe_dump(crd))
    api_server.plane.install(newer)
    yield
    api_server.plane.install(file)


def test_a_newer_field_is_ignored_and_that_is_said(scene: Scene, kuberay: None, newer_crd: None) -> None:
    scene.operator.start()
    scene.apply(training={**SPEC["training"], "curriculum": "easy-first"})
    scene.until_phase("Succeeded")
    accepted = scene.condition("Accepted")
    assert accepted["status"] == "True"
    assert "older than these fields: spec.training.curriculum; upgrade the operator" in accepted["message"]
    assert scene.runs.get(scene.name)["spec"]["training"]["curriculum"] == "easy-first", "and it is not lost"


def test_a_newer_word_is_refused_by_name(scene: Scene, newer_crd: None) -> None:
    scene.operator.start()
    scene.apply(model={**SPEC["model"], "task": "token-classification"})
    scene.until("refused", lambda: scene.condition("Accepted").get("status") == "False")
    assert "spec.model.task" in scene.status()["message"]
    assert scene.operator.process is not None
    assert scene.operator.process.poll() is None


def remove_kuberay(scene: Scene) -> None:
    """Its RayClusters go with it."""
    extensions = ApiextensionsV1Api(scene.api.client)
    extensions.delete_custom_resource_definition(RAYCLUSTERS)
    scene.until(
        "KubeRay's API gone",
        lambda: RAYCLUSTERS not in [crd.metadata.name for crd in extensions.list_custom_resource_definition().items],
    )


def is_waiting_for_kuberay(scene: Scene) -> bool:
    return scene.condition("ClusterReady").get("reason") == "KubeRayMissing"


def test_kuberay_comes_goes_and_comes_back(scene: Scene, kuberay: None) -> None:
    scene.head.hold = True
    remove_kuberay(scene)
    try:
        scene.operator.start()
        scene.apply()
        scene.until("told", lambda: is_waiting_for_kuberay(scene))
        assert scene.status()["phase"] == "Pending"
        assert "install KubeRay" in scene.status()["message"]
        assert scene.status().get("attempt", 0) == 0
        scene.api.plane.install(raycluster_crd())
        scene.until("running", lambda: is_running(scene))
        remove_kuberay(scene)
        scene.until("told again", lambda: is_waiting_for_kuberay(scene))
        scene.head.restart()
        scene.head.hold = False
    finally:
        scene.api.plane.install(raycluster_crd())
    scene.until_phase("Succeeded")
    assert scene.operator.process is not None
    assert scene.operator.process.poll() is None, "the operator lived through it"
    assert [attempt["number"] for attempt in scene.status()["attempts"]] == [1, 2]
    assert scene.status()["rayCluster"]["incarnation"] == 2
    scene.until("cluster freed", lambda: not scene.clusters())


def test_deleted_while_kuberay_is_missing(scene: Scene) -> None:
    remove_kuberay(scene)
    try:
        scene.operator.start()
        scene.apply()
        scene.until("told", lambda: is_waiting_for_kuberay(scene))
        scene.runs.delete(scene.name)
        scene.until("gone", lambda: not scene.exists())
    finally:
        scene.api.plane.install(raycluster_crd())
