"""The examples for GitOps tools: the chart with the values they have, and a platform's own chart with ours as dependency."""

from pathlib import Path

import pytest
import yaml

from dsft_api.manifest import parse
from dsft_operator.chart import REPOSITORY
from tests.charts.conftest import Document, Helm, kinds, one

EXAMPLES = REPOSITORY / "examples" / "gitops"


def values_in(example: str) -> Document:
    """The values of our chart in an Application or a HelmRelease."""
    spec = list(yaml.safe_load_all((EXAMPLES / example).read_text(encoding="utf-8")))[-1]["spec"]
    return spec["values"] if "values" in spec else spec["source"]["helm"]["valuesObject"]


@pytest.mark.parametrize("example", ["argo-cd/operator.yaml", "flux/operator.yaml"])
def test_the_operator_of_the_examples(helm: Helm, tmp_path: Path, example: str) -> None:
    values = tmp_path / "example.yaml"
    values.write_text(yaml.safe_dump(values_in(example)), encoding="utf-8")
    made = helm.render(values)
    annotations = one(made, "CustomResourceDefinition")["metadata"]["annotations"]
    assert annotations["helm.sh/resource-policy"] == "keep"
    assert ("argocd.argoproj.io/sync-options" in annotations) == example.startswith("argo-cd")
    assert "s3://ml-runs/dsft" in one(made, "ConfigMap")["data"]["config.yaml"]


def rendered(helm: Helm, *options: str) -> list[Document]:
    done = helm("template", "research", str(helm.umbrella()), "--namespace=research", *options)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def test_it_has_the_operator_and_a_run(helm: Helm) -> None:
    made = rendered(helm)
    assert one(made, "Deployment")["metadata"]["name"] == "research-dsft-operator"
    assert "CustomResourceDefinition" not in kinds(made), "Helm would look up the run's kind before it is there"
    run = one(made, "DeepSpeedFineTune")
    assert parse(yaml.safe_dump(run), "umbrella").metadata.name == "verse-paraphrase"
    assert run["spec"]["retry"] == {"limit": 3}


def test_a_runs_own_fields_win(helm: Helm) -> None:
    run = one(rendered(helm, "--set-string=runs.verse-paraphrase.retry.token=2"), "DeepSpeedFineTune")
    assert run["spec"]["retry"] == {"limit": 3, "token": "2"}
    assert run["spec"]["checkpoint"] == {"everyMinutes": 10}


def test_it_is_emptied_before_it_goes(helm: Helm) -> None:
    assert "DeepSpeedFineTune" not in kinds(rendered(helm, "--set=runs=null"))


def test_lint_has_nothing_to_say(helm: Helm) -> None:
    done = helm("lint", "--strict", str(helm.umbrella()))
    assert done.returncode == 0, done.stdout + done.stderr
