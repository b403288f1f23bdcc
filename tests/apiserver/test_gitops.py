"""Runs as GitOps tools apply them: no drift, no second run, and whose word counts.

Argo CD applies by what `kubectl apply` does, client-side or server-side. Flux is here by its own code.
"""

import subprocess
from dataclasses import dataclass, replace
from typing import Any

import pytest
import yaml
from kubernetes.client import CustomObjectsApi

from dsft_api import CHECKPOINT_REQUEST
from dsft_api.conditions import ExitCode
from tests.apiserver.scene import Scene
from tests.apiserver.test_dsft_command import dsft
from tests.cluster.build import GITOPS
from tests.unit.operator.situations import SPEC

pytestmark = pytest.mark.timeout(180)

# What tools put on the things that they own. Flux puts on its own besides.
LABELS = {"app.kubernetes.io/instance": "team-a"}
ANNOTATIONS = {"argocd.argoproj.io/tracking-id": "team-a:dsft.dev/DeepSpeedFineTune:ml/chat"}
KUBECTL = {
    "client-side": (),
    "server-side": ("--server-side", "--force-conflicts", "--field-manager=argocd-controller"),
}


@dataclass(frozen=True)
class Git:
    """What is in Git, and how it comes to the cluster."""

    scene: Scene
    way: str

    def manifest(self, labels: dict[str, str] = LABELS, **spec: Any) -> str:
        metadata = {"name": self.scene.name, "namespace": self.scene.runs.namespace}
        marks = {"labels": labels, "annotations": ANNOTATIONS}
        head = {"apiVersion": "dsft.dev/v1alpha1", "kind": "DeepSpeedFineTune", "metadata": {**metadata, **marks}}
        return yaml.safe_dump({**head, "spec": {**SPEC, **spec}})

    def sync(self, manifest: str) -> None:
        if self.way in KUBECTL:
            self.kubectl("apply", *KUBECTL[self.way], "--filename=-", stdin=manifest)
        else:
            self._flux(manifest)

    def drift(self, manifest: str) -> bool:
        """Whether the tool would have something to do. Flux tells only what it did."""
        if self.way not in KUBECTL:
            return self._flux(manifest) != "unchanged"
        try:
            return self.kubectl("diff", *KUBECTL[self.way], "--filename=-", stdin=manifest) != ""
        except RuntimeError as failed:
            # With a difference it fails, without a word of what else is wrong.
            if str(failed).endswith(": "):
                return True
            raise

    def kubectl(self, verb: str, *options: str, stdin: str | None = None) -> str:
        place = f"--namespace={self.scene.runs.namespace}"
        return self.scene.api.plane.kubectl(verb, place, *options, stdin=stdin)

    def _flux(self, manifest: str) -> str:
        argv = [str(GITOPS.built()), str(self.scene.api.kubeconfig)]
        done = subprocess.run(argv, input=manifest, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(params=[*KUBECTL, "flux"])
def git(request: pytest.FixtureRequest, scene: Scene) -> Git:
    return Git(scene, request.param)


def seen_by_git(scene: Scene) -> dict[str, Any]:
    """Of the live object, what a manifest may name."""
    document = scene.runs.get(scene.name)
    metadata = document["metadata"]
    return {"spec": document["spec"], **{key: metadata.get(key) for key in ("labels", "annotations", "generation")}}


def owned(scene: Scene, manager: str) -> set[tuple[str, ...]]:
    """The paths that a manager owns, down to the second field."""
    fields = [
        entry["fieldsV1"]
        for entry in scene.runs.get(scene.name)["metadata"]["managedFields"]
        if entry["manager"] == manager
    ]
    return {(first, second) for entry in fields for first, children in entry.items() for second in children}


def test_after_a_whole_run_nothing_differs_from_git(git: Git, kuberay: None) -> None:
    scene, manifest = git.scene, git.manifest()
    git.sync(manifest)
    applied = seen_by_git(scene)
    assert not git.drift(manifest)
    scene.operator.start()
    scene.until_phase("Succeeded")
    scene.until("cluster freed", lambda: not scene.clusters())
    assert seen_by_git(scene) == applied
    assert not git.drift(manifest)
    written = owned(scene, "dsft-operator")
    assert {path for path in written if path[0] != "f:status"} == {("f:metadata", "f:finalizers")}
    assert ("f:status", "f:phase") in written


def test_a_run_that_trains_has_no_drift(git: Git, kuberay: None) -> None:
    scene, manifest = git.scene, git.manifest()
    scene.head.hold = True
    git.sync(manifest)
    applied = seen_by_git(scene)
    scene.operator.start()
    scene.until("running", lambda: (scene.status().get("job") or {}).get("state") == "RUNNING")
    assert seen_by_git(scene) == applied
    assert not git.drift(manifest)
    (cluster,) = scene.clusters()
    marks = {*applied["labels"], *applied["annotations"]}
    copied = marks & {*cluster["metadata"]["labels"], *cluster["metadata"]["annotations"]}
    assert not copied, "a tool that finds its own mark on a child would prune it"


def test_after_the_end_nothing_begins_again(git: Git, kuberay: None) -> None:
    """Its children deleted, synced again with other marks, the operator another one: it stays as it ended."""
    scene, manifest = git.scene, git.manifest(keepClusterSeconds=3600)
    git.sync(manifest)
    scene.operator.start()
    scene.until_phase("Succeeded")
    ended = scene.status()
    (cluster,) = scene.clusters()
    CustomObjectsApi(scene.api.client).delete_namespaced_custom_object(
        "ray.io", "v1", scene.runs.namespace, "rayclusters", cluster["metadata"]["name"]
    )
    scene.until("children gone", lambda: not scene.clusters() and not scene.children())
    git.sync(manifest)
    git.sync(git.manifest({**LABELS, "wave": "2"}, keepClusterSeconds=3600))
    assert scene.runs.get(scene.name)["metadata"]["labels"]["wave"] == "2"
    scene.operator.kill()
    scene.operator.start()
    # Whoever has brought a second run to its end has looked at the first one, which came before it.
    second = replace(scene, name="second")
    second.apply()
    second.until_phase("Succeeded")
    second.until("cluster freed", lambda: not scene.clusters())
    assert scene.status() == ended
    assert [scene.head.posts.count(each["job"]["submissionId"]) for each in (ended, second.status())] == [1, 1]
    assert len(scene.head.posts) == 2


@pytest.mark.parametrize("named", [True, False], ids=["Git names it", "Git does not"])
@pytest.mark.parametrize("hand", ["dsft", "kubectl"])
def test_suspended_by_hand_it_is_put_back_where_git_names_it(git: Git, hand: str, named: bool) -> None:
    """No operator runs: it is the API server that decides whose word counts. What kubectl set is never left by Flux."""
    scene, manifest = git.scene, git.manifest(**({"suspend": False} if named else {}))
    git.sync(manifest)
    if hand == "dsft":
        assert dsft(scene, "suspend", scene.name, "--no-wait").returncode == ExitCode.OK
    else:
        git.kubectl("patch", f"dsft/{scene.name}", "--type=merge", "--patch", '{"spec": {"suspend": true}}')
    assert scene.runs.get(scene.name)["spec"]["suspend"] is True
    left = not named and (hand, git.way) != ("kubectl", "flux")
    assert git.drift(manifest) is not left
    git.sync(manifest)
    assert scene.runs.get(scene.name)["spec"]["suspend"] is left


def test_a_checkpoint_asked_for_by_hand_is_left_alone(git: Git) -> None:
    scene, manifest = git.scene, git.manifest()
    git.sync(manifest)
    assert dsft(scene, "save", scene.name, "--no-wait").returncode == ExitCode.OK
    asked = scene.runs.get(scene.name)["metadata"]["annotations"][CHECKPOINT_REQUEST]
    assert not git.drift(manifest)
    git.sync(manifest)
    assert scene.runs.get(scene.name)["metadata"]["annotations"][CHECKPOINT_REQUEST] == asked
