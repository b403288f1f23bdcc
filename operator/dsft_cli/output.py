"""How results are printed: for people, or as one JSON or YAML document for scripts."""

import json
import sys
from enum import StrEnum
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from dsft_api.conditions import ExitCode
from dsft_api.problem import ManifestError


class Format(StrEnum):
    """Values of --output."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


err = Console(stderr=True, soft_wrap=True)
# A table is cut to the width of the terminal; in a pipe nothing is.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 1000)


def document(value: Any, form: Format) -> None:
    """Print one document to standard output."""
    if form is Format.JSON:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    else:
        sys.stdout.write(yaml.safe_dump(value, sort_keys=False))


def refuse(error: ManifestError, form: Format) -> ExitCode:
    """Print every problem of a manifest; the exit code."""
    if form is Format.TEXT:
        count = len(error.problems)
        err.print(f"[red]{count} problem{'s' if count > 1 else ''}[/] in {escape(error.source)}")
        err.print(escape(str(error)), highlight=False)
    else:
        problems = [
            {
                "field": problem.field,
                "reason": str(problem.reason),
                "message": problem.message,
                "remedy": problem.remedy,
                "line": problem.line,
            }
            for problem in error.problems
        ]
        document({"file": error.source, "valid": False, "problems": problems}, form)
    return ExitCode.BAD_INPUT
