"""A real API server for the session: etcd and kube-apiserver, no kubelet, with our CRDs and KubeRay's."""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from kubernetes.config import new_client_from_config

from dsft_operator.install import FILE, NAME, NAMESPACE
from tests.apiserver.fake_head import FakeHead
from tests.apiserver.scene import ROOT, Operator, Scene
from tests.apiserver.server import ApiServer, Runs
from tests.cluster.before_tests import make_before
from tests.cluster.build import GITOPS, HELM, KUEUE, kubernetes
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import our_crds, raycluster_crd
from tests.cluster.kuberay.controller import Standin
from tests.cluster.processes import Process
from tests.cluster.scratch import scratch_folder

HERE = Path(__file__).resolve().parent


def pytest_collection_finish(session: pytest.Session) -> None:
    def build() -> None:
        kubernetes()
        HELM.built()
        GITOPS.built()
        if any(item.path.name == "test_kueue.py" for item in session.items):
            KUEUE.built()

    make_before(session, HERE, build)


@pytest.fixture(scope="session")
def api_server() -> Iterator[ApiServer]:
    with scratch_folder("dsft-api-server-") as folder:
        plane = ControlPlane.start(folder / "plane")
        plane.install(*our_crds(), raycluster_crd())
        with new_client_from_config(str(plane.admin)) as client:
            yield ApiServer(plane, client)


@pytest.fixture(scope="session")
def garbage_collector(api_server: ApiServer) -> Process:
    """Deletes what a deleted object owned, and namespaces; and makes the pods of Jobs."""
    return api_server.plane.start_controller_manager(
        "garbage-collector-controller", "namespace-controller", "job-controller"
    )


@pytest.fixture
def namespace(api_server: ApiServer) -> str:
    return api_server.make_namespace()


@pytest.fixture
def runs(api_server: ApiServer, namespace: str) -> Runs:
    return Runs(api_server.client, namespace)


@pytest.fixture(scope="module")
def kuberay(api_server: ApiServer, garbage_collector: Process) -> Iterator[None]:
    controller = Standin(new_client_from_config(str(api_server.kubeconfig)), mark_ready=lambda _: "127.0.0.1")
    thread = threading.Thread(target=controller.run, daemon=True)
    thread.start()
    yield
    controller.stop()
    thread.join(30)


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


@pytest.fixture
def metrics(scene: Scene) -> Callable[[], str]:
    """What the operator of the scene tells Prometheus."""

    def scrape() -> str:
        (port,) = re.findall(r'"msg": "serving", "url": "http://\S+:(\d+)"', scene.operator.log_file.read_text())
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return answer.read().decode()

    return scrape
