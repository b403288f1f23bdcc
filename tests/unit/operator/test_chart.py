"""The chart's values against their model. That it renders and installs is for Helm and a cluster to say."""

from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from dsft_operator.chart import CHART, REPOSITORY, Values, values_schema

CHART_FOLDER = REPOSITORY / CHART
CI = sorted((CHART_FOLDER / "ci").glob("*.yaml"))


def written(path: Path) -> dict[str, object]:
    return yaml.safe_load(path.read_text()) or {}


def test_the_defaults_that_are_written_are_those_that_are_documented() -> None:
    assert written(CHART_FOLDER / "values.yaml") == Values().model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize("path", [CHART_FOLDER / "values.yaml", *CI], ids=lambda path: path.name)
def test_values_pass_the_schema(path: Path) -> None:
    assert list(Draft7Validator(values_schema()).iter_errors(written(path))) == []


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"replicas": 0}, "replicas"),
        ({"image": {"repo": "x"}}, "image"),
        ({"image": {"digest": "latest"}}, "image.digest"),
        ({"config": {"storge": {}}}, "config"),
        ({"config": {"workers": 0}}, "config.workers"),
        ({"config": {"namespace": "elsewhere"}}, "config"),
        ({"networkPolicy": {"apiServerPorts": [0]}}, "networkPolicy.apiServerPorts.0"),
        ({"extraEnv": [{"value": "x"}]}, "extraEnv.0"),
        ({"logLevel": "chatty"}, "logLevel"),
    ],
)
def test_wrong_values_are_refused_where_they_are(values: dict[str, object], where: str) -> None:
    places = [".".join(map(str, error.absolute_path)) for error in Draft7Validator(values_schema()).iter_errors(values)]
    assert places == [where]
