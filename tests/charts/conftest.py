"""The chart, rendered by the real Helm."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsft_operator.chart import CHART, REPOSITORY
from tests.cluster.before_tests import make_before
from tests.cluster.build import HELM, HELM_3, HELM_UNITTEST, PROMTOOL
from tests.cluster.helm_command import helm as run_helm

HERE = Path(__file__).resolve().parent
FOLDER = REPOSITORY / CHART
CI = sorted((FOLDER / "ci").glob("*.yaml"))
MINIMAL = FOLDER / "ci" / "minimal-values.yaml"
UMBRELLA = "examples/gitops/helm-umbrella"

Document = dict[str, Any]


def pytest_collection_finish(session: pytest.Session) -> None:
    make_before(session, HERE, lambda: [program.built() for program in (HELM, HELM_3, PROMTOOL, HELM_UNITTEST)])


@dataclass(frozen=True)
class Helm:
    """Commands that need no cluster."""

    folder: Path

    def __call__(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run it, whatever the exit code."""
        return run_helm(self.folder, *arguments)

    def render(self, *values: Path, **settings: Any) -> list[Document]:
        """The objects of a release `dsft` in namespace `dsft-system`. `settings`: values by their first key."""
        done = self.template(*values, **settings)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    def refused(self, **settings: Any) -> str:
        """Why values are refused."""
        done = self.template(**settings)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def umbrella(self) -> Path:
        """The example of a chart that has ours as its dependency, with that dependency in it."""
        for chart in (CHART, UMBRELLA):
            shutil.copytree(REPOSITORY / chart, self.folder / chart)
        done = self("dependency", "build", str(self.folder / UMBRELLA))
        assert done.returncode == 0, done.stderr
        return self.folder / UMBRELLA

    def template(self, *values: Path, **settings: Any) -> "subprocess.CompletedProcess[str]":
        """`helm template`, with the files one upon the other; the minimal values if there are none."""
        files = list(values or (MINIMAL,))
        if settings:
            files.append(self.folder / "values.yaml")
            files[-1].write_text(yaml.safe_dump(settings))
        options = [option for file in files for option in ("--values", str(file))]
        return self("template", "dsft", str(FOLDER), "--namespace", "dsft-system", *options)


@pytest.fixture
def helm(tmp_path: Path) -> Helm:
    return Helm(tmp_path)


def one(documents: list[Document], kind: str, name: str | None = None) -> Document:
    """The only object of a kind, or of that name."""
    (found,) = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    return found


def kinds(documents: list[Document]) -> list[str]:
    """Of all objects, sorted."""
    return sorted(document["kind"] for document in documents)
