"""What the chart makes of its values, by the real Helm."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsft_operator.chart import CRD, REPOSITORY
from dsft_operator.config import OperatorConfig
from dsft_operator.dashboard import dashboard
from dsft_operator.install import ROOT_KEY_RIGHT, manifests
from tests.charts.conftest import CI, FOLDER, MINIMAL, Document, Helm, kinds, one

FULL = FOLDER / "ci" / "full-values.yaml"


@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_lint_has_nothing_to_say(helm: Helm, values: Path) -> None:
    done = helm("lint", "--strict", str(FOLDER), "--values", str(values))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_least_that_is_made(helm: Helm) -> None:
    assert kinds(helm.render()) == [
        *["ClusterRole"] * 4,
        "ClusterRoleBinding",
        "ConfigMap",
        "CustomResourceDefinition",
        "Deployment",
        "Pod",
        "PodDisruptionBudget",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
    ]


def test_all_that_is_made(helm: Helm) -> None:
    made = helm.render(FULL)
    assert kinds(made) == [
        *["ClusterRole"] * 3,
        *["ConfigMap"] * 2,
        "CustomResourceDefinition",
        "Deployment",
        "NetworkPolicy",
        "Pod",
        "PodDisruptionBudget",
        "PodMonitor",
        "PrometheusRule",
        *["Role"] * 3,
        *["RoleBinding"] * 3,
        "Service",
        "ServiceAccount",
        "ServiceMonitor",
    ]
    assert {document["metadata"]["labels"]["owner"] for document in made} == {"platform"}


def test_the_rights_are_those_of_the_table(helm: Helm) -> None:
    """And of the plain manifests: what the API server tests run under."""
    plain, made = manifests("image", {}), helm.render()
    wanted, found = one(plain, "ClusterRole")["rules"], one(made, "ClusterRole", "dsft-dsft-operator")["rules"]
    assert sorted(map(repr, found)) == sorted(map(repr, wanted))
    own, plain_own = one(made, "Role")["rules"], one(plain, "Role")["rules"]
    # A Lease of the release's own.
    named = [
        {**rule, "resourceNames": ["dsft-operator"]}
        if rule["resources"] == ["leases"] and "create" not in rule["verbs"]
        else rule
        for rule in own
    ]
    assert named == plain_own


def test_with_namespaces_there_is_no_right_of_the_whole_cluster(helm: Helm) -> None:
    made = helm.render(config={"watchNamespaces": ["team-a", "team-b"]})
    assert not [d for d in made if d["kind"] == "ClusterRoleBinding"]
    roles = {(d["metadata"]["namespace"], d["metadata"]["name"]): d for d in made if d["kind"] == "Role"}
    assert set(roles) == {
        ("team-a", "dsft-dsft-operator-runs"),
        ("team-b", "dsft-dsft-operator-runs"),
        ("dsft-system", "dsft-dsft-operator"),
    }
    rules = roles["team-a", "dsft-dsft-operator-runs"]["rules"]
    assert not [rule for rule in rules if "nodes" in rule["resources"]]
    assert ROOT_KEY_RIGHT.to_rule() in roles["dsft-system", "dsft-dsft-operator"]["rules"]
    subjects = [s for d in made if d["kind"] == "RoleBinding" for s in d["subjects"]]
    assert {(s["name"], s["namespace"]) for s in subjects} == {("dsft-dsft-operator", "dsft-system")}


def test_users_may_write_runs_and_not_their_status(helm: Helm) -> None:
    rules = {
        d["metadata"]["name"].rpartition("-")[2]: d["rules"][0]
        for d in helm.render()
        if any(label.startswith("rbac.authorization.k8s.io/aggregate-to-") for label in d["metadata"]["labels"])
    }
    assert {rule["resources"][0] for rule in rules.values()} == {"deepspeedfinetunes"}
    assert rules["view"]["verbs"] == ["get", "list", "watch"]
    assert set(rules["edit"]["verbs"]) == {*rules["view"]["verbs"], "create", "update", "patch", "delete"}
    assert set(rules["admin"]["verbs"]) == {*rules["edit"]["verbs"], "deletecollection"}


def test_the_crd_is_the_one_in_crds(helm: Helm) -> None:
    plain = yaml.safe_load((REPOSITORY / CRD).read_text())
    made = one(helm.render(), "CustomResourceDefinition")
    assert made["spec"] == plain["spec"]
    assert made["metadata"]["name"] == plain["metadata"]["name"]
    assert made["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert not one(helm.render(crds={"keep": False}), "CustomResourceDefinition")["metadata"]["annotations"]
    assert "CustomResourceDefinition" not in kinds(helm.render(crds={"install": False}))


def test_the_operator_reads_the_settings_that_were_given(helm: Helm) -> None:
    made = helm.render(FULL)
    config = OperatorConfig.model_validate(yaml.safe_load(one(made, "ConfigMap", "dsft")["data"]["config.yaml"]))
    assert config.watch_namespaces == ("team-a", "team-b")
    assert config.intervals.running_seconds == 5
    assert config.root_key_secret == "ray-root-key"
    own = one(made, "Role", "dsft")["rules"]
    assert own[0] == {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"], "resourceNames": ["ray-root-key"]}


def test_other_settings_start_another_pod(helm: Helm) -> None:
    def checksum(made: list[Document]) -> str:
        return one(made, "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    assert checksum(helm.render()) == checksum(helm.render(logLevel="debug"))
    assert checksum(helm.render()) != checksum(helm.render(config={"workers": 4}))


def test_two_replicas_on_two_nodes_of_which_one_may_go(helm: Helm) -> None:
    made = helm.render()
    deployment, budget = one(made, "Deployment")["spec"], one(made, "PodDisruptionBudget")["spec"]
    assert deployment["replicas"] == 2
    assert "strategy" not in deployment, "rolling: the old ones act until the new ones stand by"
    (spread,) = deployment["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    labels = deployment["selector"]["matchLabels"]
    assert spread["labelSelector"]["matchLabels"] == budget["selector"]["matchLabels"] == labels
    assert budget["maxUnavailable"] == 1
    assert "PodDisruptionBudget" not in kinds(helm.render(replicas=1)), "it would keep a node from being drained"
    assert "PodDisruptionBudget" not in kinds(helm.render(podDisruptionBudget={"enabled": False}))


def test_spread_as_the_user_wants_it(helm: Helm) -> None:
    mine = {"matchLabels": {"a": "b"}}
    zones: Document = {"maxSkew": 2, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"}
    made = helm.render(topologySpreadConstraints=[zones, zones | {"labelSelector": mine}])
    first, second = one(made, "Deployment")["spec"]["template"]["spec"]["topologySpreadConstraints"]
    selector = one(made, "Deployment")["spec"]["selector"]
    assert first == zones | {"labelSelector": selector}
    assert second == zones | {"labelSelector": mine}


def test_without_leader_election_there_is_never_a_second_one(helm: Helm) -> None:
    made = helm.render(replicas=1, config={"leaderElection": {"enabled": False}})
    assert one(made, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_the_right_to_the_lease_is_to_the_one_that_is_used(helm: Helm) -> None:
    for settings, name in (({}, "dsft-dsft-operator"), ({"leaderElection": {"leaseName": "mine"}}, "mine")):
        made = helm.render(config=settings)
        rules = [rule for rule in one(made, "Role")["rules"] if rule["resources"] == ["leases"]]
        assert rules[0]["resourceNames"] == [name]
        config = OperatorConfig.model_validate(yaml.safe_load(one(made, "ConfigMap")["data"]["config.yaml"]))
        assert config.leader_election.lease_name == name


def container(made: list[Document]) -> Document:
    (found,) = one(made, "Deployment")["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({}, "registry.example.com/dsft-operator:0.1.0"),
        ({"tag": "edge"}, "registry.example.com/dsft-operator:edge"),
        (
            {"tag": "edge", "digest": f"sha256:{'0' * 64}"},
            f"registry.example.com/dsft-operator@sha256:{'0' * 64}",
        ),
    ],
    ids=["the chart's version", "a tag", "a digest beats the tag"],
)
def test_image(helm: Helm, image: dict[str, Any], reference: str) -> None:
    assert (
        container(helm.render(image={"repository": "registry.example.com/dsft-operator"} | image))["image"] == reference
    )


def test_environment_has_each_name_once_and_ours_wins(helm: Helm) -> None:
    """A name that is there twice is refused under server-side apply."""
    extra = [
        {"name": "HTTPS_PROXY", "value": "http://a"},
        {"name": "HTTPS_PROXY", "value": "http://b"},
        {"name": "POD_NAMESPACE", "value": "elsewhere"},
    ]
    variables = container(helm.render(extraEnv=extra))["env"]
    assert sorted(variable["name"] for variable in variables) == [
        "DSFT_CONFIG",
        "DSFT_LOG_LEVEL",
        "HTTPS_PROXY",
        "POD_NAME",
        "POD_NAMESPACE",
    ]
    by_name = {variable["name"]: variable for variable in variables}
    assert by_name["HTTPS_PROXY"]["value"] == "http://b"
    assert by_name["POD_NAMESPACE"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.namespace"


def test_the_pod_is_the_plain_manifests_pod(helm: Helm) -> None:
    """Probes, resources, security: one of the two would be forgotten."""
    ours, plain = container(helm.render()), container(manifests("image", {}))
    for part in (
        "startupProbe",
        "readinessProbe",
        "livenessProbe",
        "resources",
        "securityContext",
        "ports",
        "volumeMounts",
    ):
        assert ours[part] == plain[part], part
    pod = one(helm.render(), "Deployment")["spec"]["template"]
    assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "dsft-operator", (
        "each run's NetworkPolicy asks for it"
    )
    assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_the_services_pods_are_the_deployments(helm: Helm) -> None:
    made = helm.render(FULL)
    labels = one(made, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert one(made, "Deployment")["spec"]["selector"]["matchLabels"].items() <= labels
    assert one(made, "Service")["spec"]["selector"].items() <= labels
    assert one(made, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels
    assert one(made, "PodMonitor")["spec"]["selector"]["matchLabels"].items() <= labels
    monitored = one(made, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
    assert monitored <= one(made, "Service")["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image": {"repository": ""}}, "image.repository: name the operator's image"),
        ({"replicas": 0}, "/replicas"),
        ({"config": {"leaderElection": {"enabled": False}}}, "needs config.leaderElection.enabled"),
        ({"imag": {}}, "imag"),
        ({"config": {"namespace": "elsewhere"}}, "namespace"),
        ({"config": {"storage": {"ur": "s3://b"}}}, "/config/storage"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.name: name the ServiceAccount"),
        (
            {"metrics": {"service": {"enabled": False}, "serviceMonitor": {"enabled": True}}},
            "set metrics.service.enabled too",
        ),
    ],
    ids=[
        "no image",
        "no replica",
        "two that both act",
        "a key that is not known",
        "a namespace",
        "a misspelt setting",
        "no account",
        "monitor",
    ],
)
def test_wrong_values_are_refused_in_words(helm: Helm, values: dict[str, Any], words: str) -> None:
    assert words in helm.refused(**values)


def test_each_alert_links_its_section(helm: Helm) -> None:
    made = one(helm.render(FULL), "PrometheusRule")
    assert made["metadata"]["labels"]["release"] == "prometheus"
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    for alert in [rule for group in made["spec"]["groups"] for rule in group["rules"]]:
        link = alert["annotations"]["runbook_url"]
        assert link == f"https://wiki.example.com/dsft/operations#{alert['alert'].lower()}"
        assert f"\n### {alert['alert']}\n" in page


def test_alerts_are_rendered_as_they_are_tested(helm: Helm) -> None:
    """Templates of Prometheus are not taken for Helm's."""
    written = yaml.safe_load((FOLDER / "files" / "alerts.yaml").read_text())["groups"]
    made = one(helm.render(FULL), "PrometheusRule")["spec"]["groups"]
    for alert in [rule for group in made for rule in group["rules"]]:
        del alert["annotations"]["runbook_url"]
    assert made == written


def test_the_run_that_a_metric_names_is_not_the_operators_pod(helm: Helm) -> None:
    """Without honorLabels Prometheus renames the label `namespace`, and no alert would find its run."""
    made = helm.render(FULL)
    assert [each["honorLabels"] for each in one(made, "ServiceMonitor")["spec"]["endpoints"]] == [True]
    assert [each["honorLabels"] for each in one(made, "PodMonitor")["spec"]["podMetricsEndpoints"]] == [True]


def test_the_dashboard_is_where_grafana_looks(helm: Helm) -> None:
    made = one(helm.render(FULL), "ConfigMap", "dsft-dashboard")
    assert made["metadata"]["namespace"] == "team-a"
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(made["data"]["dsft.json"]) == dashboard()


def test_an_account_of_ones_own(helm: Helm) -> None:
    made = helm.render(serviceAccount={"create": False, "name": "mine"})
    assert "ServiceAccount" not in kinds(made)
    assert one(made, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "mine"
    assert one(made, "ClusterRoleBinding")["subjects"][0]["name"] == "mine"


def test_minimal_values_are_all_that_must_be_given() -> None:
    assert yaml.safe_load(MINIMAL.read_text()) == {"image": {"repository": "registry.example.com/dsft-operator"}}
