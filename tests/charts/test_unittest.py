"""The chart's own suites (charts/dsft-operator/tests), by helm-unittest, and the chart by Helm 3."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.charts.conftest import CI, FOLDER, Helm
from tests.cluster.build import HELM_3, HELM_UNITTEST
from tests.cluster.helm_command import helm as run_helm


@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_helm_3_makes_the_same_of_it(helm: Helm, values: Path, tmp_path: Path) -> None:
    # As it is built here it does not know which Kubernetes it was made for.
    options = (f"--values={values}", "--kube-version=1.34.0")
    done = run_helm(
        tmp_path / "3", "template", "dsft", str(FOLDER), "--namespace=dsft-system", *options, program=HELM_3
    )
    assert done.returncode == 0, done.stderr
    linted = run_helm(tmp_path / "3", "lint", "--strict", str(FOLDER), *options, program=HELM_3)
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert [each for each in yaml.safe_load_all(done.stdout) if each] == helm.render(values)


def test_the_charts_own_suites() -> None:
    done = subprocess.run(
        [str(HELM_UNITTEST.built()), "--strict", str(FOLDER)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    suites = len(list((FOLDER / "tests").glob("*_test.yaml")))
    assert re.search(rf"Test Suites:\s+{suites} passed, {suites} total", done.stdout), done.stdout
    assert re.search(r"Snapshot:\s+\d+ passed", done.stdout), done.stdout
