"""What the chart makes, taken by a real API server: no field that it does not know, no value that it refuses."""

from pathlib import Path

import pytest
import yaml
from kubernetes.client import CoreV1Api, V1Namespace, V1ObjectMeta, V1ServiceAccount

from tests.apiserver.server import ApiServer
from tests.charts.conftest import FOLDER, Helm

# Of the Prometheus operator, which is not here.
FOREIGN = ("ServiceMonitor", "PodMonitor", "PrometheusRule")


@pytest.fixture(scope="module")
def namespaces(api_server: ApiServer) -> None:
    """Those that the values name. They go with the server; the operator's may be there already."""
    core = CoreV1Api(api_server.client)
    there = {namespace.metadata.name for namespace in core.list_namespace().items}
    for name in {"dsft-system", "team-a", "team-b"} - there:
        core.create_namespace(V1Namespace(metadata=V1ObjectMeta(name=name)))
    accounts = {
        (each.metadata.namespace, each.metadata.name) for each in core.list_service_account_for_all_namespaces().items
    }
    if ("dsft-system", "default") not in accounts:
        # Made by the controller manager, where one runs.
        core.create_namespaced_service_account("dsft-system", V1ServiceAccount(metadata=V1ObjectMeta(name="default")))


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("values", sorted((FOLDER / "ci").glob("*.yaml")), ids=lambda path: path.stem)
def test_all_objects_are_accepted(api_server: ApiServer, tmp_path: Path, values: Path) -> None:
    made = Helm(tmp_path).render(values)
    ours = [document for document in made if document["kind"] not in FOREIGN]
    options = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
    told = api_server.plane.kubectl("apply", *options, "--filename=-", stdin=yaml.safe_dump_all(ours))
    assert len(told.splitlines()) == len(ours)
