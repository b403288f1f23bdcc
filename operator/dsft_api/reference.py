"""The reference pages, rendered from what the API server and the trainer go by: the generated CRD and the conditions.

Markdown for GitHub. One section per object of the resource, in manifest order.
"""

import json
from collections.abc import Iterator
from typing import Any

from dsft_api.conditions import FAILURES, WAITS, ExitCode

Schema = dict[str, Any]

_API_INTRO = """\
# API reference

{description} API version `{api_version}`, kind `{kind}`, short name `{short}`.
A field without a default is optional and absent unless "required". `kubectl explain {short}.spec` tells the same.
"""

_REASONS = """\
# Why a run failed, and what to do

The failure class is the reason of condition `Succeeded`, and `class` in `status.attempts`. A retried class starts the
next attempt by itself, as often as `spec.retry.limit` allows without progress. One that is not retried waits for you:
do what the table says, then set a new `spec.retry.token` (or call `dsft run` again). Either way the run goes on from
its last committed checkpoint.

| Failure class | Exit code | Retried | What to do |
|---|---|---|---|
{failures}

## Why a run waits

The reason of condition `ClusterReady` while it is False. The message says which pool, how many pods are short, and the words
of the scheduler, the image puller, Kueue or Ray. A wait ends with the deadline in `spec.deadlines`, where one is set: the run
is then Failed with class `QueueTimeout` or `ProvisionTimeout`, its message names this reason and its words, and the nodes are
freed. A run that never came to an attempt has none in `status.attempts`.

| Reason | What to do |
|---|---|
{waits}

## Exit codes

Of the trainer, and of `dsft run`.

| Exit code | Meaning | Failure classes |
|---|---|---|
{exit_codes}
"""


def api_reference(crd: dict[str, Any]) -> str:
    """Render every object of the resource as a section with a table of its fields."""
    version, names = crd["spec"]["versions"][0], crd["spec"]["names"]
    root: Schema = version["schema"]["openAPIV3Schema"]
    intro = _API_INTRO.format(
        description=root["description"],
        api_version=f"{crd['spec']['group']}/{version['name']}",
        kind=names["kind"],
        short=names["shortNames"][0],
    )
    return intro + "".join(_section(path, schema) for path, schema in _objects(root, names["kind"]))


def reasons_reference() -> str:
    """Render the troubleshooting table: failure class, exit code, whether it is retried, what to do."""
    failures = [
        f"| `{name}` | {failure.exit_code.value} | {'yes' if failure.retried else 'no'} | {_cell(failure.remedy)} |"
        for name, failure in FAILURES.items()
    ]
    waits = [f"| `{reason}` | {_cell(remedy or 'nothing: it passes')} |" for reason, remedy in WAITS.items()]
    return _REASONS.format(
        failures="\n".join(failures), waits="\n".join(waits), exit_codes="\n".join(map(_exit_code, ExitCode))
    )


def _exit_code(code: ExitCode) -> str:
    classes = ", ".join(f"`{name}`" for name, failure in FAILURES.items() if failure.exit_code is code)
    return f"| {code.value} | {code.name.lower().replace('_', ' ')} | {classes} |"


def _objects(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Yield every object that has fields of its own, parents first."""
    if "properties" in schema:
        yield path, schema
        for name, child in schema["properties"].items():
            yield from _objects(child, _child_path(path, name))
    elif "items" in schema:
        yield from _objects(schema["items"], f"{path}[]")


def _section(path: str, schema: Schema) -> str:
    required: list[str] = schema.get("required", [])
    rows = [
        f"| `{name}` | {_type(child, _child_path(path, name))} | {_default(child, required=name in required)} "
        f"| {_cell(child.get('description', 'Standard object metadata.'))} |"
        for name, child in schema["properties"].items()
    ]
    lines = [f"\n## {path}\n", schema.get("description", ""), "", "| Field | Type | Default | Description |"]
    lines += ["|---|---|---|---|", *rows]
    if rules := schema.get("x-kubernetes-validations"):
        lines += ["", "Also checked:", "", *(f"- {rule['message']}" for rule in rules)]
    return "\n".join(lines) + "\n"


def _child_path(path: str, name: str) -> str:
    # The root goes by its kind, which stands in no field's path.
    return name if path[0].isupper() else f"{path}.{name}"


def _type(schema: Schema, path: str) -> str:
    if "items" in schema:
        return f"list of {_type(schema['items'], f'{path}[]')}{_size(schema, 'Items')}"
    if "additionalProperties" in schema:
        return f"map of {_type(schema['additionalProperties'], path)}"
    if "properties" in schema:
        anchor = "".join(char for char in path.lower() if char.isalnum())
        return f"[object](#{anchor})"
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return "free-form object"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind = "time" if schema.get("format") == "date-time" else schema["type"]
    return f"{kind}{_range(schema)}"


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    parts: list[str] = []
    if low is not None:
        parts.append(f"above {low}" if schema.get("exclusiveMinimum") else f"at least {low}")
    if high is not None:
        parts.append(f"below {high}" if schema.get("exclusiveMaximum") else f"at most {high}")
    return "".join(f", {part}" for part in parts)


def _size(schema: Schema, of: str) -> str:
    low, high = schema.get(f"min{of}"), schema.get(f"max{of}")
    if low is not None and low == high:
        return f", exactly {low}"
    return "".join(f", {word} {size}" for word, size in (("at least", low), ("at most", high)) if size is not None)


def _default(schema: Schema, *, required: bool) -> str:
    if required:
        return "required"
    if "default" not in schema:
        return ""
    default = schema["default"]
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
