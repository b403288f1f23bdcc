"""The CustomResourceDefinition, derived from the pydantic models.

pydantic writes JSON Schema 2020-12; the API server takes only a structural schema, an OpenAPI v3 subset that is typed
at every node and has no references, unions or free keywords. What cannot be translated is an error, never dropped.
https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic.alias_generators import to_camel

from dsft_api import GROUP, KIND, PLURAL, SHORT_NAME, VERSION
from dsft_api.base import Rule
from dsft_api.conditions import Phase
from dsft_api.resource import DeepSpeedFineTune
from dsft_api.spec import IDENTITY_FIELDS, PLACEMENT_FIELDS

Schema = dict[str, Any]

# These mean the same on both sides.
_SHARED = frozenset(
    {"type", "format", "pattern", "enum", "required", "minimum", "maximum"}
    | {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
    | {"x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations"}
    | {"x-kubernetes-list-type", "x-kubernetes-list-map-keys"}
)
_TRANSLATED = frozenset(
    {"description", "default", "const", "exclusiveMinimum", "exclusiveMaximum"}
    | {"properties", "items", "additionalProperties", "anyOf"}
)
# Titles are noise; the names of a map's keys cannot be constrained in a structural schema.
_LEFT_OUT = frozenset({"title", "propertyNames"})

_COLUMNS = {
    "Phase": ("string", ".status.phase"),
    "Ready": ("string", '.status.conditions[?(@.type=="Ready")].status'),
    "Step": ("integer", ".status.progress.step"),
    "Total": ("integer", ".status.progress.totalSteps"),
    "Attempt": ("integer", ".status.attempt"),
    "Age": ("date", ".metadata.creationTimestamp"),
}
_WIDE_COLUMNS = {
    "Model": ("string", ".spec.model.uri"),
    "Checkpoint": ("integer", ".status.checkpoints.latest.step"),
    "Goodput": ("number", ".status.usage.goodput"),
    "Message": ("string", ".status.message"),
}

# In these nothing runs on the pools, the image and the environment, so they may be replaced.
_OPEN_PHASES = [Phase.PENDING.value, Phase.QUEUED.value, Phase.SUSPENDED.value, Phase.FAILED.value]


def crd() -> dict[str, Any]:
    """Build the CustomResourceDefinition of DeepSpeedFineTune, as JSON values, fields in the order of the models.

    Raises ValueError, naming the field, for a model that a structural schema cannot express.
    """
    # No selectableFields: the one candidate, status.phase, is a printed summary that clients should not decide by.
    version: dict[str, Any] = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _resource_schema()},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            *({"name": name, "type": kind, "jsonPath": path} for name, (kind, path) in _COLUMNS.items()),
            *(
                {"name": name, "type": kind, "jsonPath": path, "priority": 1}
                for name, (kind, path) in _WIDE_COLUMNS.items()
            ),
        ],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": [SHORT_NAME],
                "categories": ["ml"],
            },
            "scope": "Namespaced",
            "versions": [version],
        },
    }


def freeze_rules() -> tuple[Rule, ...]:
    """Return the transition rules: identity is frozen once the run began, placement while it has nodes or they are coming.

    They stand at the root, where `oldSelf.status` can be read, and compare presence too: a rule on the field itself is
    not asked when the field is added or removed. Free-form parts (`program.config`) are compared as a whole.
    """
    return (
        *(
            _unchanged(
                to_camel(field),
                unless="!has(oldSelf.status.attempt) || oldSelf.status.attempt == 0",
                message="is frozen once the run began; make a new resource",
            )
            for field in IDENTITY_FIELDS
        ),
        *(
            _unchanged(
                to_camel(field),
                unless=f"!has(oldSelf.status.phase) || oldSelf.status.phase in {_OPEN_PHASES}",
                message=f"may change only while the run is {', '.join(_OPEN_PHASES[:-1])} or {_OPEN_PHASES[-1]}; "
                "set spec.suspend to true, and change it in phase Suspended",
            )
            for field in PLACEMENT_FIELDS
        ),
    )


def _unchanged(field: str, *, unless: str, message: str) -> Rule:
    return Rule(
        f"!has(oldSelf.status) || {unless} || "
        f"(has(self.spec.{field}) == has(oldSelf.spec.{field}) && "
        f"(!has(self.spec.{field}) || self.spec.{field} == oldSelf.spec.{field}))",
        f"spec.{field} {message}",
        f".spec.{field}",
    )


def _resource_schema() -> Schema:
    generated = DeepSpeedFineTune.model_json_schema(by_alias=True)
    parts = generated["properties"]
    translate = _Translation(definitions=generated["$defs"])
    status = replace(translate, defaults="omit").structural(parts["status"], "status")
    return {
        "type": "object",
        "description": generated["description"],
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": parts["apiVersion"]["description"]},
            "kind": {"type": "string", "description": parts["kind"]["description"]},
            # The API server has its own schema for metadata and allows no other here.
            "metadata": {"type": "object"},
            "spec": translate.structural(parts["spec"], "spec"),
            # kstatus takes a resource without status for done; so it waits until the operator has seen it.
            "status": {**status, "default": {"observedGeneration": -1}},
        },
        "x-kubernetes-validations": [
            *generated["x-kubernetes-validations"],
            *(rule.to_wire() for rule in freeze_rules()),
        ],
    }


@dataclass(frozen=True)
class _Translation:
    """From pydantic's JSON Schema to a structural one.

    `defaults` says what becomes of a model's default: `set` in the schema; only `tell` it in the description, inside
    list items, where a set default shows up as drift in GitOps tools; `omit` it, in status, which only we write.
    """

    definitions: Mapping[str, Schema]
    defaults: Literal["set", "tell", "omit"] = "set"

    def structural(self, generated: Schema, path: str) -> Schema:
        node = self._resolved(generated)
        if unknown := node.keys() - _SHARED - _TRANSLATED - _LEFT_OUT:
            raise ValueError(f"{path}: a structural schema has no {', '.join(sorted(unknown))}; change the model")
        schema: Schema = {key: _number(value) for key, value in node.items() if key in _SHARED}
        if "const" in node:
            schema["enum"] = [node["const"]]
        for bound in ("Minimum", "Maximum"):
            if (limit := node.get(f"exclusive{bound}")) is not None:
                schema |= {bound.lower(): _number(limit), f"exclusive{bound}": True}
        if "anyOf" in node:
            if not node.get("x-kubernetes-int-or-string"):
                raise ValueError(f"{path}: a structural schema has no unions; give the field one type")
            schema["anyOf"] = node["anyOf"]
        # The values of a map and the items of a list have nothing to say of their own.
        described = self._described(node) if "description" in node or "default" in node else {}
        return schema | described | self._children(node, path)

    def _children(self, node: Schema, path: str) -> Schema:
        children: Schema = {}
        if "properties" in node:
            children["properties"] = {
                name: self.structural(child, f"{path}.{name}") for name, child in node["properties"].items()
            }
        if "items" in node:
            quiet = "tell" if self.defaults == "set" else self.defaults
            children["items"] = replace(self, defaults=quiet).structural(node["items"], f"{path}[]")
        if "additionalProperties" in node:
            if isinstance(node["additionalProperties"], bool):
                raise ValueError(f"{path}: mark a free-form object with PreserveUnknown")
            children["additionalProperties"] = self.structural(node["additionalProperties"], f"{path}[*]")
        return children

    def _described(self, node: Schema) -> Schema:
        """Return the description and the default, the latter as a keyword only where it is a scalar and may be set."""
        description, default = node.get("description", ""), node.get("default")
        if default in (None, [], {}) or self.defaults == "omit":
            return {"description": description}
        if self.defaults == "set" and not isinstance(default, list | dict):
            return {"description": description, "default": _number(default)}
        text = default if isinstance(default, str) else json.dumps(default).strip("[]")
        return {"description": f"{description} Default: {text}." if text else description}

    def _resolved(self, node: Schema) -> Schema:
        """Put what a reference or an `anyOf [X, null]` stands for in its place; the field's own keywords win."""
        own = {key: value for key, value in node.items() if key not in ("$ref", "anyOf")}
        if "$ref" in node:
            target = self.definitions[node["$ref"].removeprefix("#/$defs/")]
            return self._resolved({**target, **own, **_told(own, target)})
        options = [option for option in node.get("anyOf", ()) if option != {"type": "null"}]
        if len(options) == 1:
            return self._resolved({**options[0], **own})
        return node


def _told(field: Schema, model: Schema) -> Schema:
    """Join what the field and its object's model say, unless one contains the other."""
    said = [" ".join(part.get("description", "").split()) for part in (field, model)]
    if model.get("type") != "object":
        return {"description": said[0] or said[1]}
    short, long = sorted(said, key=len)
    return {"description": long if short.rstrip(".").lower() in long.lower() else " ".join(said)}


def _number(value: object) -> object:
    """Spell a whole float as the integer that the API server stores."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
