"""A look of the preflight, and what it found."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dsft_api.job import JOB_ENV, Job
from dsft_api.preflight import Finding, PreflightResult

Edits = Mapping[str, Any]
Found = Callable[..., PreflightResult]


def the(result: PreflightResult) -> Finding:
    (finding,) = result.findings
    return finding


def in_process(command: list[str], job: Job, **environment: str) -> "subprocess.CompletedProcess[str]":
    paths = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "PYTHONPATH": paths, JOB_ENV: job.to_json(), **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
