"""Secrets in plain text, where everyone who may read the resource reads them (design law 5): in a manifest, in what a run tells.

Found by the name of an environment variable and by the shape of any value. What is found is never repeated.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from dsft_api.problem import Path, Problem, field_name
from dsft_api.resource import DeepSpeedFineTune

REDACTED = "[redacted]"
# Of anything shorter the text would be full by chance.
SHORTEST_SECRET = 8

_TELLING_NAME = re.compile(r"(^|_)(TOKEN|KEY|KEY_ID)$|SECRET|PASSWORD|PASSWD", re.IGNORECASE)
_TELLING_SHAPES: dict[str, re.Pattern[str]] = {
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(r"\b(gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    # hf://NAME@REVISION is a common slip, not a user name. The bound and the look behind keep the time linear: without them a
    # text of dashes takes time by its square.
    "credentials in a URL": re.compile(r"(?<![a-z0-9+.-])(?!hf:)[a-z][a-z0-9+.-]{0,31}://[^/\s?#]*@", re.IGNORECASE),
}
# kubectl's copy of what is judged anyway.
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"

_BY_REFERENCE = "put it into a Secret, and write valueFrom: {secretKeyRef: {name: SECRET, key: KEY}}"
_ELSEWHERE = (
    "remove it and revoke it; put it into a Secret for spec.env[].valueFrom.secretKeyRef, "
    "or spec.storage.credentials.secretName for S3"
)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name usually holds a secret: HF_TOKEN, WANDB_API_KEY, DB_PASSWORD."""
    return _TELLING_NAME.search(name) is not None


def secret_shape(value: str) -> str | None:
    """What kind of secret a value looks like, if any."""
    return next((kind for kind, shape in _TELLING_SHAPES.items() if shape.search(value)), None)


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """The text, less the values of variables whose names tell of secrets, and less what has the shape of a secret."""
    for name, value in environment.items():
        # A line's end that came with it is not printed with it, or as its repr.
        secret = value.strip()
        if is_secret_name(name) and len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, REDACTED)
    for shape in _TELLING_SHAPES.values():
        text = shape.sub(REDACTED, text)
    return text


def redacted(problem: Problem) -> Problem:
    """The problem, without its value if that is or may be a secret."""
    value = problem.value
    env_value = problem.field.startswith("spec.env[") and problem.field.endswith(".value")
    secret = isinstance(value, str) and secret_shape(value) is not None
    return replace(problem, value=REDACTED) if value is not None and (env_value or secret) else problem


def check_secrets(resource: DeepSpeedFineTune) -> Iterator[Problem]:
    """Every secret in plain text, once each, without its value."""
    named: set[str] = set()
    for index, variable in enumerate(resource.spec.env):
        if variable.value and is_secret_name(variable.name):
            field = f"spec.env[{index}].value"
            named.add(field)
            yield Problem(
                field,
                f"{variable.name} looks like a secret, and the manifest is no place for one",
                _BY_REFERENCE,
                REDACTED,
            )
    annotations = {key: text for key, text in resource.metadata.annotations.items() if key != _LAST_APPLIED}
    document = {"metadata": {"annotations": annotations}, "spec": resource.spec.to_wire()}
    for path, text in _texts(document, ()):
        field = field_name(path)
        if field not in named and (kind := secret_shape(text)):
            yield Problem(field, f"looks like {kind}, and the manifest is no place for one", _ELSEWHERE, REDACTED)


def _texts(value: object, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[str, Any]", value).items():
            yield from _texts(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(cast("list[object]", value)):
            yield from _texts(item, (*path, index))
