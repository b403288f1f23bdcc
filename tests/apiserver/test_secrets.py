"""Secrets that a run uses stay in Secrets: all other objects, the operator's log and metrics, and what Ray gets, are searched."""

import base64
import json
import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import quote_plus

import pytest
from kubernetes.client import CoreV1Api

from dsft_operator.core.naming import ray_token
from dsft_operator.install import NAMESPACE
from tests.apiserver.scene import ROOT_KEY, Scene
from tests.apiserver.server import ApiServer
from tests.secret_scan import findings, objects, outside

pytestmark = pytest.mark.timeout(300)

# What a run makes or changes, at the least.
KINDS = {"DeepSpeedFineTune", "RayCluster", "Pod", "Service", "NetworkPolicy", "Event", "Lease", "ConfigMap", "Secret"}
LOOKS = {"preflight": {"enabled": True}}
ENV = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}]
SPEC: dict[str, Any] = {
    "env": ENV,
    "envFrom": [{"secretRef": {"name": "tracker"}}],
    "image": {"pullSecrets": [{"name": "registry"}]},
}


def value(purpose: str) -> str:
    """With what S3 keys have, and what JSON and URLs write otherwise."""
    return f'{purpose}/{secrets.token_hex(12)}+"{secrets.token_urlsafe(9)}='


def plant(scene: Scene) -> dict[str, str]:
    """The Secrets of a tenant; their values by name."""
    values = {name: value(name) for name in ("s3-id", "s3-key", "s3-session", "hub", "tracker", "registry")}
    docker = {"auths": {"registry.test": {"username": "puller", "password": values["registry"]}}}
    made = {
        "s3": {
            "AWS_ACCESS_KEY_ID": values["s3-id"],
            "AWS_SECRET_ACCESS_KEY": values["s3-key"],
            "AWS_SESSION_TOKEN": values["s3-session"],
        },
        "hub": {"token": values["hub"]},
        "tracker": {"WANDB_API_KEY": values["tracker"]},
        "registry": {".dockerconfigjson": json.dumps(docker)},
    }
    for name, data in made.items():
        kind = "kubernetes.io/dockerconfigjson" if name == "registry" else "Opaque"
        body: Any = {"metadata": {"name": name}, "type": kind, "stringData": data}
        CoreV1Api(scene.api.client).create_namespaced_secret(scene.runs.namespace, body)
    return values


def all_that_is_told(scene: Scene, metrics: Callable[[], str]) -> dict[str, str]:
    return {
        **objects(scene.api.plane.kubectl, scene.runs.namespace, NAMESPACE),
        "the operator's log": scene.operator.log_file.read_text(),
        "the operator's metrics": metrics(),
        "what Ray was asked for": "\n".join(scene.head.paths),
        "what Ray was sent": "\n".join(map(json.dumps, scene.head.bodies)),
    }


def ours(scene: Scene) -> dict[str, str]:
    """The root key, and what of it is the token of the run's RayCluster."""
    secret = CoreV1Api(scene.api.client).read_namespaced_secret(ROOT_KEY, NAMESPACE)
    key = base64.b64decode(secret.data["key"])
    (cluster,) = scene.clusters()
    return {"root key": key.decode(), f"token of {scene.name}": ray_token(key, cluster["metadata"]["uid"])}


def test_no_secret_of_a_run_is_told(scene: Scene, kuberay: None, metrics: Callable[[], str]) -> None:
    planted = plant(scene)
    scene.operator.environment["DSFT_LOG_LEVEL"] = "debug"
    scene.operator.options["leaderElection"] = {"enabled": True}
    scene.operator.start()
    scene.head.hold = True
    scene.apply(**SPEC)
    scene.until("running", lambda: (scene.status().get("job") or {}).get("state") == "RUNNING")
    planted |= ours(scene)
    told = all_that_is_told(scene, metrics)
    assert {place.partition(" ")[0] for place in told} >= KINDS
    found = findings(told, planted)
    assert {name for _, name, _ in found} == planted.keys(), "the search sees the Secrets themselves"
    assert not outside(found), "while it runs"
    assert scene.head.bodies
    scene.head.hold = False
    scene.until_phase("Succeeded")
    scene.until("cluster freed", lambda: not scene.clusters())
    assert not outside(findings(all_that_is_told(scene, metrics), planted)), "when it has succeeded"

    scene.name = "bad"
    scene.head.last_words = "the loss is not finite"
    scene.apply(**SPEC, keepClusterSeconds=3600)
    scene.until_phase("Failed")
    planted |= ours(scene)
    assert len(planted) == 9
    assert not outside(findings(all_that_is_told(scene, metrics), planted)), "when one has failed"


