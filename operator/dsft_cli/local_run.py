"""One manifest on this machine: which run it is, where its files are, and the job its next attempt is told.

The run's uid comes from the manifest alone, so the same command finds its run again; `--fresh` counts a generation up. What
has happened is read from storage, never from memory: the newest run folder, its claims, and RESULT.json.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dsft_api.batch import BatchError, plan_batch
from dsft_api.job import Job, Ranks, RunRef
from dsft_api.layout import RESULT_FILE, RUN_FILE
from dsft_api.problem import ManifestError, Problem
from dsft_api.resource import DeepSpeedFineTune, local_uid, run_folder, spec_hash

STATUS_FILE = "status.yaml"
# A trainer that was killed holds its lock until the kernel has freed its memory, which its last thread to die does.
KILLED_LINGERS_SECONDS = 10.0


@dataclass(frozen=True)
class LocalRun:
    """A run and its places."""

    resource: DeepSpeedFineTune
    uid: str
    storage_prefix: str
    state: Path
    attempts: int
    finished: bool

    @property
    def status_file(self) -> Path:
        """The status, in the resource's own schema."""
        return self.state / STATUS_FILE

    @property
    def channel(self) -> Path:
        """Where the trainer leaves its progress."""
        return self.state / "channel"

    def log_file(self, attempt: int) -> Path:
        """What the trainer printed."""
        return self.state / "logs" / f"attempt-{attempt}.log"


def find_run(resource: DeepSpeedFineTune, runs: Path, *, fresh: bool = False) -> LocalRun:
    """The run that a manifest names here: its newest generation, or with `fresh` the next one.

    Raises:
        TrainerError: StorageDenied if storage cannot be read.
    """
    from dsft_trainer.checkpoint.listing import claimed_ids
    from dsft_trainer.checkpoint.store import open_store

    storage = resource.spec.storage
    root = (storage.uri or runs.resolve().as_uri()).rstrip("/")

    def prefix(generation: int) -> str:
        uid = local_uid(resource, generation)
        return f"{root}/{run_folder(resource.metadata.namespace, resource.metadata.name, uid)}"

    def exists(generation: int) -> bool:
        store = open_store(prefix(generation), endpoint_url=storage.endpoint_url, region=storage.region)
        return store.get_bytes(RUN_FILE) is not None

    generations = 0
    while exists(generations):
        generations += 1
    generation = generations if fresh else max(0, generations - 1)
    uid = local_uid(resource, generation)
    store = open_store(prefix(generation), endpoint_url=storage.endpoint_url, region=storage.region)
    return LocalRun(
        resource=resource,
        uid=uid,
        storage_prefix=prefix(generation),
        state=_state_folder(prefix(generation), resource, uid, runs),
        attempts=max((claim.attempt for claim in claimed_ids(store)), default=0),
        finished=store.get_bytes(RESULT_FILE) is not None,
    )


def _state_folder(prefix: str, resource: DeepSpeedFineTune, uid: str, runs: Path) -> Path:
    """The run's folder itself where it is a local one, else its like below `runs`."""
    parts = urlsplit(prefix)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return runs.resolve() / run_folder(resource.metadata.namespace, resource.metadata.name, uid)


def job_for(run: LocalRun, ranks: Ranks, source: str) -> Job:
    """What the run's next attempt is told.

    Raises:
        ManifestError: if the global batch cannot be cut over the ranks.
    """
    spec = run.resource.spec
    if spec.training is not None:
        try:
            plan_batch(spec.training.global_batch_size, ranks.count, spec.execution.micro_batch_size)
        except BatchError as error:
            problem = Problem("spec.training.globalBatchSize", error.message, error.remedy)
            raise ManifestError(source, (problem,)) from error
    meta = run.resource.metadata
    return Job(
        run=RunRef(namespace=meta.namespace, name=meta.name, uid=run.uid),
        attempt=run.attempts + 1,
        spec=spec,
        spec_hash=spec_hash(spec),
        storage_prefix=run.storage_prefix,
        ranks=ranks,
    )


def trainer_environment(resource: DeepSpeedFineTune, source: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The trainer's environment: ours, the manifest's plain variables, and its secrets, which must be in ours already.

    Raises:
        ManifestError: naming every variable that a Secret would have given and that is not set.
    """
    problems: list[Problem] = []
    result = dict(environment)
    for i, variable in enumerate(resource.spec.env):
        if variable.value is not None:
            result[variable.name] = variable.value
        elif variable.name not in environment:
            problems.append(
                Problem(
                    f"spec.env[{i}].valueFrom",
                    f"{variable.name} comes from a Secret or ConfigMap, and there is none without a cluster",
                    f"export {variable.name} before `dsft run`",
                )
            )
    if resource.spec.storage.credentials is not None:
        problems += [
            Problem(
                "spec.storage.credentials.secretName",
                f"{name} comes from a Secret, and there is none without a cluster",
                f"export {name} before `dsft run`",
            )
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
            if name not in environment
        ]
    if problems:
        raise ManifestError(source, tuple(problems))
    return result


def is_running(run: LocalRun) -> bool:
    """Whether a trainer of this run is alive on this machine: it holds the lock of its channel."""
    import fcntl

    lock = run.channel / "lock"
    if not lock.exists():
        return False
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def has_ended(run: LocalRun) -> bool:
    """Whether no trainer of this run is alive here; one that was killed a moment ago is given time to be gone."""
    deadline = time.monotonic() + KILLED_LINGERS_SECONDS
    while is_running(run):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def runs_folder() -> Path:
    """Where runs go that name no storage: $DSFT_RUNS, or ./runs."""
    return Path(os.environ.get("DSFT_RUNS", "runs"))
