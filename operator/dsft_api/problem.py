"""One complaint about a manifest: which field, what is wrong with it, what to write instead.

Everything that judges a manifest (schema, checks, admission by the operator) speaks in Problems, so that the CLI and
the status of a resource say the same thing in the same words.
"""

import re
from dataclasses import dataclass

from dsft_api.conditions import Reason

# A path into a document: names as on the wire, list positions as ints.
Path = tuple[str | int, ...]

_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Problem:
    """One complaint.

    `field` is a path in wire names (`spec.nodePools[0].name`). `value` is None where there is none, or none that may
    be shown. `line` counts from 1 and is known only for text.
    """

    field: str
    message: str
    remedy: str
    value: object | None = None
    reason: Reason = Reason.INVALID
    line: int | None = None

    def __str__(self) -> str:
        got = "" if self.value is None else f" (got {shown(self.value)})"
        return f"{self.field}: {self.message}{got} -> {self.remedy}"


class ManifestError(Exception):
    """A manifest that cannot be used, with every problem that was found in it, in the order of its lines."""

    def __init__(self, source: str, problems: tuple[Problem, ...]) -> None:
        super().__init__(source, problems)
        self.source = source
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(f"{self._place(problem)}: {problem}" for problem in self.problems)

    def _place(self, problem: Problem) -> str:
        return self.source if problem.line is None else f"{self.source}:{problem.line}"


def shown(value: object) -> str:
    """A value as a user would write it in YAML, cut to one short line."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def field_name(path: Path) -> str:
    """`("spec", "nodePools", 0, "name")` as `spec.nodePools[0].name`; the whole document as `manifest`."""
    return (
        "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".") or "manifest"
    )


def path_of(field: str) -> Path:
    """The inverse of `field_name`, but for names that hold a dot."""
    parts = re.findall(r"\[(\d+)\]|([^.\[\]]+)", field)
    return tuple(int(index) if index else name for index, name in parts)
