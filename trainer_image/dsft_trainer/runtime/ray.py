"""Ranks started by Ray Train V2: it places them, sets the process group up and watches them.

Nothing is reported through `ray.train.report`: it takes one report per controller poll (2 s by default) and a report that
returned can still be lost. Progress, drain and failures go through one small actor on the driver's node instead, and
checkpoints are committed in storage by the ranks themselves (docs/decisions/0003).

A trainer is one start of the ranks. Where another one can follow inside the attempt, it is a new one (docs/decisions/0016).
"""

import importlib
import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

from dsft_api.job import Job
from dsft_api.progress import Progress, TrainerFailure
from dsft_trainer.ask import RAY_ADDRESS_ENV
from dsft_trainer.checkpoint.store import store_of
from dsft_trainer.errors import TrainerError
from dsft_trainer.logs import LogShipper, log_name, output_files
from dsft_trainer.process import rank_environment, start_environment
from dsft_trainer.program import datasets_of
from dsft_trainer.runtime import Outcome, Place, Wishes
from dsft_trainer.runtime.channel import ECHOES, Channel
from dsft_trainer.runtime.oom import oom_kills
from dsft_trainer.runtime.ray_relay import NAMESPACE, RELAY_PREFIX, Relay
from dsft_trainer.runtime.ray_starts import Notices, Silence, run_starts
from dsft_trainer.runtime.starts import Start
from dsft_trainer.watchdog import MARGIN_SECONDS

if TYPE_CHECKING:
    import ray.data
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


log = logging.getLogger(__name__)

# Shared memory of a local Ray without Ray Data: nothing but small messages goes through it.
LOCAL_OBJECT_STORE_BYTES = 256 * 2**20
LOCAL_OBJECT_STORE_BYTES_FOR_DATA = 2**30
PRIVATE_STARTS = 3
SPARE_CPUS = 2
"""Beside the ranks, for what Ray Data does while they train."""


