"""Experiment trackers by their own clients: MLflow and Weights & Biases. Rank 0 only.

A tracker is a courtesy: training never waits for it and never fails of it. So each has a thread of its own and a bounded queue;
what it cannot take is dropped, its first error is logged, and at the end it is given a bounded time. Its run is found again
after a restart, since the run's uid names it. Keys come from the environment and are in no message.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsft_api.job import Job
from dsft_api.plain_secrets import without_secrets
from dsft_api.spec.policy import MlflowSpec, WandbSpec
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.runtime import Outcome

log = logging.getLogger(__name__)

QUEUE_LENGTH = 10_000
CLOSE_SECONDS = 30.0
# Of one request, and how often it is made: an unreachable server is given up within CLOSE_SECONDS.
REQUEST_SECONDS = 8
RETRIES = 1
_MLFLOW_STATUS = {Outcome.SUCCEEDED: "FINISHED", Outcome.INTERRUPTED: "KILLED", None: "FAILED"}


@dataclass(frozen=True)
class Point:
    """Metrics of a step; `kind` is train or eval."""

    kind: str
    step: int
    values: Mapping[str, float]
    time: float

    @property
    def named(self) -> dict[str, float]:
        """By the names that TensorBoard has too: `train/loss`."""
        return {f"{self.kind}/{name}": value for name, value in self.values.items()}


class Client(Protocol):
    """A tracker's own client, on its thread. All calls may raise whatever they like."""

    def write(self, point: Point) -> None:
        """Hand one point over."""
        ...

    def close(self, outcome: Outcome | None) -> None:
        """End the tracker's run; `None` means that the training failed."""
        ...


class Tracker:
    """A client behind its thread."""

    def __init__(self, name: str, connect: Callable[[], Client]) -> None:
        self._name = name
        self._connect = connect
        self._queue: queue.Queue[Point | Outcome | None] = queue.Queue(QUEUE_LENGTH)
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Pass metrics on, or drop them; never waits."""
        if not self._failed:
            try:
                self._queue.put_nowait(Point(kind, step, dict(values), time.time()))
            except queue.Full:
                self._fail(f"it takes longer than the training; metrics from step {step} on are left out")

    def close(self, outcome: Outcome | None) -> None:
        """Pass the rest on and end, within CLOSE_SECONDS."""
        deadline = time.monotonic() + CLOSE_SECONDS
        try:
            self._queue.put(outcome, timeout=CLOSE_SECONDS)
        except queue.Full:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"it did not take the last metrics within {CLOSE_SECONDS:.0f} s")

    def _work(self) -> None:
        client: Client | None = None
        try:
            client = self._connect()
            while isinstance(item := self._queue.get(), Point):
                if not self._failed:
                    client.write(item)
            client.close(item)
        except BaseException as error:  # noqa: BLE001  clients end by SystemExit, too; the run must not
            self._fail(f"{type(error).__name__}: {_public(str(error))}")
            if client is not None:
                with suppress(Exception):
                    client.close(None)

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            log.warning("tracking.%s is given up, training goes on: %s", self._name, why)


def _public(text: str) -> str:
    """One short line without the values of secrets."""
    return " ".join(without_secrets(text, os.environ).split())[:300]


def trackers_of(job: Job, folder: Path, store: Store) -> Iterator[Tracker]:
    """The trackers that the manifest names, connecting. `folder` is for their files."""
    tracking = job.spec.tracking
    if (mlflow := tracking.mlflow) is not None:
        yield Tracker("mlflow", lambda: Mlflow(job, mlflow))
    if (wandb := tracking.wandb) is not None:
        yield Tracker("wandb", lambda: Wandb(job, wandb, folder, store))


def settings(job: Job) -> dict[str, str]:
    """What is trained, as trackers show it: `training.optimizer.learningRate`."""

    def flat(part: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
        for name, value in part.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{above}{name}.")
            else:
                yield f"{above}{name}", str(value)[:250]

    spec = job.spec.to_wire()
    return dict(flat({name: spec[name] for name in ("model", "training", "execution") if name in spec}, ""))


class Mlflow:
    """MLflow, by its client; the run is the one that is tagged with our uid."""

    TAG = "dsft.uid"

    def __init__(self, job: Job, spec: MlflowSpec) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(RETRIES))
        # Imported here: it takes seconds, on one rank only.
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=spec.tracking_uri)
        experiment = self._experiment(spec.experiment or job.run.namespace)
        found = self._client.search_runs([experiment], f"tags.`{self.TAG}` = '{job.run.uid}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        created = self._client.create_run(experiment, tags={self.TAG: job.run.uid}, run_name=job.run.name)
        self._run = created.info.run_id
        from mlflow.entities import Param

        self._client.log_batch(self._run, params=[Param(name, value) for name, value in settings(job).items()])

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found is not None else self._client.create_experiment(name)

    def write(self, point: Point) -> None:
        """One request for all metrics of a step."""
        from mlflow.entities import Metric

        milliseconds = int(point.time * 1000)
        metrics = [Metric(name, value, milliseconds, point.step) for name, value in point.named.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, outcome: Outcome | None) -> None:
        """Say how it ended; a later start of the run says RUNNING again."""
        self._client.set_terminated(self._run, _MLFLOW_STATUS[outcome])


class Wandb:
    """Weights & Biases; its run has our uid as id. What it writes offline (WANDB_MODE) goes to storage, for `wandb sync`."""

    def __init__(self, job: Job, spec: WandbSpec, folder: Path, store: Store) -> None:
        # Imported here: it takes seconds, on one rank only.
        import wandb

        self._wandb = wandb
        self._store = store
        self._folder = folder / "trackers"
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._init(job, spec)
        except BaseException:
            # Also for what ends by SystemExit: the service that it has started must not stay.
            wandb.teardown(exit_code=1)
            raise
        # W&B's own step never goes back; ours does, where a restart does some steps again.
        self._run.define_metric("*", step_metric="step")

    def _init(self, job: Job, spec: WandbSpec) -> Any:
        wandb = self._wandb
        return wandb.init(
            project=spec.project,
            entity=spec.entity,
            id=job.run.uid,
            name=job.run.name,
            group=job.run.namespace,
            config=settings(job),
            dir=self._folder,
            resume="allow",
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                init_timeout=CLOSE_SECONDS,
                x_graphql_retry_max=RETRIES,
                x_graphql_timeout_seconds=REQUEST_SECONDS,
                x_file_stream_retry_max=RETRIES,
                x_file_stream_timeout_seconds=REQUEST_SECONDS,
                x_file_transfer_retry_max=RETRIES,
                x_file_transfer_timeout_seconds=REQUEST_SECONDS,
            ),
        )

    def write(self, point: Point) -> None:
        """A row with the step in it."""
        self._run.log({"step": point.step, **point.named})

    def close(self, outcome: Outcome | None) -> None:
        """End the run, and the service process that W&B started."""
        offline = self._run.offline
        self._run.finish(exit_code=1 if outcome is None else 0)
        self._wandb.teardown()
        # There are links to the newest run beside it.
        for path in self._folder.rglob("*") if offline else ():
            if path.is_file() and not any(part.is_symlink() for part in (path, *path.parents)):
                self._store.put_file(path, path.relative_to(self._folder).as_posix())
