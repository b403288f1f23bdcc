"""All that an operator does with the API server, once, under the rights that the chart gives: what `test_rights.py` looks at.

First start, leader election, a preflight, a RayCluster that KubeRay refuses, a pod that ends on a node, another attempt, success,
a queue, suspend, resume, delete, a clean end. What is refused breaks it off: what was asked until then is in the audit log.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml
from kubernetes.client import CoreV1Api, CustomObjectsApi
from kubernetes.config import new_client_from_config

from dsft_operator.install import NAME
from tests.apiserver.audited import Asked, asked_by
from tests.apiserver.fake_head import FakeHead
from tests.apiserver.preflights import ended
from tests.apiserver.scene import Document, Operator, Scene, a_worker, kill
from tests.apiserver.server import ApiServer, Runs
from tests.charts.conftest import FOLDER, MINIMAL
from tests.cluster.helm_command import helm
from tests.cluster.kuberay.controller import Standin

REFUSAL = "not for this KubeRay"


@dataclass(frozen=True)
class Layout:
    """A way in which the chart gives rights. `named`: Roles in `config.watchNamespaces`, else a ClusterRole."""

    name: str
    own: str
    runs: str
    named: bool

    @property
    def user(self) -> str:
        """The operator's ServiceAccount."""
        return f"system:serviceaccount:{self.own}:{NAME}"

    @property
    def groups(self) -> list[str]:
        """That a ServiceAccount is in."""
        return ["system:serviceaccounts", f"system:serviceaccounts:{self.own}", "system:authenticated"]

    @property
    def watched(self) -> list[str]:
        """`config.watchNamespaces`."""
        return [self.runs] if self.named else []

    def may_be_refused(self, asked: Asked) -> bool:
        """Nodes are of the whole cluster: without a right to them, what is wrong with one is not read."""
        return self.named and (asked.verb, asked.resource) == ("get", "nodes")


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("everywhere", own="dsft-system", runs="team-a", named=False),
        Layout("named-namespaces", own="team-b-dsft", runs="team-b", named=True),
    )
}


@dataclass
class Played:
    """What came of it."""

    layout: Layout
    api: ApiServer
    roles: list[Document]
    broke_off: str = ""

    @property
    def kubeconfig(self) -> Path:
        """The operator's."""
        return self.api.plane.kubeconfig(f"operator-{self.layout.own}", self.layout.user, self.layout.groups)

    def asked(self) -> list[Asked]:
        """What the operator asked for, so far."""
        return asked_by(self.layout.user, self.api.plane.audit_log)

    def refused(self) -> list[Asked]:
        """Of that, what it was refused and needs."""
        return [each for each in self.asked() if each.refused and not self.layout.may_be_refused(each)]


@dataclass
class Stage(Scene):
    """A scene that ends where something is refused."""

    played: Played | None = None

    def until(self, what: str, fact: Callable[[], object]) -> None:
        """As of a scene."""

        def reached() -> object:
            assert self.played is not None
            if not (refused := self.played.refused()):
                return fact()
            raise AssertionError(f"never {what}, since this was refused: {refused[0]}")

        super().until(what, reached)

    def until_asked(self, verb: str, resource: str) -> None:
        """For something that shows nowhere else."""
        assert self.played is not None
        asked = self.played.asked
        self.until(f"{verb} {resource}", lambda: any((a.verb, a.resource) == (verb, resource) for a in asked()))


def play(api: ApiServer, layout: Layout, folder: Path) -> Played:
    """Play it. A failure is in `broke_off`: each right is judged alone."""
    api.make_namespace(layout.own)
    api.make_namespace(layout.runs)
    played = Played(layout, api, _install(api, layout, folder))
    head = FakeHead(hold=True)
    options = {"namespace": layout.own, "watchNamespaces": layout.watched, "leaderElection": {"enabled": True}}
    operator = Operator(folder, played.kubeconfig, layout.runs, head.start(), options=options)
    stage = Stage(api, Runs(api.client, layout.runs), operator, head, played=played)
    operator.start()
    try:
        _through_a_failure(stage)
        _through_a_queue(stage)
        assert operator.process is not None
        operator.process.send_signal(signal.SIGTERM)
        assert operator.process.wait(30) == 0
    except AssertionError as failure:
        played.broke_off = str(failure)
    finally:
        operator.kill()
        head.stop()
    return played


