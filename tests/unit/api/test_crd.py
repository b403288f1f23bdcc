"""The CRD is a structural schema as Kubernetes defines it, says what the models say, and takes every example."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from jsonschema import Draft4Validator
from pydantic import Field, TypeAdapter

from dsft_api.base import ApiModel
from dsft_api.crd import _Translation, crd
from dsft_api.generate import main, stale_files
from dsft_api.resource import DeepSpeedFineTune, spec_hash

ROOT = Path(__file__).resolve().parents[3]
CRD_FILE = ROOT / "crds" / "dsft.dev_deepspeedfinetunes.yaml"
# kubectl apply keeps the whole manifest in an annotation, and annotations end at 256 KiB.
SIZE_LIMIT = 262_144

Schema = dict[str, Any]

MANIFEST: dict[str, Any] = {
    "apiVersion": "dsft.dev/v1alpha1",
    "kind": "DeepSpeedFineTune",
    "metadata": {"name": "chat"},
    "spec": {
        "nodePools": [{"name": "gpu", "resources": {"requests": {"cpu": 8, "memory": "64Gi"}}}],
        "model": {"uri": "hf://org/model", "task": "causal-lm"},
        "data": {"train": {"uri": "s3://bucket/train.jsonl", "format": "messages"}},
        "training": {"epochs": 1, "globalBatchSize": 8, "optimizer": {"learningRate": 1.0e-5}},
        "storage": {"uri": "s3://bucket/runs"},
    },
}

ANYWHERE = {"type", "description", "default", "enum", "format", "anyOf", "pattern", "required"} | {
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
}
OF_TYPE = {
    "object": {"properties", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "minItems", "maxItems", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"},
    "string": {"minLength", "maxLength"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
    None: {"maxLength"},
}
INT_OR_STRING = [{"type": "integer"}, {"type": "string"}]


def children(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    for name, child in schema.get("properties", {}).items():
        yield f"{path}.{name}", child
    if isinstance(schema.get("items"), dict):
        yield f"{path}[]", schema["items"]
    if isinstance(schema.get("additionalProperties"), dict):
        yield f"{path}[*]", schema["additionalProperties"]


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for child_path, child in children(schema, path):
        yield from nodes(child, child_path)


def faults(schema: Schema) -> list[str]:
    """What the API server would refuse in a schema (k8s.io/apiextensions-apiserver, schema/validation.go)."""
    found = [f"{path}: {fault}" for path, node in nodes(schema) for fault in node_faults(node)]
    metadata = schema.get("properties", {}).get("metadata", {"type": "object"})
    if metadata.keys() - {"type", "properties"} or metadata.get("properties", {}).keys() - {"name", "generateName"}:
        found.append(".metadata: only name and generateName may be restricted")
    if schema.get("type") != "object":
        found.append(": the root is no object")
    return found


def node_faults(node: Schema) -> Iterator[str]:
    kind, untyped = node.get("type"), bool(node.get("x-kubernetes-int-or-string"))
    if kind not in OF_TYPE:
        yield f"type {kind!r} does not exist"
        return
    if kind is None and not untyped and not node.get("x-kubernetes-preserve-unknown-fields"):
        yield "has no type"
    if strange := node.keys() - ANYWHERE - OF_TYPE[kind]:
        yield f"{sorted(strange)} not allowed on type {kind}"
    if "anyOf" in node and not (untyped and node["anyOf"] == INT_OR_STRING):
        yield "anyOf is allowed only as integer or string under int-or-string"
    if untyped and kind is not None:
        yield "int-or-string has a type"
    for bound in ("Minimum", "Maximum"):
        if f"exclusive{bound}" in node and (node[f"exclusive{bound}"] is not True or bound.lower() not in node):
            yield f"exclusive{bound} must be a boolean beside {bound.lower()}"
    yield from parent_faults(node)
    if "default" in node and list(Draft4Validator(node).iter_errors(node["default"])):
        yield f"default {node['default']!r} does not fit"
    for rule in node.get("x-kubernetes-validations", ()):
        yield from rule_faults(rule, node)


def parent_faults(node: Schema) -> Iterator[str]:
    if node.get("type") == "array" and "items" not in node:
        yield "array without items"
    if "properties" in node and "additionalProperties" in node:
        yield "properties and additionalProperties together"
    if isinstance(node.get("additionalProperties"), bool):
        yield "additionalProperties must be a schema"
    if missing := set(node.get("required", ())) - node.get("properties", {}).keys():
        yield f"requires unknown {sorted(missing)}"
    yield from list_map_faults(node)


def list_map_faults(node: Schema) -> Iterator[str]:
    keys = node.get("x-kubernetes-list-map-keys", [])
    if (node.get("x-kubernetes-list-type") == "map") != bool(keys):
        yield "list type map and its keys belong together"
    item = node.get("items", {})
    for key in keys:
        if key not in item.get("properties", {}) or key not in item.get("required", ()):
            yield f"list map key {key} is not a required field of the items"


def rule_faults(rule: Schema, node: Schema) -> Iterator[str]:
    if rule.keys() - {"rule", "message", "fieldPath"} or not rule.get("rule"):
        yield f"rule {rule} is malformed"
    if not rule.get("message") or "\n" in rule["message"] or len(rule["message"]) > 2048:
        yield f"rule {rule} needs a message of one line"
    target = node
    for name in rule.get("fieldPath", "").split(".")[1:]:
        target = target.get("properties", {}).get(name)
        if target is None:
            yield f"fieldPath {rule['fieldPath']} is no field"
            return


@pytest.fixture(scope="module")
def schema() -> Schema:
    return crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def test_schema_is_structural(schema):
    assert faults(schema) == []


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


BROKEN: dict[str, tuple[Schema, str]] = {
    "no type": (_object(a={"description": "x"}), "has no type"),
    "reference": (_object(a={"type": "object", "$ref": "#/x"}), "not allowed"),
    "title": (_object(a={"type": "string", "title": "A"}), "not allowed"),
    "const": (_object(a={"type": "string", "const": "A"}), "not allowed"),
    "prefix items": (_object(a={"type": "array", "items": {"type": "string"}, "prefixItems": []}), "not allowed"),
    "unique items": (_object(a={"type": "array", "items": {"type": "string"}, "uniqueItems": True}), "not allowed"),
    "key schema": (
        _object(a={"type": "object", "additionalProperties": {"type": "string"}, "propertyNames": {}}),
        "not allowed",
    ),
    "null": (_object(a={"type": "null"}), "does not exist"),
    "union with null": (_object(a={"type": "string", "anyOf": [{"type": "string"}, {"type": "null"}]}), "anyOf"),
    "negation": (_object(a={"type": "string", "not": {"type": "string"}}), "not allowed"),
    "deep": (_object(a={"type": "array", "items": _object(b={})}), ".a[].b: has no type"),
    "described union": (
        _object(a={"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer", "description": "x"}]}),
        "anyOf",
    ),
    "numeric exclusive": (_object(a={"type": "number", "exclusiveMinimum": 0}), "must be a boolean"),
    "exclusive alone": (_object(a={"type": "number", "exclusiveMinimum": True}), "beside minimum"),
    "typed quantity": (
        _object(a={"type": "string", "x-kubernetes-int-or-string": True, "anyOf": INT_OR_STRING}),
        "has a type",
    ),
    "closed object": ({**_object(a={"type": "string"}), "additionalProperties": False}, "together"),
    "array of nothing": (_object(a={"type": "array"}), "without items"),
    "length of a number": (_object(a={"type": "integer", "maxLength": 3}), "not allowed on type integer"),
    "unknown required": ({**_object(a={"type": "string"}), "required": ["b"]}, "requires unknown"),
    "default of another type": (_object(a={"type": "integer", "default": "x"}), "does not fit"),
    "null default": (_object(a={"type": "integer", "default": None}), "does not fit"),
    "optional map key": (
        _object(
            a={
                "type": "array",
                "items": _object(name={"type": "string"}),
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            }
        ),
        "not a required field",
    ),
    "field path": (
        {**_object(), "x-kubernetes-validations": [{"rule": "true", "message": "m", "fieldPath": ".a"}]},
        "is no field",
    ),
    "silent rule": ({**_object(), "x-kubernetes-validations": [{"rule": "true"}]}, "needs a message"),
    "metadata": (_object(metadata=_object(labels={"type": "object"})), "only name and generateName"),
    "root": ({"type": "array", "items": {"type": "string"}}, "no object"),
}


@pytest.mark.parametrize(("broken", "fault"), BROKEN.values(), ids=BROKEN)
def test_checker_finds(broken, fault):
    assert any(fault in found for found in faults(broken)), faults(broken)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (int | str, "spec.field: .* no unions"),
        (dict[str, Any], "spec.field: .* PreserveUnknown"),
        (tuple[int, str], "spec.field: .* prefixItems"),
        (set[str], "spec.field: .* uniqueItems"),
        (Annotated[int, Field(multiple_of=2)], "spec.field: .* multipleOf"),
    ],
)
def test_inexpressible_field_is_refused_by_name(annotation, message):
    generated = TypeAdapter(annotation).json_schema()
    with pytest.raises(ValueError, match=message):
        _Translation(definitions={}).structural(generated, "spec.field")


def test_defaults_stand_where_gitops_tools_see_no_drift(schema):
    defaults = {path: node["default"] for path, node in nodes(schema) if "default" in node}
    assert defaults.pop(".status") == {"observedGeneration": -1}
    assert [path for path in defaults if "[]" in path or path.startswith(".status")] == []
    assert [path for path, default in defaults.items() if isinstance(default, dict | list)] == []
    assert defaults[".spec.training.seed"] == 42


def test_default_that_is_not_set_is_told(schema):
    described = {path: node.get("description", "") for path, node in nodes(schema)}
    assert described[".spec.nodePools[].gpusPerNode"].endswith(" Default: 0.")
    assert described[".spec.nodePools[].avoidFailedNodes"].endswith(" Default: false.")
    assert described[".spec.training.optimizer.betas"].endswith(" Default: 0.9, 0.999.")


def test_every_field_of_a_spec_is_bounded_and_described(schema):
    """CEL's cost is estimated from the largest possible value: a field without a bound counts as the whole request."""
    bounds = {"string": "maxLength", "array": "maxItems"}
    spec = schema["properties"]["spec"]
    unbounded = [
        path
        for path, node in nodes(spec)
        if (bound := bounds.get(node.get("type", ""))) and bound not in node and "enum" not in node
    ]
    unbounded += [path for path, node in nodes(spec) if "additionalProperties" in node and "maxProperties" not in node]
    assert unbounded == []
    assert [path for path, node in nodes(spec) if not node.get("description") and path[-1] not in "]"] == []


