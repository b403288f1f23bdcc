"""An attempt and what it is told, as one submission: a constant command, and the job as JSON in its environment."""

import shlex
from decimal import Decimal

from dsft_api.job import JOB_ENV, Job, Ranks, RunRef
from dsft_api.resource import run_folder, spec_hash
from dsft_api.spec import FineTuneSpec
from dsft_operator.core.decision import SubmitJob
from dsft_operator.core.naming import submission_id
from dsft_operator.core.observed import Run

ENTRYPOINT = shlex.join(["python", "-m", "dsft_trainer", "run"])
CHANNEL = "/tmp/ray/session_latest/logs"  # noqa: S108  Ray's log folder: its dashboard serves what lies there
POD_STDOUT = "/proc/1/fd/1"


def submission(run: Run, spec: FineTuneSpec, attempt: int, storage_prefix: str) -> SubmitJob:
    """What is posted for an attempt. The job holds no secrets."""
    job = Job(
        run=RunRef(namespace=run.namespace, name=run.name, uid=run.uid),
        attempt=attempt,
        spec=spec,
        spec_hash=run.status.spec_hash or run.identity or spec_hash(spec),
        storage_prefix=storage_prefix,
        ranks=ranks(spec),
    )
    return SubmitJob(
        submission_id=submission_id(run.uid, attempt),
        entrypoint=ENTRYPOINT,
        environment={JOB_ENV: job.to_json(), "DSFT_CHANNEL": CHANNEL, "DSFT_POD_STDOUT": POD_STDOUT},
        metadata={"namespace": run.namespace, "name": run.name, "uid": run.uid, "attempt": str(attempt)},
    )


def ranks(spec: FineTuneSpec) -> Ranks:
    """The ranks of the pools, and how many threads each may use: its share of the smallest pool's CPUs."""
    device = "cpu" if spec.ranks != spec.gpus or spec.execution.device == "cpu" else "cuda"
    per_node = [
        _cpus(pool.resources.requests.get("cpu", pool.resources.limits.get("cpu", 1))) for pool in spec.node_pools
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


def _cpus(quantity: int | str) -> Decimal:
    text = str(quantity)
    return Decimal(text[:-1]) / 1000 if text.endswith("m") else Decimal(text)
