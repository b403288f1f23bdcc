"""Text -> a resource that can be run, or every problem of it at once, each with its line and what to write instead.

Stricter than the API server on what is unknown (refused, not dropped) and as strict on types (no "3" for 3): what
passes here applies there.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails

from dsft_api import API_VERSION, KIND
from dsft_api.checks import check
from dsft_api.plain_secrets import redacted
from dsft_api.problem import ManifestError, Path, Problem, field_name, path_of
from dsft_api.resource import DeepSpeedFineTune
from dsft_api.spec import FineTuneSpec
from dsft_api.wording import nearest, words
from dsft_api.yaml_source import read_yaml

__all__ = ["ManifestError", "Problem", "parse"]

# ObjectMeta of apimachinery v1, but for what Metadata reads and generateName. Of no effect here.
_OTHER_METADATA = (
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
)

# Errors whose input is more than one value, or one of an unknown field, which may be a secret.
_UNTOLD = ("missing", "extra_forbidden", "value_error", "json_invalid")


def parse(text: str, source: str = "manifest") -> DeepSpeedFineTune:
    """Read one manifest. Pure: nothing is fetched or opened; `source` only names the text in errors.

    `status` is ignored, as the API server does, so the output of `kubectl get -o yaml` can be read too.

    Raises:
        ManifestError: with all problems, if the text is no YAML, does not fit the schema, contradicts itself, holds a
            secret, or asks for what is not built yet.
    """
    document = read_yaml(text)
    judgement = _Judgement()
    problems = [*document.problems]
    if document.readable:
        problems += judgement.judge(document.value)
    located = (replace(problem, line=problem.line or document.line(path_of(problem.field))) for problem in problems)
    ordered = tuple(sorted(located, key=lambda problem: problem.line or 0))
    if judgement.resource is None or ordered:
        raise ManifestError(source, ordered)
    return judgement.resource


class _AnySections(FineTuneSpec):
    """A spec of which sections may be missing, so that the rest can be checked all the same."""

    @model_validator(mode="after")
    def _program_or_builtin(self) -> Self:
        return self


class _Incomplete(DeepSpeedFineTune):
    # Narrower than in the parent, which is sound for a frozen model.
    spec: _AnySections  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass
class _Judgement:
    """Finds every problem of a document: what does not fit the schema is reported, cut out, and the rest is judged."""

    resource: DeepSpeedFineTune | None = None
    problems: dict[tuple[str, str], Problem] = field(default_factory=dict[tuple[str, str], Problem])
    # Paths that were cut out, or whose absence another problem explains: what follows from that is not reported.
    explained: set[Path] = field(default_factory=set[Path])

    def judge(self, value: object) -> list[Problem]:
        if not isinstance(value, dict):
            return [Problem("manifest", "is no mapping", "start with apiVersion, kind, metadata and spec")]
        document = cast("dict[str, Any]", value)
        header = list(_header_problems(document))
        if len(header) == 2:
            return header
        body = {**document, "apiVersion": API_VERSION, "kind": KIND}
        body.pop("status", None)
        body["metadata"] = self._without_other_metadata(document.get("metadata"))
        self._judge_body(json.loads(json.dumps({key: part for key, part in body.items() if part is not None})))
        return [*header, *self.problems.values()]

    def _without_other_metadata(self, metadata: object) -> object:
        if not isinstance(metadata, dict):
            return metadata
        meta = cast("dict[str, object]", metadata)
        if "generateName" in meta:
            self._report(
                Problem("metadata.generateName", "needs an API server to make up a name", "write name instead")
            )
            self.explained.add(("metadata", "name"))
        return {key: value for key, value in meta.items() if key not in (*_OTHER_METADATA, "generateName")}

    def _judge_body(self, body: dict[str, Any]) -> None:
        model: type[DeepSpeedFineTune] = DeepSpeedFineTune
        while self.resource is None:
            try:
                self.resource = _validated(model, body)
            except ValidationError as error:
                errors = {_path(item["loc"], item["type"], body): item for item in error.errors()}
                self._report_errors(errors)
                for path, item in errors.items():
                    if path == ("spec",) and item["type"] == "value_error":
                        model = _Incomplete
                    elif path in ((), ("spec",)):
                        return
                    else:
                        self._cut(body, path[:-1] if item["type"] == "missing" and len(path) > 1 else path)
        for problem in check(self.resource):
            path = path_of(problem.field)
            if not any(gone[: len(path)] == path for gone in self.explained):
                self._report(problem)

    def _report(self, problem: Problem) -> None:
        self.problems.setdefault((problem.field, problem.message), redacted(problem))

    def _report_errors(self, errors: Mapping[Path, ErrorDetails]) -> None:
        for path, error in errors.items():
            if error["type"] == "extra_forbidden" and (meant := nearest(str(path[-1]), path[:-1])):
                self.explained.add((*path[:-1], meant))
        for path, error in errors.items():
            kind = error["type"]
            if kind == "missing" and path in self.explained:
                continue
            if kind == "value_error" and any(gone[:-1] == path for gone in self.explained):
                continue
            said = words(error, path)
            untold = kind in _UNTOLD or not isinstance(error["input"], str | int | float)
            self._report(Problem(field_name(path), said.message, said.remedy, None if untold else error["input"]))

    def _cut(self, body: dict[str, Any], path: Path) -> None:
        """Take a part out. A list item takes its list along, since the places of the other items would change."""
        if path[0] == "metadata":
            body["metadata"] = {"name": "unnamed"}
            return
        while isinstance(path[-1], int):
            path = path[:-1]
        self.explained.add(path)
        parent: Any = body
        for part in path[:-1]:
            if part not in parent and not isinstance(part, int):
                return
            parent = parent[part]
        parent.pop(path[-1], None)


def _validated(model: type[DeepSpeedFineTune], body: Mapping[str, Any]) -> DeepSpeedFineTune:
    # As JSON: strict mode then takes lists for tuples, and nothing else for anything else.
    return model.model_validate_json(json.dumps(body), strict=True, extra="forbid", by_alias=True, by_name=False)


def _header_problems(document: Mapping[str, object]) -> Iterator[Problem]:
    for key, right in (("apiVersion", API_VERSION), ("kind", KIND)):
        value = document.get(key)
        if value is None:
            yield Problem(key, "is missing", f"write {key}: {right}")
        elif value != right:
            yield Problem(
                key, "is not what dsft runs", f"write {key}: {right}", value if isinstance(value, str) else None
            )


def _path(location: tuple[str | int, ...], kind: str, body: Mapping[str, Any]) -> Path:
    """Where an error is. Pydantic also names the branches of a union; the document does not."""
    path: list[str | int] = []
    here: Any = body
    for part in location:
        try:
            here = here[part]
        except (KeyError, TypeError):
            continue
        path.append(part)
    return (*path, location[-1]) if kind == "missing" else tuple(path)
