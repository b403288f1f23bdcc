"""Pydantic's errors in the words of the people who write manifests."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dsft_api.base import QUANTITY_PATTERN, ApiModel
from dsft_api.problem import Path
from dsft_api.resource import DeepSpeedFineTune
from dsft_api.spec.identity import TARGETS_PATTERN

_NAME = "lower-case letters, digits and '-', starting and ending with a letter or digit"

# What each pattern of the models asks for. A test compares the keys with the models.
PATTERNS: dict[str, tuple[str, str]] = {
    r"^[a-z]([-a-z0-9]*[a-z0-9])?$": (
        "is no valid name of a run",
        "use lower-case letters, digits and '-', starting with a letter, 40 characters at most",
    ),
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": ("is no valid name", f"use {_NAME}"),
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$": ("is no valid name of a Kubernetes object", f"use {_NAME}; '.' is allowed"),
    r"^[a-z][a-z0-9+.-]*://.+$": ("is no URI", "write SCHEME://PLACE, such as hf://ORG/NAME or s3://BUCKET/PATH"),
    r"^https?://[^/@$\s]+(/[^$\s]*)?$": ("is no endpoint", "write https://HOST:PORT, without user name and password"),
    r"^https?://[^/@$\s]+/[^?#$\s]+$": (
        "is no URL of a Git repository",
        "write https://HOST/PATH, without user name and password",
    ),
    r"^[a-zA-Z0-9-]+$": ("is no region", "write a name such as eu-central-1"),
    r"^[-._a-zA-Z0-9]+$": ("is no key of a Secret or ConfigMap", "use letters, digits, '-', '_' and '.'"),
    r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$": ("is no name of a repository on the Hub", "write ORG/NAME"),
    r"^/.+": ("is no absolute path", "write /FOLDER"),
    r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$": ("names no function", "write MODULE:FUNCTION, such as my_package.train:main"),
    r"^(s3|file)://.+\.(tar\.gz|tgz|zip)$": (
        "is no archive in storage",
        "write s3://BUCKET/PATH or file:///PATH of a .tar.gz, .tgz or .zip",
    ),
    r"^sha256:[0-9a-f]{64}$": ("is no digest", "write sha256: and the 64 digits that sha256sum tells"),
    r"^[0-9a-f]{40}$": ("is no id of a commit", "write the 40 digits that git rev-parse tells"),
    r"^[A-Za-z_][A-Za-z0-9_]*$": (
        "is no valid name of an environment variable",
        "use letters, digits and '_', not starting with a digit",
    ),
    TARGETS_PATTERN: ("names no modules", "write all-linear, or names separated by commas, such as q_proj,v_proj"),
    QUANTITY_PATTERN: ("is no Kubernetes quantity", "write a number with a unit, such as 8, 500m or 64Gi"),
}

_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}

_KINDS = {
    "int_type": ("must be a whole number", "write digits without quotes or a decimal point"),
    "int_from_float": ("must be a whole number", "write digits without quotes or a decimal point"),
    "float_type": ("must be a number", "write a number without quotes"),
    "finite_number": ("must be a finite number", "write a number"),
    "bool_type": ("must be true or false", "write true or false without quotes"),
    "model_type": ("must be a mapping", "write its fields below it, indented, as NAME: VALUE"),
    "dict_type": ("must be a mapping", "write NAME: VALUE below it, indented"),
    "tuple_type": ("must be a list", "write its items below it, each after '- '"),
    "list_type": ("must be a list", "write its items below it, each after '- '"),
}


@dataclass(frozen=True)
class Words:
    """What is wrong, and what to write instead."""

    message: str
    remedy: str


def words(error: ErrorDetails, path: Path) -> Words:
    """Say an error of pydantic about the field at `path` as a user would."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return _missing(path)
    if kind == "extra_forbidden":
        return _unknown(path)
    if kind == "json_invalid":
        return Words("holds text that is no valid Unicode", "remove escapes such as \\ud800")
    if kind == "value_error":
        message, _, remedy = str(context["error"]).rpartition("; ")
        return Words(message or "its fields contradict each other, or one is missing", remedy)
    if error["input"] is None:
        return Words("is empty", "give it a value, or remove it")
    if kind == "literal_error":
        return _not_listed(error["input"], str(context["expected"]))
    if kind in _BOUNDS:
        key, bound = _BOUNDS[kind]
        return Words(
            f"must be {bound} {_number(context[key])}", f"write a number that is {bound} {_number(context[key])}"
        )
    if kind in _KINDS:
        return Words(*_KINDS[kind])
    if kind == "string_type":
        return Words("must be text", "put it in quotes")
    if kind == "string_pattern_mismatch":
        return Words(*PATTERNS[context["pattern"]])
    if kind in ("string_too_long", "too_long", "too_short"):
        return _length(kind, context)
    return Words(error["msg"], "see the API reference for what this field takes")