def test_size_leaves_room_in_the_annotation_of_kubectl():
    assert len(CRD_FILE.read_bytes()) < SIZE_LIMIT
    assert len(json.dumps(crd(), indent=2).encode()) < SIZE_LIMIT


def test_names_and_columns():
    spec = crd()["spec"]
    assert crd()["metadata"]["name"] == f"{spec['names']['plural']}.{spec['group']}"
    version = spec["versions"][0]
    fields = {path for path, _ in nodes(version["schema"]["openAPIV3Schema"])}
    for column in version["additionalPrinterColumns"]:
        path = re.sub(r"\[\?\(.*?\)\]", "[]", column["jsonPath"])
        assert path in fields | {".metadata.creationTimestamp"}, column["name"]


def test_marked_fields(schema):
    spec = schema["properties"]["spec"]["properties"]
    pool = spec["nodePools"]["items"]["properties"]
    assert spec["nodePools"]["x-kubernetes-list-map-keys"] == ["name"]
    assert pool["podTemplate"]["x-kubernetes-preserve-unknown-fields"] is True
    assert pool["resources"]["properties"]["limits"]["additionalProperties"]["x-kubernetes-int-or-string"] is True
    assert spec["training"]["properties"]["optimizer"]["properties"]["learningRate"]["exclusiveMinimum"] is True
    assert spec["deepspeed"]["properties"]["stage"]["enum"] == [3]
    times = schema["properties"]["status"]["properties"]["startTime"]
    assert (times["type"], times["format"]) == ("string", "date-time")


