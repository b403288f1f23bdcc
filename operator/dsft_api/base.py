"""The base of every API model, and the markers that the CRD generator reads from them.

One declaration serves three readers: pydantic (validation here), the CRD (validation by the API server) and
the API reference. So a rule that a schema cannot say is written twice side by side: as a `model_validator` and as
a CEL `Rule` on the class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class Rule:
    """One `x-kubernetes-validations` entry: a CEL expression over `self`, and what the user is told."""

    cel: str
    message: str
    field_path: str | None = None

    def to_wire(self) -> dict[str, str]:
        """Spell the rule as the API server reads it."""
        wire = {"rule": self.cel, "message": self.message}
        return wire | {"fieldPath": self.field_path} if self.field_path else wire


class ApiModel(BaseModel):
    """A part of the resource: camelCase on the wire, snake_case here, immutable.

    Unknown fields are ignored when a live object is parsed, since a newer CRD must not break an older operator;
    manifests are parsed with `extra="forbid"` (see `dsft_api.manifest`).
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        validate_default=True,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()

    @property
    def asked(self) -> frozenset[str]:
        """Fields that were given another value than their default.

        One that equals its default asks for nothing: the API server writes the defaults into every live object.
        """
        fields = type(self).model_fields
        return frozenset(name for name in self.model_fields_set if getattr(self, name) != fields[name].default)

    def to_wire(self) -> dict[str, Any]:
        """The JSON form: camelCase keys, absent instead of null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler.resolve_ref_schema(handler(schema))
        if cls.rules:
            json_schema["x-kubernetes-validations"] = [rule.to_wire() for rule in cls.rules]
        return json_schema


@dataclass(frozen=True)
class PreserveUnknown:
    """Marks a free-form object: the API server keeps what it does not know (`x-kubernetes-preserve-unknown-fields`)."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


@dataclass(frozen=True)
class ListMap:
    """Marks a list whose items are merged by key under server-side apply (`x-kubernetes-list-type: map`).

    The API server refuses two items with the same key, so the model does too.
    """

    key: str = "name"

    def __get_pydantic_core_schema__(self, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._unique, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [self.key]}

    def _unique(self, items: Sequence[ApiModel]) -> Sequence[ApiModel]:
        values = [getattr(item, self.key) for item in items]
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{self.key} {value!r} is used more than once; give each item its own")
        return items


@dataclass(frozen=True)
class IntOrString:
    """Marks a Kubernetes quantity (`x-kubernetes-int-or-string`)."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # A structural schema allows no keyword but the type inside this anyOf; the string's own go beside it.
        options: list[JsonSchemaValue] = handler(schema)["anyOf"]
        limits = {key: value for option in options for key, value in option.items() if key != "type"}
        return {**limits, "anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}


# What k8s.io/apimachinery resource.Quantity can read. The pattern of its own schemas lets more pass, such as 1e1.5, and one such
# RayCluster would keep KubeRay from reading all others.
QUANTITY_PATTERN = r"^\+?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?[0-9]{1,2}))?$"
ConfigKey = Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)]

Quantity = Annotated[int | Annotated[str, Field(pattern=QUANTITY_PATTERN, max_length=32)], IntOrString()]
DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
LabelValue = Annotated[str, Field(max_length=63)]
Labels = Annotated[Mapping[Annotated[str, Field(max_length=316)], LabelValue], Field(max_length=32)]
Uri = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://.+$", max_length=1024)]
FreeForm = Annotated[dict[str, Any], PreserveUnknown()]