def _install(api: ApiServer, layout: Layout, folder: Path) -> list[Document]:
    """The rights of the chart; the roles among them."""
    values = folder / "values.yaml"
    config = {"watchNamespaces": layout.watched}
    values.write_text(yaml.safe_dump({"config": config, "crds": {"install": False}, "rbac": {"aggregate": False}}))
    files = ("--values", str(MINIMAL), "--values", str(values))
    done = helm(folder, "template", NAME, str(FOLDER), "--namespace", layout.own, *files)
    assert done.returncode == 0, done.stderr
    made = [document for document in yaml.safe_load_all(done.stdout) if document]
    rights = [document for document in made if document["apiVersion"].startswith("rbac.authorization.k8s.io/")]
    api.plane.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all(rights))
    return [document for document in rights if document["kind"] in ("Role", "ClusterRole")]


def _through_a_failure(stage: Stage) -> None:
    """Looked at, refused by KubeRay, taken; an attempt that ends with a pod on a node, one that succeeds; deleted."""
    with ended(new_client_from_config(str(stage.api.kubeconfig))):
        stage.apply(preflight={"enabled": True})
        stage.until("cluster", stage.clusters)
    _say_no(stage)
    stage.until("told of the refusal", lambda: REFUSAL in stage.condition("ClusterReady").get("message", ""))
    with _kuberay(stage.api):
        stage.until("running", lambda: (stage.status().get("job") or {}).get("state") == "RUNNING")
        _end_a_worker_on_a_node(stage)
        stage.head.hold = False
        stage.until_phase("Succeeded")
        assert [attempt.get("class") for attempt in stage.status()["attempts"]] == ["HostOOM", None]
        stage.until("cluster freed", lambda: not stage.clusters())
        stage.runs.delete(stage.name)
        stage.until("gone", lambda: not stage.exists())


def _through_a_queue(stage: Stage) -> None:
    """Admitted by hand, in Kueue's place; suspended and resumed; deleted while it runs."""
    stage.head.hold = True
    stage.name = "queued"
    stage.apply(queue={"name": "team"})
    stage.until_phase("Queued")
    stage.until_asked("list", "workloads.kueue.x-k8s.io")
    with _kuberay(stage.api):
        _admit(stage)
        stage.until("running", lambda: (stage.status().get("job") or {}).get("state") == "RUNNING")
        stage.edit(suspend=True)
        stage.until_phase("Suspended")
        stage.edit(suspend=False)
        stage.until("another cluster", stage.clusters)
        _admit(stage)
        stage.until("running again", lambda: (stage.status().get("job") or {}).get("state") == "RUNNING")
        stage.runs.delete(stage.name)
        stage.until("gone", lambda: not stage.exists() and not stage.clusters())


@contextmanager
def _kuberay(api: ApiServer) -> Iterator[None]:
    controller = Standin(new_client_from_config(str(api.kubeconfig)), mark_ready=lambda _: "127.0.0.1")
    thread = threading.Thread(target=controller.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        controller.stop()
        thread.join(30)


def _say_no(stage: Stage) -> None:
    """As KubeRay says it: by an Event about the RayCluster."""
    (cluster,) = stage.clusters()
    named = {key: cluster["metadata"][key] for key in ("name", "namespace", "uid")}
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    event = {
        "metadata": {"generateName": "refusal-", "namespace": stage.runs.namespace},
        "involvedObject": {"apiVersion": "ray.io/v1", "kind": "RayCluster", **named},
        "type": "Warning",
        "reason": "InvalidRayClusterSpec",
        "message": REFUSAL,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    CoreV1Api(stage.api.client).create_namespaced_event(stage.runs.namespace, event)


def _end_a_worker_on_a_node(stage: Stage) -> None:
    """The kernel kills a worker on a node that is gone too; Ray tells of its job only that it failed."""
    namespace = stage.runs.namespace
    pod = a_worker(stage.api, namespace)
    bound = {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": pod},
        "target": {"kind": "Node", "name": "node-1"},
    }
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/binding"
    stage.api.plane.kubectl("create", f"--raw={path}", "--filename=-", stdin=json.dumps(bound))
    kill(stage.api, namespace, pod)
    with stage.head.lock:
        stage.head.jobs = dict.fromkeys(stage.head.jobs, "FAILED")


def _admit(stage: Stage) -> None:
    (cluster,) = stage.clusters()
    assert cluster["spec"]["suspend"] is True
    CustomObjectsApi(stage.api.client).patch_namespaced_custom_object(
        *("ray.io", "v1", stage.runs.namespace, "rayclusters", cluster["metadata"]["name"]),
        {"spec": {"suspend": False}},
    )