def nearest(name: str, path: Path) -> str | None:
    """The known field of the object at `path` that `name` was probably meant to be."""
    known = {_folded(field): field for field in fields_at(path)}
    near = get_close_matches(_folded(name), known, n=1, cutoff=0.7)
    return known[near[0]] if near else None


def fields_at(path: Path) -> Mapping[str, FieldInfo]:
    """The fields, by wire name, of the object at a path of the resource; none where any key may stand."""
    model: type[ApiModel] | None = DeepSpeedFineTune
    for part in path:
        if isinstance(part, int):
            continue
        found = wire_fields(model).get(part) if model else None
        model = submodel(found.annotation) if found else None
    return wire_fields(model) if model else {}


def wire_fields(model: type[ApiModel]) -> dict[str, FieldInfo]:
    """The fields of a model by wire name."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def submodel(annotation: object) -> type[ApiModel] | None:
    """The model in an annotation such as `tuple[NodePool, ...] | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, ApiModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := submodel(part))), None)


def _missing(path: Path) -> Words:
    name = path[-1]
    info = fields_at(path[:-1]).get(str(name))
    description = f": {info.description}" if info and info.description else ""
    return Words("is missing", f"add {name}{description}")


def _unknown(path: Path) -> Words:
    name, parent = str(path[-1]), path[:-1]
    if meant := nearest(name, parent):
        return Words(f"unknown field; did you mean {meant}?", f"rename it to {meant}")
    if homes := _homes().get(_folded(name)):
        return Words("unknown field here", f"it belongs to {' or '.join(homes)}")
    return Words("unknown field", f"remove it; known here: {', '.join(sorted(fields_at(parent)))}")


@cache
def _homes() -> Mapping[str, list[str]]:
    """For each field of the spec that stands in at most three places: where."""
    homes: dict[str, list[str]] = {}
    for parent, name in _all_fields(DeepSpeedFineTune.model_fields["spec"].annotation, "spec"):
        homes.setdefault(_folded(name), []).append(parent)
    return {name: parents for name, parents in homes.items() if len(parents) <= 3}


def _all_fields(annotation: object, path: str) -> Iterator[tuple[str, str]]:
    model = submodel(annotation)
    for name, info in (wire_fields(model) if model else {}).items():
        yield path, name
        yield from _all_fields(info.annotation, f"{path}.{name}")


def _not_listed(value: object, expected: str) -> Words:
    """`expected` is pydantic's list: "'a', 'b' or 'c'"."""
    choices = [choice.strip("'") for choice in expected.replace(" or ", ", ").split(", ")]
    near = get_close_matches(str(value).casefold(), choices, n=1, cutoff=0.7)
    remedy = f"write {near[0]}" if near else f"use {' or '.join(choices)}"
    return Words(f"must be one of {', '.join(choices)}" if len(choices) > 1 else f"must be {choices[0]}", remedy)


def _length(kind: str, context: Mapping[str, Any]) -> Words:
    what = "characters" if kind == "string_too_long" else "items"
    if kind == "too_short":
        return Words("has too few items", f"give it {context['min_length']} {what} at least")
    return Words("is too long", f"use {context['max_length']} {what} at most")


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _folded(name: str) -> str:
    """numLabels, num_labels and NumLabels alike."""
    return name.replace("_", "").replace("-", "").casefold()
