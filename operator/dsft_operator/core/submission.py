"""An attempt and what it is told, as one submission: a constant command, and the job as JSON in its environment."""

import json
import shlex
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal

from dsft_api.job import JOB_ENV, Job, Ranks, RunRef
from dsft_api.problem import Problem
from dsft_api.quantity import quantity
from dsft_api.resource import run_folder, spec_hash
from dsft_api.spec import FineTuneSpec
from dsft_api.status import Inputs
from dsft_operator.core import attempts
from dsft_operator.core.decision import SubmitJob
from dsft_operator.core.naming import submission_id
from dsft_operator.core.observed import Run

ENTRYPOINT = shlex.join(["python", "-m", "dsft_trainer", "run"])
# Linux takes 128 KiB per string of the environment (MAX_ARG_STRLEN); the rest of the job needs less than 8. What counts is the
# job as a string inside JSON: Ray hands it so to the driver and to each worker, and tries for ever where that is too long.
MAX_SPEC_BYTES = 120 * 1024
CHANNEL = "/tmp/ray/session_latest/logs"  # noqa: S108  Ray's log folder: its dashboard serves what lies there
POD_STDOUT = "/proc/1/fd/1"


def job_of(run: Run, spec: FineTuneSpec, attempt: int, storage_prefix: str) -> Job:
    """What an attempt is told. It holds no secrets."""
    return Job(
        run=RunRef(namespace=run.namespace, name=run.name, uid=run.uid),
        attempt=attempt,
        spec=spec,
        spec_hash=run.status.spec_hash or run.identity or spec_hash(spec),
        storage_prefix=storage_prefix,
        ranks=ranks(spec),
        end_by=_end_by(run, spec),
        resolved=_inputs(run),
    )


def submission(run: Run, spec: FineTuneSpec, attempt: int, storage_prefix: str) -> SubmitJob:
    """What is posted for an attempt."""
    job = job_of(run, spec, attempt, storage_prefix)
    return SubmitJob(
        submission_id=submission_id(run.uid, attempt),
        entrypoint=ENTRYPOINT,
        environment={JOB_ENV: job.to_json(), "DSFT_CHANNEL": CHANNEL, "DSFT_POD_STDOUT": POD_STDOUT},
        metadata={"namespace": run.namespace, "name": run.name, "uid": run.uid, "attempt": str(attempt)},
    )


def _inputs(run: Run) -> Inputs | None:
    """What earlier attempts found the inputs to be."""
    known = run.status.resolved
    return Inputs(**known.model_dump(include=set(Inputs.model_fields))) if known is not None else None


def _end_by(run: Run, spec: FineTuneSpec) -> datetime | None:
    """When the run will have trained for as long as it may, if nothing stops it before."""
    current, bound = attempts.active(run.status), spec.deadlines.run_seconds
    if current is None or bound is None:
        return None
    return current.start_time + timedelta(seconds=bound - attempts.trained_seconds(run.status, current.start_time))


def ranks(spec: FineTuneSpec) -> Ranks:
    """The ranks of the pools, and how many threads each may use: its share of the smallest pool's CPUs."""
    device = "cuda" if spec.trains_on_gpus else "cpu"
    per_node = [
        quantity(pool.resources.requests.get("cpu", pool.resources.limits.get("cpu", 1))) for pool in spec.node_pools
    ]
    shares = [
        cpus / max(1, pool.gpus_per_node if device == "cuda" else 1)
        for cpus, pool in zip(per_node, spec.node_pools, strict=True)
    ]
    return Ranks(count=spec.ranks, device=device, threads=max(1, int(min(shares, default=Decimal(1)))))


def storage_prefix(run: Run, spec: FineTuneSpec) -> str:
    """The run's folder: pinned by the first attempt, since the admin's default may move."""
    pinned = run.status.resolved.storage_prefix if run.status.resolved else None
    return pinned or f"{(spec.storage.uri or '').rstrip('/')}/{run_folder(run.namespace, run.name, run.uid)}"


def too_large(spec: FineTuneSpec) -> Iterator[Problem]:
    """A job that the driver could not be started with: the kernel takes no longer environment string."""
    size = len(json.dumps(spec.model_dump_json(by_alias=True, exclude_none=True)))
    if size > MAX_SPEC_BYTES:
        longest = "spec.deepspeed.config, spec.program.config, spec.data.chatTemplate and spec.env are what can be long"
        yield Problem(
            "spec", f"is {size} bytes as JSON in JSON, and {MAX_SPEC_BYTES} is the most", f"shorten it: {longest}"
        )