def test_generated_files_are_fresh():
    assert stale_files(ROOT) == [], "run `python -m dsft_api.generate`"


def test_check_names_the_stale_file(tmp_path, capsys):
    assert main(["--repository", str(tmp_path)]) == 0
    assert main(["--repository", str(tmp_path), "--check"]) == 0
    (tmp_path / "docs" / "reference" / "api.md").write_text("old")
    capsys.readouterr()
    assert main(["--repository", str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().err.split(" is stale")[0] == "docs/reference/api.md"
    for file in ("docs/reference/reasons.md", "crds/dsft.dev_deepspeedfinetunes.yaml"):
        assert "Generated by `python -m dsft_api.generate`" in (tmp_path / file).read_text().splitlines()[0]


def strict(schema: Schema) -> Schema:
    """As `kubectl apply` reads it: an unknown field is an error unless the field is free-form."""
    schema = copy.deepcopy(schema)
    for _, node in nodes(schema):
        if "properties" in node:
            node["additionalProperties"] = False
    return schema


def defaulted(document: Any, schema: Schema) -> Any:
    """The document as the API server stores it: defaults set below every object that is there."""
    if isinstance(document, list):
        return [defaulted(item, schema["items"]) for item in document]
    if not isinstance(document, dict) or "properties" not in schema:
        return document
    defaults = {key: child["default"] for key, child in schema["properties"].items() if "default" in child}
    known = schema["properties"]
    return {key: defaulted(value, known.get(key, {})) for key, value in {**defaults, **document}.items()}


def examples() -> list[Any]:
    return [
        pytest.param(document, id=f"{path.stem}-{number}")
        for path in sorted((ROOT / "examples").rglob("*.yaml"))
        # Helm's templates and Kustomize's patches are rendered first, by tests/charts and tests/apiserver.
        if not {"templates", "overlays"} & {*path.parts}
        for number, document in enumerate(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        if document and document.get("kind") == "DeepSpeedFineTune"
    ]


def test_there_are_examples():
    assert examples()


@pytest.mark.parametrize("document", examples())
def test_example_is_valid_by_model_and_by_crd(document, schema):
    resource = DeepSpeedFineTune.model_validate(document, extra="forbid")
    Draft4Validator(strict(schema)).validate(document)
    stored = defaulted(document, schema)
    Draft4Validator(strict(schema)).validate(stored)
    assert spec_hash(DeepSpeedFineTune.model_validate(stored).spec) == spec_hash(resource.spec)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "model", "task"), "translation"),
        (("spec", "model", "name"), "unknown field"),
        (("spec", "training", "optimizer", "learningRate"), 0),
        (("spec", "training", "optimizer", "betas"), [0.9]),
        (("spec", "storage"), {"uri": "/no/scheme"}),
        (("spec", "nodePools"), [{"nodes": 2}]),
        (("spec", "nodePools"), [{"name": "a", "resources": {"limits": {"cpu": "two"}}}]),
    ],
)
def test_bad_value_is_refused_by_model_and_by_crd(path, value, schema):
    bad = copy.deepcopy(MANIFEST)
    parent = bad
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = value
    assert list(Draft4Validator(strict(schema)).iter_errors(bad))
    with pytest.raises(ValueError, match=path[-1]):
        DeepSpeedFineTune.model_validate(bad, extra="forbid")


def test_same_name_twice_is_refused_by_the_model():
    bad = copy.deepcopy(MANIFEST)
    bad["spec"]["nodePools"] = [{"name": "a"}, {"name": "a"}]
    with pytest.raises(ValueError, match="name 'a' is used more than once"):
        DeepSpeedFineTune.model_validate(bad)


def test_live_status_of_a_new_resource_parses(schema):
    stored = defaulted(MANIFEST, schema)
    resource = DeepSpeedFineTune.model_validate(stored)
    assert isinstance(resource.status, ApiModel)
    assert resource.status.observed_generation == -1


def test_small_manifest_is_valid(schema):
    """What the tests of bad values start from is itself good."""
    Draft4Validator(strict(schema)).validate(MANIFEST)
    DeepSpeedFineTune.model_validate(MANIFEST, extra="forbid")
