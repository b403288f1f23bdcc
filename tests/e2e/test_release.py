"""The operator is upgraded and uninstalled under a run that trains, which never notices; and what is left afterwards."""

import time
from pathlib import Path
from shutil import copytree

import pytest
import yaml

from dsft_api import PLURAL
from dsft_operator.config import OperatorConfig
from dsft_operator.install import NAME as OPERATOR
from tests.cluster.images import another_operator_image
from tests.cluster.kubectl import KubectlError
from tests.cluster.operator_install import CHART, Install
from tests.e2e.breaking import pause
from tests.e2e.conftest import World
from tests.e2e.manifests import tiny_run
from tests.e2e.test_replicas import LONG_STEPS, finish_undisturbed
from tests.e2e.trial import NAME, Lines, Trial

pytestmark = pytest.mark.fault

# How long a run is left alone.
ALONE_SECONDS = 20.0


def next_chart(folder: Path) -> Path:
    """The chart as of the next version."""
    chart = folder / "chart"
    copytree(CHART, chart)
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    major, minor, _ = about["version"].split(".")
    about["version"] = about["appVersion"] = f"{major}.{int(minor) + 1}.0"
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about))
    return chart


def test_chart_and_image_are_upgraded_while_it_trains(
    trial: Trial, reference: Lines, operator: Install, world: World, tmp_path: Path
) -> None:
    if not world.cluster.disposable:
        pytest.skip("another operator image is pushed to the disposable cluster's registry")
    trial.begin(steps=LONG_STEPS)
    trial.hit()
    before = {pod["metadata"]["uid"] for pod in operator.pods()}
    image = another_operator_image()
    began = time.monotonic()
    operator.upgrade(next_chart(tmp_path), operator.values(image))
    took = time.monotonic() - began
    try:
        pods = [pod for pod in operator.pods() if "deletionTimestamp" not in pod["metadata"]]
        assert len(pods) == 2
        assert not before & {pod["metadata"]["uid"] for pod in pods}
        assert {pod["spec"]["containers"][0]["image"] for pod in pods} == {image}
        finish_undisturbed(trial, reference, f"chart and operator image upgraded in {took:.0f} s")
    finally:
        operator.restore()


def test_uninstalled_and_installed_again_while_it_trains(trial: Trial, reference: Lines, operator: Install) -> None:
    """The run trains on with no operator; the next one finds it and goes on."""
    trial.begin(steps=LONG_STEPS)
    trial.hit()
    try:
        operator.uninstall()
        pause(ALONE_SECONDS)
        assert trial.tenant.clusters()
    finally:
        operator.restore()
    finish_undisturbed(trial, reference, "operator uninstalled, and installed again")


def test_deleted_while_no_operator_is_there(trial: Trial, operator: Install) -> None:
    """It waits for one, which frees what it holds."""
    trial.begin()
    try:
        operator.uninstall()
        trial.tenant.delete(NAME)
        pause(ALONE_SECONDS / 2)
        assert trial.tenant.exists(NAME)
    finally:
        operator.restore()
    trial.tenant.until("it is gone", lambda: not trial.tenant.exists(NAME))
    trial.tenant.until_nothing_left()


def test_uninstalled_as_documented_nothing_is_left_that_is_not_told(trial: Trial, operator: Install) -> None:
    """Runs first, then the release. What the page about operations names stays."""
    trial.tenant.apply(tiny_run(NAME, trial.assets, steps=LONG_STEPS))
    trial.tenant.until_step(NAME, 1)
    began = time.monotonic()
    trial.tenant.kubectl("delete", PLURAL, NAME, "--timeout=240s", seconds=250)
    freed = time.monotonic() - began
    try:
        operator.uninstall()
        print(f"run freed in {freed:.0f} s, operator uninstalled after {time.monotonic() - began:.0f} s")
        trial.tenant.until_nothing_left()
        settings = OperatorConfig()
        left = operator.kubectl(
            "get", "all,secret,lease,configmap,serviceaccount,role,rolebinding,pdb", "--output=name"
        )
        assert set(left.split()) <= {
            f"secret/{settings.root_key_secret}",
            f"lease.coordination.k8s.io/{settings.leader_election.lease_name}",
            "configmap/kube-root-ca.crt",
            "serviceaccount/default",
        }
        assert operator.kubectl("get", "crd", f"{PLURAL}.dsft.dev", "--output=name")
        with pytest.raises(KubectlError, match="NotFound"):
            operator.kubectl("get", "clusterrole", OPERATOR)
    finally:
        operator.restore()
