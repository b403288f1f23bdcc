"""What a tenant may ask for, and each way to ask for more."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dsft_api.conditions import Phase, Reason
from dsft_operator.adapters.reading import run_of
from dsft_operator.config import OperatorConfig
from dsft_operator.core.observed import Observed
from dsft_operator.core.plan import plan
from dsft_operator.core.raycluster import ray_cluster
from dsft_operator.tenant_policy import TenantPolicy, allows, allows_uri, policy_for, whole_name
from tests.unit.operator.escapes import ESCAPES, POLICY, escape_spec, legal
from tests.unit.operator.situations import NOW, resource

Json = dict[str, Any]
NAMESPACE = "tenant-a"


def settings(**row: Any) -> OperatorConfig:
    return OperatorConfig.model_validate({"image": {"trainer": "registry.corp/t:1"}, "policies": [{**POLICY, **row}]})


def applied(spec: Json, namespace: str = NAMESPACE) -> Json:
    return {**resource(namespace=namespace), "spec": spec}


def problems(spec: Json, config: OperatorConfig, namespace: str = NAMESPACE) -> str:
    return "\n".join(map(str, run_of(applied(spec, namespace), config).problems))


def worker(spec: Json, config: OperatorConfig) -> Json:
    run = run_of(applied(spec), config)
    assert run.problems == ()
    assert run.spec is not None
    return ray_cluster(run, run.spec, config, 1)["spec"]["workerGroupSpecs"][0]["template"]["spec"]


def test_what_the_policy_gives_may_be_used() -> None:
    assert problems(legal(NAMESPACE), settings()) == ""


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escape_is_refused_and_nothing_is_made(name: str) -> None:
    run = run_of(applied(escape_spec(name, NAMESPACE)), settings())
    assert ESCAPES[name].words in "\n".join(map(str, run.problems))
    decision = plan(Observed(run), NOW, settings())
    assert decision.actions == ()
    assert decision.status is not None
    assert decision.status.phase is Phase.FAILED


@pytest.mark.parametrize("name", [name for name, escape in ESCAPES.items() if "not allowed" in escape.words])
def test_it_is_the_policy_that_refuses(name: str) -> None:
    """Each of them passes where the admin allows it, so that no other rule hides a hole."""
    everything: Json = {
        **{name: ["*"] for name in (*POLICY, "tolerations", "podAnnotations", "runtimeClasses", "priorityClasses")},
        "extendedResources": ["*"],
        "queueRequired": False,
        "maxGpus": 99,
        "maxNodes": 99,
        "maxRunSeconds": 10**6,
        "maxKeepClusterSeconds": 10**6,
        "dns": True,
        "gpuResources": ["*"],
        "queueSchedulers": ["*"],
        "hostNetwork": True,
        "sidecars": True,
        "initContainers": True,
    }
    found = run_of(applied(escape_spec(name, NAMESPACE)), settings(**everything)).problems
    assert [problem for problem in found if problem.reason is Reason.NOT_ALLOWED] == []


def test_the_code_of_a_model_is_allowed_by_its_commit() -> None:
    (allowed,) = POLICY["trustRemoteCode"]
    uri, _, commit = allowed.partition("@")
    spec = legal(NAMESPACE)
    spec["model"] |= {"uri": uri, "revision": commit, "trustRemoteCode": True}
    assert problems(spec, settings()) == ""
    spec["model"]["revision"] = "main"
    assert f"{uri}@main" in problems(spec, settings())
    # Nobody's without the admin's word, also where there is no policy at all.
    assert "policies[].trustRemoteCode" in problems(spec, settings(trustRemoteCode=[]))


def test_the_reason_says_who_can_help() -> None:
    run = run_of(applied(escape_spec("another account", NAMESPACE)), settings())
    decision = plan(Observed(run), NOW, settings())
    assert decision.status is not None
    accepted = next(condition for condition in decision.status.conditions if condition.type == "Accepted")
    assert (accepted.status, accepted.reason) == ("False", "NotAllowed")
    assert accepted.message == (
        "spec.serviceAccountName: is not allowed in this namespace (got 'deployer') -> allowed: default, trainer; or have "
        "the admin allow it by policies[].serviceAccounts of the operator's settings"
    )


def test_without_a_policy_a_run_gets_what_is_harmless() -> None:
    config = OperatorConfig.model_validate({"image": {"trainer": "registry.corp/t:1"}})
    free = {key: value for key, value in legal(NAMESPACE).items() if key != "serviceAccountName"}
    free["nodePools"][0]["podTemplate"]["metadata"].pop("labels")
    assert problems(free, config) == ""
    for name in ("another account", "control plane taint", "every taint", "priority class", "host network", "sidecar"):
        assert "is not allowed in this namespace" in problems(escape_spec(name, NAMESPACE), config), name


def test_the_first_row_for_a_namespace_counts() -> None:
    rows = [TenantPolicy(namespaces=("a", "b-*"), max_gpus=1), TenantPolicy(namespaces=("*", "!c"), max_gpus=2)]
    found = [policy_for(name, rows) for name in ("a", "b-1", "b", "c")]
    assert [row and row.max_gpus for row in found] == [1, 1, 2, None]
    assert found[-1] is None, "where there are rows, a namespace without one gets nothing"
    assert policy_for("c", ()) == TenantPolicy()


def test_a_namespace_without_a_row_gets_nothing() -> None:
    assert "metadata.namespace: has no policy (got 'tenant-a')" in problems(
        legal(NAMESPACE), settings(namespaces=["x"])
    )


@pytest.mark.parametrize(
    ("patterns", "value", "allowed"),
    [
        (["*"], "x", True),
        ([], "x", False),
        (["*", "!system-*"], "system-node-critical", False),
        (["*", "!a*", "ab"], "ab", True),
        (["registry.corp/ml/*"], "registry.corp/ml", False),
    ],
)
def test_patterns(patterns: list[str], value: str, allowed: bool) -> None:
    assert allows(patterns, value, "ns") is allowed


@pytest.mark.parametrize(
    ("patterns", "value", "allowed"),
    [
        (["s3://b/{namespace}/*"], "s3://b/ns", True),
        (["s3://b/{namespace}/*"], "s3://b/ns/x", True),
        (["s3://b/{namespace}/*"], "s3://b/ns2/x", False),
        (["*", "!s3://b/*"], "s3://b", False),
        (["s3://b/*", "!s3://b/x/*", "s3://b/x/y"], "s3://b/x/y", True),
        (["hf://org/*", "!hf://org/secret-*"], "hf://Org/Secret-x", False),
    ],
)
def test_patterns_of_uris(patterns: list[str], value: str, allowed: bool) -> None:
    assert allows_uri(patterns, value, "ns") is allowed


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("python:3", "docker.io/library/python:3"),
        ("evil/miner", "docker.io/evil/miner"),
        ("Registry.Corp:443/ml/t@sha256:0", "registry.corp/ml/t@sha256:0"),
        ("localhost/x", "localhost/x"),
    ],
)
def test_images_have_their_whole_names(image: str, name: str) -> None:
    assert whole_name(image) == name


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="serviceAccount"):
        settings(serviceAccount=["x"])


def test_the_deadline_of_the_policy_counts_where_there_is_none() -> None:
    spec = legal(NAMESPACE)
    del spec["deadlines"]
    run = run_of(applied(spec), settings())
    assert run.spec is not None
    assert run.spec.deadlines.run_seconds == 86400
    assert (kept := run_of(applied(legal(NAMESPACE)), settings()).spec) is not None
    assert kept.deadlines.run_seconds == 3600


def test_what_is_refused_while_it_runs_stays_within_its_times() -> None:
    """An attempt that runs goes on under an edited spec: not for longer than the policy says."""
    spec = legal(NAMESPACE) | {"deadlines": {"runSeconds": 10**9}, "keepClusterSeconds": 10**9}
    run = run_of(applied(spec), settings(maxKeepClusterSeconds=60))
    assert len(run.problems) == 2
    assert run.spec is not None
    assert (run.spec.deadlines.run_seconds, run.spec.keep_cluster_seconds) == (86400, 60)


@pytest.mark.parametrize("part", ["program", "podTemplate"])
def test_what_nests_too_deep_is_a_problem_like_others(part: str) -> None:
    deep: Json = {}
    for _ in range(5000):
        deep = {"a": deep}
    spec = legal(NAMESPACE)
    if part == "program":
        spec["program"] = {"entrypoint": "mine:train", "config": deep}
    else:
        spec["nodePools"][0]["podTemplate"] = {"spec": {"affinity": deep}}
    assert problems(spec, settings()) == "spec: is nested deeper than 64 levels -> write it flatter"


def test_a_long_text_is_judged_in_time() -> None:
    """One resource must not hold up all others. By squares this took 30 s."""
    spec = legal(NAMESPACE)
    spec["nodePools"][0]["podTemplate"] = {"metadata": {"labels": {"team": "a-" * 50_000}}}
    began = time.monotonic()
    problems(spec, settings())
    assert time.monotonic() - began < 5


def test_what_is_allowed_is_made_and_stays_confined() -> None:
    spec = legal(NAMESPACE)
    mount = {"name": "scratch", "mountPath": "/data"}
    extra = {"image": "registry.corp/ml/x:1", "volumeMounts": [mount], "command": ["watch"]}
    spec["nodePools"][0]["podTemplate"] = {
        "spec": {
            "hostNetwork": True,
            "containers": [{"name": "side", **extra}],
            "initContainers": [{"name": "first", **extra}],
        }
    }
    pod = worker(spec, settings(hostNetwork=True, sidecars=True, initContainers=True))
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    ray, side = pod["containers"]
    (first,) = pod["initContainers"]
    assert ray["name"] == "ray-worker"
    for container in (ray, side, first):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert side["volumeMounts"] == [{**mount, "readOnly": False}]
    assert pod["securityContext"]["runAsUser"] == 1000


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({"name": "x", "image": "docker.io/evil:1"}, "containers[0].image: is not allowed"),
        ({"name": "x", "image": "registry.corp/ml/x:1", "securityContext": {}}, "securityContext: Extra inputs"),
        (
            {
                "name": "x",
                "image": "registry.corp/ml/x:1",
                "env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "db", "key": "k"}}}],
            },
            "env[0].valueFrom.secretKeyRef.name: is not allowed",
        ),
        (
            {"name": "x", "image": "registry.corp/ml/x:1", "resources": {"limits": {"nvidia.com/gpu": 1}}},
            "is not allowed",
        ),
        (
            {"name": "x", "image": "registry.corp/ml/x:1", "volumeMounts": [{"name": "ca", "mountPath": "/x"}]},
            "volumeMounts[0].name",
        ),
        (
            {"name": "x", "image": "registry.corp/ml/x:1", "volumeMounts": [{"name": "storage", "mountPath": "/x"}]},
            "is no volume of these pods",
        ),
        ({"name": "wait-gcs-ready", "image": "registry.corp/ml/x:1"}, "is taken"),
        ({"name": "x", "image": "registry.corp/ml/x:1", "env": [{"name": "RAY_ADDRESS", "value": "x"}]}, "is set by"),
    ],
)
def test_an_allowed_sidecar_is_no_way_out(container: Json, words: str) -> None:
    spec = legal(NAMESPACE)
    spec["nodePools"][0]["podTemplate"] = {"spec": {"containers": [container]}}
    assert words in problems(spec, settings(sidecars=True))


def test_what_a_secret_holds_does_not_come_before_the_trainer() -> None:
    """Its keys are not known here; a variable of its own beats one from envFrom."""
    spec = legal(NAMESPACE) | {"envFrom": [{"secretRef": {"name": "run-more"}}]}
    (ray,) = worker(spec, settings())["containers"]
    given = {variable["name"]: variable.get("value") for variable in ray["env"]}
    assert given["LD_PRELOAD"] == given["PYTHONPATH"] == ""


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[3] / "examples").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_examples_need_no_policy(file: Path) -> None:
    document = yaml.safe_load(file.read_text())
    settings = {"image": {"trainer": "registry.corp/t:1"}, "storage": {"uri": "s3://bucket/runs"}}
    found = run_of(applied(document["spec"]), OperatorConfig.model_validate(settings)).problems
    assert [problem for problem in found if problem.reason is Reason.NOT_ALLOWED] == []
