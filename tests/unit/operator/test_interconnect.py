"""The admin's rows about networks: what they add to workers, and what a run may name."""

from typing import Any

import pytest
from pydantic import ValidationError

from dsft_operator.adapters.reading import run_of
from dsft_operator.config import Interconnect, OperatorConfig
from dsft_operator.core.submission import job_of
from dsft_operator.tenant_policy import TenantPolicy
from tests.unit.operator.built import head, pool, worker
from tests.unit.operator.situations import CONFIG, resource

Json = dict[str, Any]
ROW: Json = {
    "name": "efa",
    "env": {"FI_PROVIDER": "efa", "NCCL_DEBUG": "WARN"},
    "resources": {"vpc.amazonaws.com/efa": 4},
    "annotations": {"k8s.v1.cni.cncf.io/networks": "rail-0", "sidecar.istio.io/inject": "true"},
    "volumes": [{"name": "nic", "hostPath": {"path": "/dev/infiniband"}}],
    "volumeMounts": [{"name": "nic", "mountPath": "/dev/infiniband"}],
    "sidecars": [{"name": "daemon", "image": "registry.example/nic:1"}],
    "minAllGatherGBps": 90,
}
EFA: Json = {"execution": {"interconnect": {"profile": "efa"}}}


@pytest.fixture
def config() -> OperatorConfig:
    return CONFIG.model_copy(update={"interconnects": (Interconnect.model_validate(ROW),)})


def variables(pod: Json) -> dict[str, Any]:
    return {variable["name"]: variable.get("value") for variable in pod["spec"]["containers"][0]["env"]}


def test_a_profile_adds_to_workers_and_to_nobody_else(config: OperatorConfig) -> None:
    with_row, without = worker(EFA, config), worker()
    ray, daemon = with_row["spec"]["containers"]
    assert variables(with_row).items() - variables(without).items() == {("FI_PROVIDER", "efa"), ("NCCL_DEBUG", "WARN")}
    assert ray["resources"]["limits"] == {"nvidia.com/gpu": 1, "vpc.amazonaws.com/efa": 4}
    assert ROW["volumes"][0] in with_row["spec"]["volumes"]
    assert ROW["volumeMounts"][0] in ray["volumeMounts"]
    assert daemon == ROW["sidecars"][0]
    annotations = with_row["metadata"]["annotations"]
    assert annotations["k8s.v1.cni.cncf.io/networks"] == "rail-0"
    assert annotations["sidecar.istio.io/inject"] == "false", "what is ours stays"
    assert head(EFA, config) == head()


def test_what_the_run_sets_itself_stays(config: OperatorConfig) -> None:
    env = [{"name": "NCCL_DEBUG", "value": "INFO"}]
    assert variables(worker({**EFA, "env": env}, config))["NCCL_DEBUG"] == "INFO"


def test_what_the_admin_adds_is_not_replaced_by_a_template(config: OperatorConfig) -> None:
    template = {"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "mine"}}}
    merged = worker({**EFA, **pool(podTemplate=template)}, with_annotations(config))
    assert merged["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "rail-0"


def with_annotations(config: OperatorConfig) -> OperatorConfig:
    return config.model_copy(update={"policies": (TenantPolicy(pod_annotations=("*",)),)})


@pytest.mark.parametrize("spec", [{}, {"execution": {"interconnect": {}}}], ids=["none", "tcp"])
def test_without_a_profile_nothing_is_added(spec: Json, config: OperatorConfig) -> None:
    assert worker(spec, config) == worker()


def test_a_profile_that_is_not_known_is_refused(config: OperatorConfig) -> None:
    run = run_of(resource({"execution": {"interconnect": {"profile": "warp"}}}), config)
    (problem,) = run.problems
    assert str(problem) == (
        "spec.execution.interconnect.profile: is not known here (got 'warp') -> use one of efa, tcp, or have the admin "
        "write a row: interconnects[].name of the operator's settings"
    )


@pytest.mark.parametrize(("asked", "floor"), [(None, 90), (5, 5)], ids=["of the profile", "of the run"])
def test_the_trainer_is_told_the_least_rate(config: OperatorConfig, asked: float | None, floor: float) -> None:
    demand = {"profile": "efa", **({"minAllGatherGBps": asked} if asked else {})}
    run = run_of(resource({"execution": {"interconnect": demand}}), config)
    assert run.spec is not None
    told = job_of(run, run.spec, 1, "s3://bucket").spec.execution.interconnect
    assert told is not None
    assert told.min_all_gather_gbps == floor


def test_two_rows_of_a_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="'efa' is used more than once"):
        OperatorConfig.model_validate({"interconnects": [ROW, ROW]})
