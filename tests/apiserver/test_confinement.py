"""Each way out of a tenant's namespace, applied to the real API server with the operator at work: refused, and nothing made."""

import json
import re
from typing import Any

import pytest
from kubernetes.client import ApiException, BatchV1Api, CoreV1Api, CustomObjectsApi

from tests.apiserver.scene import Scene
from tests.unit.operator.escapes import ESCAPES, POLICY, escape_spec, legal

pytestmark = pytest.mark.timeout(300)
Document = dict[str, Any]


def manifest(name: str, namespace: str, spec: Document) -> Document:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")
    metadata = {"name": f"x-{slug}", "namespace": namespace}
    return {"apiVersion": "dsft.dev/v1alpha1", "kind": "DeepSpeedFineTune", "metadata": metadata, "spec": spec}


def test_no_resource_holds_up_another(scene: Scene, kuberay: None) -> None:
    """Nested as deep as the API server takes it: the operator, which lists it with all others, goes on."""
    namespace, levels = scene.runs.namespace, 5000
    body = json.dumps(manifest("deep", namespace, legal(namespace) | {"deepspeed": {"config": {"a": "DEEP"}}}))
    body = body.replace('"DEEP"', '{"a": ' * levels + "1" + "}" * levels)
    path = f"/apis/dsft.dev/v1alpha1/namespaces/{namespace}/deepspeedfinetunes"
    scene.api.plane.kubectl("create", "--raw", path, "--filename=-", stdin=body)
    scene.operator.start()
    scene.apply()
    scene.until_phase("Succeeded")
    scene.name = "x-deep"
    words = scene.api.plane.kubectl(
        "get", "dsft", "x-deep", f"--namespace={namespace}", "--output=jsonpath={.status.message}"
    )
    assert "nested deeper than 64 levels" in words


def test_no_escape_makes_anything(scene: Scene, kuberay: None) -> None:
    scene.operator.options["policies"] = [{**POLICY, "namespaces": ["*"]}]
    scene.operator.start()
    namespace = scene.runs.namespace
    objects = CustomObjectsApi(scene.api.client)
    refused_at_once: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in ESCAPES:
        body = manifest(name, namespace, escape_spec(name, namespace))
        try:
            # As somebody would who means it: unknown fields are no error to this client.
            objects.create_namespaced_custom_object(
                "dsft.dev", "v1alpha1", namespace, "deepspeedfinetunes", body, field_validation="Ignore"
            )
        except ApiException as error:
            refused_at_once[name] = f"{error.status}: {error.body}"
        else:
            taken[name] = body["metadata"]["name"]
    assert all(words.startswith("422: ") for words in refused_at_once.values()), refused_at_once
    # One that is in order comes last: when it has its cluster, the operator has long looked at all others. No kubelet is here
    # to look at it first; all others would have a Job for that.
    orderly = legal(namespace) | {"preflight": {"enabled": False}}
    scene.name = scene.runs.create(manifest("legal", namespace, orderly))["metadata"]["name"]
    scene.until("made", lambda: scene.clusters() and scene.children())
    for name, run in taken.items():
        scene.name = run
        scene.until(f"refused: {name}", lambda: scene.condition("Accepted").get("status") == "False")
        assert ESCAPES[name].words in scene.condition("Accepted")["message"], name
        assert scene.status()["phase"] == "Failed", name
    owners = {owner["name"] for cluster in scene.clusters() for owner in cluster["metadata"]["ownerReferences"]}
    assert owners == {"x-legal"}
    assert not BatchV1Api(scene.api.client).list_namespaced_job(namespace).items
    pods = CoreV1Api(scene.api.client).list_namespaced_pod(namespace).items
    runs = {(pod.metadata.labels or {})["dsft.dev/run"] for pod in pods if pod.metadata is not None}
    assert runs <= {"x-legal"}
    assert len(taken) + len(refused_at_once) == len(ESCAPES) >= 40
    print(f"{len(ESCAPES)} escapes: {len(taken)} refused by the operator, {len(refused_at_once)} by the API server")
