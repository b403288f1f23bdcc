"""A real API server for the session: etcd and kube-apiserver, no kubelet, with our CRDs and KubeRay's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes.config import new_client_from_config

from tests.apiserver.server import ApiServer, Runs
from tests.cluster.build import kubernetes
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import our_crds, raycluster_crd
from tests.cluster.processes import Process
from tests.cluster.scratch import scratch_folder

HERE = Path(__file__).resolve().parent


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the server before the first test: minutes, where a fixture would run into the timeout of its test."""
    if session.config.option.collectonly or not any(HERE in item.path.parents for item in session.items):
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        kubernetes()


@pytest.fixture(scope="session")
def api_server() -> Iterator[ApiServer]:
    with scratch_folder("dsft-api-server-") as folder:
        plane = ControlPlane.start(folder / "plane")
        plane.install(*our_crds(), raycluster_crd())
        with new_client_from_config(str(plane.admin)) as client:
            yield ApiServer(plane, client)


@pytest.fixture(scope="session")
def garbage_collector(api_server: ApiServer) -> Process:
    """Deletes what a deleted object owned, and namespaces."""
    return api_server.plane.start_controller_manager("garbage-collector-controller", "namespace-controller")


@pytest.fixture
def namespace(api_server: ApiServer) -> str:
    return api_server.make_namespace()


@pytest.fixture
def runs(api_server: ApiServer, namespace: str) -> Runs:
    return Runs(api_server.client, namespace)
