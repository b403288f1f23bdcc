"""The examples for GitOps tools, taken by a real API server that refuses fields it does not know."""

from pathlib import Path

import pytest
import yaml
from kubernetes.client import ApiException, CoreV1Api, V1Namespace, V1ObjectMeta

from dsft_api.manifest import parse
from dsft_operator.chart import REPOSITORY
from tests.apiserver.server import ApiServer
from tests.charts.conftest import Helm

OVERLAY = REPOSITORY / "examples" / "gitops" / "kustomize" / "overlays" / "team-a"
STRICT = ("--dry-run=server", "--validate=strict")


@pytest.fixture
def team_a(api_server: ApiServer) -> None:
    """The overlay's namespace. It goes with the server."""
    try:
        CoreV1Api(api_server.client).create_namespace(V1Namespace(metadata=V1ObjectMeta(name="team-a")))
    except ApiException as answer:
        if answer.status != 409:
            raise


@pytest.mark.usefixtures("team_a")
@pytest.mark.parametrize("way", [(), ("--server-side",)], ids=["client-side", "server-side"])
def test_the_overlay_is_accepted(api_server: ApiServer, way: tuple[str, ...]) -> None:
    said = api_server.plane.kubectl("apply", *way, *STRICT, f"--kustomize={OVERLAY}")
    assert said.startswith("deepspeedfinetune.dsft.dev/chat-sft-v1 ")


def test_the_overlay_is_a_run_of_its_own(api_server: ApiServer) -> None:
    run = yaml.safe_load(api_server.plane.kubectl("kustomize", str(OVERLAY)))
    parse(yaml.safe_dump(run), "overlay")
    assert (run["metadata"]["namespace"], run["metadata"]["name"]) == ("team-a", "chat-sft-v1")
    assert run["spec"]["nodePools"] == [{"name": "gpu", "nodes": 2, "gpusPerNode": 8}], "patched, not replaced"
    assert run["spec"]["training"]["epochs"] == 2, "the base's"
    assert run["spec"]["storage"]["uri"] == "s3://team-a/dsft", "the overlay's"


def test_the_umbrella_is_accepted(api_server: ApiServer, namespace: str, tmp_path: Path) -> None:
    helm = Helm(tmp_path)
    done = helm("template", "research", str(helm.umbrella()), f"--namespace={namespace}")
    assert done.returncode == 0, done.stderr
    said = api_server.plane.kubectl(
        "apply", f"--namespace={namespace}", "--server-side", *STRICT, "-f-", stdin=done.stdout
    )
    assert "deepspeedfinetune.dsft.dev/verse-paraphrase serverside-applied" in said
    assert len(said.splitlines()) == sum(document is not None for document in yaml.safe_load_all(done.stdout))
