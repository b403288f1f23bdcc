"""The shipped health checks, asked about resources: one call of the Go program for as many as there are."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.build import GITOPS

GITOPS_EXAMPLES = Path(__file__).parents[2] / "examples" / "gitops"
HEALTH = GITOPS_EXAMPLES / "argo-cd" / "health.lua"
RUNS = GITOPS_EXAMPLES / "flux" / "runs.yaml"
TO_THE_END = GITOPS_EXAMPLES / "flux" / "runs-to-the-end.yaml"


@dataclass(frozen=True)
class Verdicts:
    """Argo CD's health, kstatus, and Flux with the expressions of the two examples."""

    argo: str
    kstatus: str
    runs: str
    to_the_end: str


@dataclass(frozen=True)
class Told:
    """What was said of a resource; Argo CD shows the message."""

    verdicts: Verdicts
    message: str


def expressions(file: Path) -> dict[str, str]:
    """The expressions for our kind in an example of a Flux Kustomization."""
    found = [
        check
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))
        for check in document["spec"].get("healthCheckExprs", ())
        if check["kind"] == "DeepSpeedFineTune"
    ]
    (check,) = found
    return {name: check[name] for name in ("inProgress", "failed", "current")}


def ask(resources: Mapping[str, Mapping[str, Any]]) -> dict[str, Told]:
    """What the tools make of resources, by their names here.

    Raises:
        RuntimeError: with what was said, where a script or an expression is none.
    """
    question = {
        "health": HEALTH.read_text(encoding="utf-8"),
        "expressions": {"runs": expressions(RUNS), "to_the_end": expressions(TO_THE_END)},
        "objects": resources,
    }
    done = subprocess.run(
        [str(GITOPS.built())], input=json.dumps(question), capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {name: _told(answer) for name, answer in json.loads(done.stdout).items()}


def _told(answer: Any) -> Told:
    verdicts = Verdicts(answer["argo"]["status"], answer["kstatus"]["status"], **answer["flux"])
    return Told(verdicts, answer["argo"]["message"])