def test_no_secret_of_a_run_is_told_while_it_is_looked_at(
    scene: Scene, kuberay: None, metrics: Callable[[], str]
) -> None:
    planted = plant(scene)
    scene.operator.start()
    scene.apply(**SPEC, **LOOKS)

    scene.until("a pod looks", lambda: any("-preflight-" in name for name in scene.children()))
    told = all_that_is_told(scene, metrics)
    assert {place.partition(" ")[0] for place in told} >= {"DeepSpeedFineTune", "Job", "Pod", "Event", "Secret"}
    found = findings(told, planted)
    assert {name for _, name, _ in found} == planted.keys(), "the search sees the Secrets themselves"
    assert not outside(found)


SPELLED: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: f"<{text}>",
    "in JSON": lambda text: json.dumps({"key": text}),
    "in JSON in JSON": lambda text: json.dumps(json.dumps({"key": text})),
    "in JSON in base64": lambda text: base64.b64encode(json.dumps({"key": text}).encode()).decode(),
    "in a query": lambda text: f"https://host/?key={quote_plus(text)}&more",
    "in hex": lambda text: f"0x{text.encode().hex()}",
    **{
        f"in base64, {n} before": lambda text, n=n: base64.b64encode(f"{'x' * n}{text}...".encode()).decode()
        for n in range(4)
    },
}


@pytest.mark.parametrize("spelled", SPELLED)
def test_the_search_finds_a_value_in_every_spelling(spelled: str) -> None:
    for purpose in ("a", "ab", "abc"):
        planted = {"mine": value(purpose), "other": value(purpose)}
        found = findings({"here": SPELLED[spelled](planted["mine"]), "there": "nothing"}, planted)
        assert {(place, name) for place, name, _ in found} == {("here", "mine")}


def in_a_config_map(core: CoreV1Api, namespace: str, text: str) -> None:
    body: Any = {"metadata": {"name": "leak"}, "data": {"file": base64.b64encode(f"key: {text}\n".encode()).decode()}}
    core.create_namespaced_config_map(namespace, body)


def in_an_annotation_of_a_secret(core: CoreV1Api, namespace: str, text: str) -> None:
    body: Any = {"metadata": {"name": "leak", "annotations": {"last-applied": json.dumps({"key": text})}}}
    core.create_namespaced_secret(namespace, body)


def in_an_event(core: CoreV1Api, namespace: str, text: str) -> None:
    about = {"kind": "Pod", "name": "leak", "namespace": namespace}
    body: Any = {"metadata": {"name": "leak"}, "involvedObject": about, "message": f"could not log in with {text}"}
    core.create_namespaced_event(namespace, body)


def in_a_pod(core: CoreV1Api, namespace: str, text: str) -> None:
    container = {"name": "main", "image": "x", "env": [{"name": "URL", "value": f"s3://me:{quote_plus(text)}@host"}]}
    core.create_namespaced_pod(namespace, {"metadata": {"name": "leak"}, "spec": {"containers": [container]}})


LEAKS = {"ConfigMap": in_a_config_map, "Secret": in_an_annotation_of_a_secret, "Event": in_an_event, "Pod": in_a_pod}


@pytest.mark.parametrize("kind", LEAKS)
def test_the_search_finds_what_leaks_into_an_object(api_server: ApiServer, namespace: str, kind: str) -> None:
    planted = {"mine": value("s3")}
    LEAKS[kind](CoreV1Api(api_server.client), namespace, planted["mine"])
    assert {place for place, _, _ in findings(objects(api_server.plane.kubectl, namespace), planted)} == {
        f"{kind} {namespace}/leak"
    }
