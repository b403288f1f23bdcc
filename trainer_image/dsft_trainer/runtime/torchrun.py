"""Ranks started by torch elastic on this machine: no Ray, and the same losses.

`launch` is what `torchrun --standalone` does, through its Python API, so that outcomes come back as values.
"""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path

import pyarrow as pa

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.progress import Progress, TrainerFailure
from dsft_trainer.errors import TrainerError, failure_of
from dsft_trainer.process import prepare_process, rank_environment, torch_device
from dsft_trainer.progress import starting
from dsft_trainer.runtime import Outcome, Place, Wishes
from dsft_trainer.runtime.channel import Channel
from dsft_trainer.watchdog import MARGIN_SECONDS

log = logging.getLogger(__name__)


class TorchrunRuntime:
    """A rank whose launcher shares its machine; signals and the channel's folder connect them."""

    def __init__(self, channel: Channel, opening: Progress) -> None:
        self.opening = opening
        self.place = Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
        self._channel = channel
        self._signalled = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._signalled = True

    def publish(self, progress: str) -> None:
        """Replace the progress file."""
        self._channel.publish(progress)

    def wishes(self) -> Wishes:
        """That of the channel; a signal to this process asks for a drain too."""
        return Wishes(self._signalled or self._channel.drain_requested(), self._channel.save_requested())

    def fail(self, failure: TrainerFailure) -> None:
        """Leave a failure file."""
        self._channel.fail(failure)

    def tokenized(self) -> dict[str, pa.Table]:
        """Nothing: each node tokenises for itself."""
        return {}


def rank_main(job_json: str, folder: str) -> str:
    """Entry point of each process that torch elastic starts: returns the outcome."""
    _die_with_launcher()
    job = Job.model_validate_json(job_json)
    runtime = TorchrunRuntime(Channel(Path(folder)), starting(job))
    try:
        return str(_train(job, runtime))
    except Exception as error:  # noqa: BLE001  the edge of the process; `launch` raises it again
        runtime.fail(failure_of(error).report(runtime.place.rank))
        sys.exit(failure_of(error).exit_code)


def _die_with_launcher() -> None:
    """Kill this process when the launcher dies, however it dies.

    A rank that outlived its launcher would hold the devices, and train on until its next look at the claims. (PR_SET_PDEATHSIG
    would look at the fork server.)
    """
    launcher = multiprocessing.parent_process()

    def watch() -> None:
        connection.wait([launcher.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _train(job: Job, runtime: TorchrunRuntime) -> Outcome:
    prepare_process(job)
    import torch.distributed as dist

    from dsft_trainer.rank import run_rank

    device = torch_device(job, runtime.place.local_rank)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=job.spec.deadlines.stall_seconds + MARGIN_SECONDS),
        device_id=device if device.type == "cuda" else None,
    )
    outcome = run_rank(job, runtime, device)
    dist.destroy_process_group()
    return outcome


def launch(job: Job, channel: Channel) -> Outcome:
    """Run all ranks of an attempt on this machine; returns when they ended.

    Raises:
        TrainerError: the failure that a rank reported, or WorkerLost when none could.
    """
    start_method = _start_method(job)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.ranks.count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=job.run.uid,
        # A lost rank ends the attempt here: what starts attempts is at hand.
        max_restarts=0,
        monitor_interval=0.1,
        start_method=start_method,
        # SIGINT and SIGTERM stay with the driver: torch would kill the ranks 30 s later, whatever drainSeconds says.
        signals_to_handle="SIGHUP,SIGQUIT",
        logs_specs=DefaultLogsSpecs(log_dir=tempfile.mkdtemp(prefix="dsft-logs-")),
    )
    try:
        outcomes = elastic_launch(config, rank_main)(job.to_json(), str(channel.folder))
    except ChildFailedError as error:
        raise _failure(channel, error) from error
    except SignalException as error:
        # The agent passed the signal on and waited: the ranks have committed, or were killed after 30 s.
        log.info("stopped by signal %s", error.sigval)
        if channel.failure() is not None:
            raise _failure(channel, error) from error
        return Outcome.INTERRUPTED
    return Outcome(outcomes[0])


def _start_method(job: Job) -> str:
    """How a rank's process comes to be: on CPU forked from a server that did the imports, once and beside ours.

    On GPUs a new interpreter: what touches CUDA at import would be lost in a fork.
    """
    if job.ranks.device == "cuda":
        return "spawn"
    os.environ.update(rank_environment(job))
    forkserver.set_forkserver_preload(["dsft_trainer.rank"])
    forkserver.ensure_running()
    return "forkserver"


def _failure(channel: Channel, error: BaseException) -> TrainerError:
    reported = channel.failure()
    if reported is not None:
        return TrainerError.from_report(reported)
    return TrainerError(FailureClass.WORKER_LOST, f"a rank died without a word ({type(error).__name__})")
