"""The API server takes the CRD as it is, and does with resources what the models say: defaults, strictness, ownership."""

import json

import pytest
from kubernetes.client import ApiextensionsV1Api, CustomObjectsApi

from dsft_api.crd import crd
from dsft_api.resource import DeepSpeedFineTune, spec_hash
from tests.apiserver.server import Document, RefusedError
from tests.cluster.control_plane import ControlPlane
from tests.unit.api.rule_table import MANIFEST, changed


def child_of(owner: Document) -> Document:
    """A RayCluster owned by a stored run, which is not deleted before it."""
    reference = {
        "apiVersion": MANIFEST["apiVersion"],
        "kind": MANIFEST["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    pod = {"spec": {"containers": [{"name": "ray-head"}]}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": "child",
            "namespace": owner["metadata"]["namespace"],
            "ownerReferences": [reference],
        },
        "spec": {"headGroupSpec": {"rayStartParams": {}, "template": pod}},
    }


@pytest.fixture(scope="module")
def live_crd(api_server):
    api = ApiextensionsV1Api(api_server.client)
    return api_server.client.sanitize_for_serialization(api.read_custom_resource_definition(crd()["metadata"]["name"]))


def test_crd_is_established_and_structural(live_crd):
    conditions = {each["type"]: (each["status"], each["message"]) for each in live_crd["status"]["conditions"]}
    assert conditions["Established"][0] == conditions["NamesAccepted"][0] == "True"
    # There is a NonStructuralSchema, or a condition of another fault, only if something is wrong.
    assert set(conditions) == {"Established", "NamesAccepted"}


def test_nothing_of_the_schema_is_dropped(live_crd):
    sent, live = (each["spec"]["versions"][0] for each in (crd(), live_crd))
    assert live["schema"]["openAPIV3Schema"] == sent["schema"]["openAPIV3Schema"]
    assert live["additionalPrinterColumns"] == sent["additionalPrinterColumns"]


def test_defaults_are_those_of_the_model(runs):
    document = changed({"nodePools": [{"name": "gpu"}], "checkpoint": {}, "execution": {}, "deepspeed": {}})
    runs.create(document)
    stored = runs.get("chat")
    assert DeepSpeedFineTune.model_validate(stored).spec == DeepSpeedFineTune.model_validate(document).spec
    assert spec_hash(DeepSpeedFineTune.model_validate(stored).spec) == spec_hash(
        DeepSpeedFineTune.model_validate(document).spec
    )
    assert stored["spec"]["training"]["seed"] == 42
    assert stored["spec"]["checkpoint"]["keepLast"] == 2
    assert stored["spec"]["execution"]["device"] == "auto"
    # Below lists and in parts that were left out, nothing is filled in: GitOps tools would see it as drift.
    assert stored["spec"]["nodePools"] == [{"name": "gpu"}]
    assert stored["spec"].keys() - document["spec"].keys() == {"suspend", "keepClusterSeconds"}


def test_new_resource_is_in_progress_until_the_operator_saw_it(runs):
    runs.create({**MANIFEST, "status": {"phase": "Succeeded"}})
    stored = runs.get("chat")
    assert stored["status"] == {"observedGeneration": -1}
    assert stored["metadata"]["generation"] == 1


def test_generation_counts_changes_of_the_spec_only(runs):
    runs.create(MANIFEST)
    runs.apply_status("chat", {"observedGeneration": 1})
    assert runs.get("chat")["metadata"]["generation"] == 1
    assert runs.replace(changed({"suspend": True}, runs.get("chat")))["metadata"]["generation"] == 2


REFUSED = {
    "unknown field": (changed({"model.name": "x"}), 'strict decoding error: unknown field "spec.model.name"'),
    "missing field": (changed({"training.optimizer": {}}), "spec.training.optimizer.learningRate: Required value"),
    "text for a number": (changed({"training.globalBatchSize": "8"}), "spec.training.globalBatchSize: Invalid value"),
    "unknown word": (
        changed({"model.task": "translation"}),
        'Unsupported value: "translation": supported values: "causal-lm", "sequence-classification"',
    ),
    "exclusive bound": (
        changed({"training.optimizer.learningRate": 0}),
        "spec.training.optimizer.learningRate in body should be greater than 0",
    ),
    "path for a uri": (changed({"storage.uri": "/no/scheme"}), "spec.storage.uri in body should match"),
    "bad quantity": (
        changed({"nodePools": [{"name": "a", "resources": {"limits": {"cpu": "two"}}}]}),
        "spec.nodePools[0].resources.limits.cpu in body should match",
    ),
    "same name twice": (
        changed({"nodePools": [{"name": "a"}, {"name": "a"}]}),
        'spec.nodePools[1]: Duplicate value: {"name":"a"}',
    ),
    "other stage": (changed({"deepspeed.stage": 2}), "spec.deepspeed.stage: Unsupported value: 2"),
}


@pytest.mark.parametrize(("document", "message"), REFUSED.values(), ids=REFUSED)
def test_nonsense_is_refused(runs, document, message):
    with pytest.raises(RefusedError) as refused:
        runs.create(document, dry_run=True)
    assert message in str(refused.value)


def test_free_form_parts_are_kept(runs):
    pool = {"name": "gpu", "podTemplate": {"spec": {"priority": 3, "volumes": [{"name": "v", "emptyDir": {}}]}}}
    config = {"zero_optimization": {"reduce_bucket_size": 1000}}
    runs.create(changed({"nodePools": [pool], "deepspeed.config": config}))
    stored = runs.get("chat")
    assert stored["spec"]["nodePools"] == [pool]
    assert stored["spec"]["deepspeed"]["config"] == config


def test_what_a_run_owns_goes_with_it(api_server, garbage_collector, runs):
    clusters = CustomObjectsApi(api_server.client)
    ours = {"group": "ray.io", "version": "v1", "namespace": runs.namespace, "plural": "rayclusters"}
    clusters.create_namespaced_custom_object(**ours, body=child_of(runs.create(MANIFEST)))
    api_server.plane.kubectl("delete", "dsft/chat", f"--namespace={runs.namespace}", "--timeout=20s")
    garbage_collector.wait_until(lambda: not clusters.list_namespaced_custom_object(**ours)["items"], 20)


def test_who_blocks_the_deletion_of_an_owner_may_update_its_finalizers(api_server, runs):
    """So the operator's role needs `update` on `deepspeedfinetunes/finalizers`."""
    plane, namespace = api_server.plane, f"--namespace={runs.namespace}"
    maker = plane.kubeconfig("maker", "maker")
    child = json.dumps(child_of(runs.create(MANIFEST)))
    may(plane, namespace, "create", "rayclusters.ray.io")
    with pytest.raises(RuntimeError, match="cannot set blockOwnerDeletion"):
        plane.kubectl("create", "--filename=-", stdin=child, kubeconfig=maker)
    may(plane, namespace, "update", "deepspeedfinetunes.dsft.dev/finalizers")
    plane.kubectl("create", "--filename=-", stdin=child, kubeconfig=maker)


def may(plane: ControlPlane, namespace: str, verb: str, resource: str) -> None:
    """Give the user `maker` a right."""
    plane.kubectl("create", "role", verb, f"--verb={verb}", f"--resource={resource}", namespace)
    plane.kubectl("create", "rolebinding", verb, f"--role={verb}", "--user=maker", namespace)
