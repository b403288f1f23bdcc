"""The preflight of a run on this machine: the trainer's own, as a process. Its result is printed as was asked."""

import subprocess
import sys
from collections.abc import Mapping

from pydantic import ValidationError
from rich.markup import escape

from dsft_api.conditions import ExitCode
from dsft_api.job import JOB_ENV, Job
from dsft_api.preflight import PreflightResult
from dsft_cli.output import Format, document, err, out

# Each check has a bound of its own, far below.
SECONDS = 900


def look_ahead(job: Job, environment: Mapping[str, str], output: Format) -> int:
    """Run it and print what it found; the exit code. Its log, with one sample, goes to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "dsft_trainer", "preflight", "--here"],
        env={**environment, JOB_ENV: job.to_json()},
        stdout=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    try:
        result = PreflightResult.model_validate_json(done.stdout.strip().rpartition("\n")[2])
    except ValidationError:
        err.print("the preflight ended without a result", style="red")
        return done.returncode or ExitCode.OTHER
    if output is not Format.TEXT:
        document(result.to_wire(), output)
        return done.returncode
    for finding in result.findings:
        out.print(f"[red]{finding.failure_class}[/] {escape(str(finding))}", highlight=False)
    for note in result.unchecked:
        out.print(f"[dim]not told from here: {escape(note)}[/]", highlight=False)
    if not result.findings:
        out.print(f"{job.run.namespace}/{job.run.name}: nothing was found", highlight=False)
    return done.returncode
