"""The reference page of the operator's settings, from the models that read them."""

import json
from collections.abc import Iterator
from typing import Any

from dsft_api.base import ApiModel
from dsft_operator.config import OperatorConfig
from dsft_operator.tenant_policy import TenantPolicy

_PAGE = """\
<!-- {notice} -->
# Settings of the operator

One document of kind `OperatorConfig`, `config.dsft.dev/v1alpha1`: the chart's value `config`, or the file that `DSFT_CONFIG`
names. An unknown key is refused at start.

| Setting | Default | |
|---|---|---|
{settings}

## Policies

What runs may ask for, by namespace: the first row of `policies` whose `namespaces` match counts, and what it leaves out has
the default below. Without any row the defaults count for all; where there are rows, a namespace that none matches gets nothing.
Patterns are a shell's (`*` also stands for a slash), with `{{namespace}}` for the namespace of the run; of a list the last
pattern that matches decides, and one that begins with `!` refuses. What is not allowed is refused
before anything is made, with condition `Accepted=False` and reason `NotAllowed`. What the settings above add to a run needs no
leave. [security.md](../security.md) says what each of them is there for.

| Setting | Default | |
|---|---|---|
{policies}
"""


def settings_page(notice: str) -> str:
    """docs/reference/settings.md: each setting, its default and what it is."""
    return _PAGE.format(notice=notice, settings=table_of(OperatorConfig()), policies=table_of(TenantPolicy()))


def table_of(part: ApiModel) -> str:
    """The rows of a Markdown table, one for each value: its path, its default and its description."""
    return "\n".join(f"| `{path}` | `{json.dumps(default)}` | {words} |" for path, default, words in _values(part, ()))


def _values(part: ApiModel, path: tuple[str, ...]) -> Iterator[tuple[str, Any, str]]:
    wire = part.model_dump(mode="json", by_alias=True)
    for name, field in type(part).model_fields.items():
        key, value = field.alias or name, getattr(part, name)
        if isinstance(value, ApiModel):
            yield from _values(value, (*path, key))
        else:
            yield ".".join((*path, key)), wire[key], field.description or ""