class RayRuntime:
    """A rank inside a Ray Train worker."""

    def __init__(self, relay: Any, start: int, opening: Progress, datasets: Sequence[str]) -> None:
        import ray.train

        self.opening = opening
        self._start = start
        context = ray.train.get_context()
        self.place = Place(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
        self._relay = relay
        self._datasets = datasets
        self._answer: ray.ObjectRef | None = None
        self._wishes = Wishes()

    @staticmethod
    def of(config: dict[str, Any]) -> "RayRuntime":
        """That of the rank that was told this."""
        opening = Progress.model_validate_json(config["opening"])
        return RayRuntime(config["relay"], config["start"], opening, config.get("datasets", ()))

    @property
    def log_name(self) -> str:
        """The name of this rank's log."""
        return log_name(self.place.rank, self.opening)

    def publish(self, progress: str) -> None:
        """Send the document without waiting for its arrival; look at the answer to the one before."""
        self._look_at_answer(0)
        self._answer = self._relay.publish.remote(self._start, progress)

    def wishes(self) -> Wishes:
        """The last answer. Only rank 0 publishes; its peers learn it from the step's reduction."""
        self._look_at_answer(0)
        return self._wishes

    def fail(self, failure: TrainerFailure) -> None:
        """Tell the relay, waiting 10 s at most."""
        try:
            ray.get(self._relay.fail.remote(self._start, failure.model_dump_json(by_alias=True)), timeout=10)
        except ray.exceptions.RayError as error:
            log.warning("the failure could not be reported: %s", error)

    def drain_time(self) -> datetime | None:
        """When the launcher was asked for a drain, if it was; waits 10 s at most."""
        try:
            return ray.get(self._relay.drain_time.remote(), timeout=10)
        except ray.exceptions.RayError as error:
            log.warning("whether to stop is not known: %s", error)
            return None

    def tokenized(self) -> dict[str, pa.Table]:
        """What Ray Data tokenised, if the run asked for that loader."""
        import ray.train

        from dsft_trainer.data.ray_data import collect

        return {name: collect(ray.train.get_dataset_shard(name)) for name in self._datasets}

    def finish(self, outcome: Outcome) -> None:
        """Wait until the relay has rank 0's last document and outcome."""
        if self.place.is_first:
            self._look_at_answer(30)
            ray.get(self._relay.set_outcome.remote(self._start, str(outcome)), timeout=30)

    def _look_at_answer(self, timeout: float) -> None:
        if self._answer is None:
            return
        ready, _ = ray.wait([self._answer], timeout=timeout)
        if ready:
            self._answer = None
            try:
                self._wishes = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                log.warning("progress did not arrive: %s", error)


def rank_main(config: dict[str, Any]) -> None:
    """The train function that Ray Train runs on each worker."""
    from dsft_trainer.process import prepare_process

    job = Job.model_validate_json(config["job"])
    prepare_process(job)
    import ray.train.torch

    from dsft_trainer.rank import run_rank

    runtime = RayRuntime.of(config)
    with log_shipped(job, runtime) if config["on_cluster"] else nullcontext():
        runtime.finish(run_rank(job, runtime, ray.train.torch.get_device()))


def log_shipped(job: Job, runtime: RayRuntime) -> LogShipper:
    """While this is open, what this process prints goes to storage."""
    return LogShipper.of(job, store_of(job), runtime.log_name, output_files())


def launch(job: Job, channel: Channel) -> Outcome:
    """Run all ranks of an attempt on Ray: on the cluster of RAY_ADDRESS, or on a Ray of its own on this machine.

    Raises:
        TrainerError: the failure that a rank reported, or how Ray lost it.
    """
    if job.spec.program is None:
        # `Notices` listens for nodes that are about to go: spare the process that would. A program may ask Ray Train for them.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Importing Ray Train takes a second, in which Ray can start.
    imports = threading.Thread(target=importlib.import_module, args=("dsft_trainer.runtime.ray_trainer",), daemon=True)
    imports.start()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _connect(job)
    # ray.init puts a handler of its own in their place, which ends the process at SIGTERM.
    for number, handler in handlers.items():
        signal.signal(number, handler)
    imports.join()
    try:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        relay = (
            ray.remote(Relay)
            .options(name=f"{RELAY_PREFIX}{job.run.uid}-a{job.attempt}", num_cpus=0, scheduling_strategy=here)
            .remote(str(channel.folder))
        )
        run_starts(job, channel, relay, lambda start: _fit(job, start, channel, relay))
        return Outcome(ray.get(relay.outcome.remote(), timeout=30))
    finally:
        ray.shutdown()


def _connect(job: Job) -> None:
    if os.environ.get(RAY_ADDRESS_ENV):
        ray.init(log_to_driver=True, namespace=NAMESPACE)
        return
    # Of this Ray alone. Else Ray makes one in the home folder, which may not be ours to write to.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    gpus = job.ranks.count if job.ranks.device == "cuda" else 0
    tokenizes = job.spec.data is not None and job.spec.data.loader == "ray-data"
    feeds = _feeds(job)
    # Ray gives its own processes 30 s to start, which a busy machine may not be able to keep.
    for attempt in Retrying(
        stop=stop_after_attempt(PRIVATE_STARTS),
        retry=retry_if_exception_message(match=".*timed out during startup"),
        before_sleep=lambda _: ray.shutdown(),
        reraise=True,
    ):
        with attempt:
            ray.init(
                address="local",
                namespace=NAMESPACE,
                num_cpus=max(job.ranks.count + (SPARE_CPUS if feeds else 0), os.cpu_count() or 1),
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES_FOR_DATA
                if tokenizes or feeds
                else LOCAL_OBJECT_STORE_BYTES,
                log_to_driver=True,
            )


def _trainer(job: Job, relay: Any, start: Start) -> "DataParallelTrainer":
    """The built-in training."""
    from ray.train import DataConfig

    from dsft_trainer.runtime.ray_trainer import LeanTrainer

    datasets = _tokenizing(job)
    # Ray's own bookkeeping; checkpoints do not go there, so it may be lost.
    book = {"name": f"{job.run.uid}-a{job.attempt}", "storage_path": tempfile.mkdtemp(prefix="dsft-ray-")}
    return LeanTrainer(
        rank_main,
        train_loop_config={**_told(job, relay, start), "datasets": list(datasets)},
        datasets=datasets,
        dataset_config=DataConfig(datasets_to_split=[]),
        **_settings(job, **book),
    )


def _program_trainer(job: Job, relay: Any, start: Start) -> "DataParallelTrainer":
    """The user's. Its checkpoints go where Ray Train finds them in the next start."""
    from ray.train import CheckpointConfig

    from dsft_trainer.checkpoint.ray_book import FOLDER
    from dsft_trainer.runtime.ray_program import DurableReports, ProgramProgress, program_main
    from dsft_trainer.runtime.ray_trainer import LeanTrainer

    book = {
        "name": FOLDER,
        "storage_path": job.storage_prefix,
        "callbacks": [ProgramProgress(job, relay, start), DurableReports()],
        "checkpoint_config": CheckpointConfig(num_to_keep=job.spec.checkpoint.keep_last),
    }
    assert job.spec.program is not None, "only such jobs come here"  # noqa: S101
    datasets = datasets_of(job.spec.program)
    return LeanTrainer(
        program_main, train_loop_config=_told(job, relay, start), datasets=datasets, **_settings(job, **book)
    )


def _told(job: Job, relay: Any, start: Start) -> dict[str, Any]:
    return {
        "job": job.to_json(),
        "relay": relay,
        "start": start.number,
        "opening": start.opening.model_dump_json(by_alias=True),
        "on_cluster": bool(os.environ.get(RAY_ADDRESS_ENV)),
    }


def _feeds(job: Job) -> bool:
    """Whether a program has datasets of Ray Data, whose tasks want CPUs of their own."""
    return job.spec.program is not None and job.spec.program.datasets is not None


def _settings(job: Job, **book: Any) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from dsft_trainer.runtime.ray_torch import TorchGroup

    cuda = job.ranks.device == "cuda"
    # Pods without GPUs have a CPU more then, which is not for another rank.
    one_each = _feeds(job) and not cuda and bool(os.environ.get(RAY_ADDRESS_ENV))
    return {
        "backend_config": TorchGroup(
            "nccl" if cuda else "gloo", timeout_s=int(job.spec.deadlines.stall_seconds + MARGIN_SECONDS)
        ),
        "scaling_config": ScalingConfig(
            num_workers=job.ranks.count,
            use_gpu=cuda,
            resources_per_worker={"GPU": 1} if cuda else {"CPU": 1},
            placement_strategy="STRICT_SPREAD" if one_each else "PACK",
        ),
        "run_config": RunConfig(
            # One start of the ranks per trainer: what comes after a failure is decided by `starts`.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            worker_runtime_env=_rank_runtime_env(job),
            **book,
        ),
    }


def _fit(job: Job, start: Start, channel: Channel, relay: Any) -> None:
    oom_kills_before = oom_kills()
    trainer = _program_trainer(job, relay, start) if job.spec.program else _trainer(job, relay, start)
    silence, notices = Silence(job, start, relay), Notices(relay)

    def look() -> None:
        silence.look()
        notices.look()

    error = _fit_apart(trainer, look)
    _close(relay)
    failure = _failure(channel, error, oom_kills_before)
    if failure is not None:
        raise failure from error


def _rank_runtime_env(job: Job) -> dict[str, Any]:
    """What a rank's process must have from its first moment. On a cluster it is no child of ours, and inherits nothing."""
    if not os.environ.get(RAY_ADDRESS_ENV):
        return {}
    # Also what a program's ranks start, such as tasks of Ray Data, must find its code.
    code = {"PYTHONPATH": os.environ["PYTHONPATH"]} if job.spec.program and job.spec.program.source else {}
    return {"env_vars": rank_environment(job) | start_environment(job) | code}


def _close(relay: Any) -> None:
    try:
        ray.get(relay.close.remote(), timeout=30)
    except ray.exceptions.RayError as error:
        log.warning("the relay is gone: %s", error)


def _failure(channel: Channel, error: BaseException | None, oom_kills_before: int) -> TrainerError | None:
    """Why the ranks ended, by the best witness: what a rank said, unless it only felt another one go."""
    told = channel.failure()
    if told is not None and told.failure_class not in ECHOES:
        return TrainerError.from_report(told)
    if told is None and error is None:
        return None
    if error is not None and not isinstance(error, Exception):
        raise error
    from dsft_trainer.runtime import ray_failures

    cause = ray_failures.cause_of(error) if error is not None else None
    if cause is not None and cause.failure_class not in ECHOES:
        return cause
    memory = ray_failures.out_of_memory(oom_kills_before)
    if memory is not None:
        return memory
    return TrainerError.from_report(told) if told is not None else cause


def _fit_apart(trainer: Any, look: Callable[[], None]) -> BaseException | None:
    """Run `fit` outside the main thread, where it cannot replace our signal handlers with an abort that commits nothing."""
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  handed to the caller
            errors.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        # In slices: a signal handler runs in the main thread, between them.
        thread.join(timeout=0.2)
        look()
    return next(iter(errors), None)


def _tokenizing(job: Job) -> "dict[str, ray.data.Dataset]":
    """The run's tokens by Ray Data; empty with another loader, or if the run has them. Made before ranks take the CPUs."""
    if job.spec.workload().data.loader != "ray-data":
        return {}
    from dsft_trainer.data.prepare import encoders, load
    from dsft_trainer.data.ray_data import tokenize_with_ray
    from dsft_trainer.data.sources import fetch
    from dsft_trainer.data.token_cache import TokenCache, key_of
    from dsft_trainer.data.tokens import set_chat_template
    from dsft_trainer.model import load_tokenizer

    spec, work = job.spec, job.spec.workload()
    with tempfile.TemporaryDirectory(prefix="dsft-data-") as name:
        cache = Path(name)
        folder = fetch(
            work.model.uri, storage=spec.storage, cache=cache, kind="tokenizer", revision=work.model.revision
        )
        tokenizer = load_tokenizer(folder)
        set_chat_template(tokenizer, job, cache)
        if TokenCache(store_of(job), key_of(job, folder, tokenizer)).is_there():
            return {}
        rows = load(job, cache)
        made = encoders(job, rows, tokenizer)
        return {name: tokenize_with_ray(part.table, made[name]) for name, part in rows.items()}
