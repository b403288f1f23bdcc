"""One attempt as a process: check what can be checked, start the ranks, and end with an exit code that says how it went.

Runs on the Ray head (or here, with `dsft run`). SIGINT and SIGTERM ask the ranks to commit and stop; a second one, or
`checkpoint.drainSeconds` without a commit, ends the process at once.
"""

import fcntl
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from dsft_api import goodput, layout
from dsft_api.conditions import ExitCode, FailureClass
from dsft_api.job import CONTRACT, JOB_ENV, Job
from dsft_api.progress import TrainerPhase
from dsft_api.status import Inputs
from dsft_trainer.ask import RAY_ADDRESS_ENV, drain, save
from dsft_trainer.checkpoint.listing import claimed_ids, make_claim
from dsft_trainer.checkpoint.store import store_of
from dsft_trainer.errors import TrainerError, failure_of
from dsft_trainer.logs import LogShipper, keep_last_lines, output_files
from dsft_trainer.pins import pinned
from dsft_trainer.preflight import preflight
from dsft_trainer.process import start_environment
from dsft_trainer.progress import starting
from dsft_trainer.runtime import Outcome
from dsft_trainer.runtime.channel import Channel
from dsft_trainer.versions import versions

log = logging.getLogger(__name__)

SAME_SIGNAL_SECONDS = 1.0
LAST_OUTPUT_SECONDS = 5.0
# Ends of a rank of which it cannot tell itself.
_WITHOUT_A_WORD = (FailureClass.WORKER_LOST, FailureClass.HOST_OOM)
POD_STDOUT_ENV = "DSFT_POD_STDOUT"

# Set before Ray is imported. A training run of minutes must not wait seconds for polls, and a private Ray says nothing home.
_RAY_DEFAULTS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    # Ray Train tries for ever to start ranks for which there are no nodes. A pod that was lost is back in a minute or two.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}


def run(runtime: str) -> int:
    """Do the attempt that DSFT_JOB describes; the exit code."""
    printed = output_files()
    # The last of the log is shipped when the last was printed.
    with ExitStack() as afterwards, _output_copied(os.environ.get(POD_STDOUT_ENV)):
        return _run(runtime, printed, lambda job: _ship_log(job, printed, afterwards))


def look_ahead(*, here: bool) -> int:
    """Check all that can be checked of DSFT_JOB before there are ranks; the exit code. `here`: this is where they will run."""
    from dsft_trainer.preflight_job import preflight as look

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)
    try:
        job = read_job(os.environ)
    except TrainerError as error:
        log.error("%s", error)  # noqa: TRY400  the message is the whole story
        return error.exit_code
    return look(job, here=here)


def _ship_log(job: Job, printed: Sequence[Path], afterwards: ExitStack) -> None:
    """Bring this process's log to storage from now on, where it would go with a pod. `dsft run` keeps it itself."""
    if os.environ.get(RAY_ADDRESS_ENV):
        afterwards.enter_context(LogShipper.of(job, store_of(job), "driver", printed))


def _run(runtime: str, printed: Sequence[Path], begin: Callable[[Job], None]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)
    channel = Channel(Path(os.environ.get("DSFT_CHANNEL") or tempfile.mkdtemp(prefix="dsft-channel-")))
    try:
        job = read_job(os.environ)
    except TrainerError as error:
        log.error("%s", error)  # noqa: TRY400  the message is the whole story
        return error.exit_code
    for name, value in {**_RAY_DEFAULTS, **start_environment(job)}.items():
        os.environ.setdefault(name, value)
    begin(job)
    try:
        with only_one(channel.folder):
            return _run_recorded(job, channel, runtime, printed)
    except TrainerError as error:
        log.error("%s", error)  # noqa: TRY400  the message is the whole story
        return error.exit_code


@contextmanager
def _output_copied(target: str | None) -> Iterator[None]:
    """Have all that this process prints appear in another file too: the head pod's own output, where collectors look."""
    if not target:
        yield
        return
    # Ray stops a job by a signal to the driver and to all below it; and it waits for all of them, so this one ends with us.
    reading, writing = os.pipe()
    deaf = ["sh", "-c", 'trap "" INT TERM; exec tee -a "$0"', target]
    tee = subprocess.Popen(deaf, stdin=reading, start_new_session=True)
    os.close(reading)
    _redirect_output(writing)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        yield
    finally:
        _redirect_output(os.open(os.devnull, os.O_WRONLY))
        # Ray reads the end of the log when we are gone: it must be there.
        with suppress(subprocess.TimeoutExpired):
            tee.wait(LAST_OUTPUT_SECONDS)


def _redirect_output(target: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(target, stream.fileno())
    os.close(target)


def _run_recorded(job: Job, channel: Channel, runtime: str, printed: Sequence[Path]) -> int:
    """The attempt, with its beginning and a failure written to the progress document; the exit code."""
    channel.reset()
    if job.spec.program is None:
        # A program listens from when it first asks.
        channel.listen()
    _stop_on_signals(channel, job.spec.checkpoint.drain_seconds)
    channel.publish(starting(job).model_dump_json(by_alias=True, exclude_none=True))
    try:
        outcome = _attempt(job, channel, runtime)
    except Exception as error:  # noqa: BLE001  the edge of the process
        failure = failure_of(error)
        log.error("%s", failure)  # noqa: TRY400
        if failure.evidence is None and failure.failure_class in _WITHOUT_A_WORD:
            # What the ranks print comes here too.
            failure.evidence = keep_last_lines(job, "driver", printed)
        _record(job, channel, phase=TrainerPhase.FAILED, failure=failure.report())
        return failure.exit_code
    if job.spec.program is not None:
        _record_end(job, channel, outcome)
    return ExitCode.INTERRUPTED if outcome is Outcome.INTERRUPTED else ExitCode.OK


def read_job(environment: os._Environ[str]) -> Job:
    """The job in the environment.

    Raises:
        TrainerError: ConfigInvalid if there is none, or it is of another contract.
    """
    text = environment.get(JOB_ENV)
    if not text:
        raise TrainerError(FailureClass.CONFIG_INVALID, f"{JOB_ENV} is not set", "start runs with `dsft run -f FILE`")
    try:
        job = Job.model_validate_json(text)
    except ValidationError as error:
        raise TrainerError(FailureClass.CONFIG_INVALID, f"{JOB_ENV} is no job: {error}") from error
    if job.contract != CONTRACT:
        side = "trainer image" if job.contract > CONTRACT else "operator"
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"the job speaks contract {job.contract}, this trainer {CONTRACT}",
            f"upgrade the {side}",
        )
    return job


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the run's lock on this machine, for as long as the process lives.

    Raises:
        TrainerError: ConfigInvalid if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainerError(
                FailureClass.CONFIG_INVALID,
                f"this run is running already, in process {_first_line(lock)}",
                "wait for it, or stop it; `dsft status` shows it",
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _first_line(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.readline().strip() or "unknown"


def _attempt(job: Job, channel: Channel, runtime: str) -> Outcome:
    if job.spec.program is not None and runtime != "ray":
        raise TrainerError(FailureClass.CONFIG_INVALID, "spec.program needs Ray", "use --runtime ray")
    with tempfile.TemporaryDirectory(prefix="dsft-preflight-") as cache:
        preflight(job, Path(cache))
    job = first_come(job)
    if job.spec.program is not None:
        # The built-in ranks claim for themselves, once they know what they start from.
        make_claim(store_of(job), job.attempt, None, job.ranks.count)
    # Imported by name: the torchrun runtime must work where Ray is not installed.
    launcher = importlib.import_module(f"dsft_trainer.runtime.{runtime}")
    return launcher.launch(job, channel)


def first_come(job: Job) -> Job:
    """Write run.json, or take over what the first attempt wrote: inputs, and threads, on whose number sums depend."""
    store = store_of(job)
    first = json.loads(store.get_bytes(layout.RUN_FILE) or b"{}")
    written, told = Inputs.model_validate(first.get("resolved", {})), job.resolved or Inputs()
    if job.spec.program is None:
        job = pinned(job, written.model_copy(update=told.model_dump(exclude_none=True)))
    if not first:
        facts = {
            "namespace": job.run.namespace,
            "name": job.run.name,
            "uid": job.run.uid,
            "specHash": job.spec_hash,
            "threads": job.ranks.threads,
            "resolved": job.resolved.to_wire() if job.resolved else {},
            "versions": versions(),
            "createdAt": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        store.put_bytes(layout.RUN_FILE, json.dumps(facts, indent=1).encode(), if_absent=True)
        first = json.loads(store.get_bytes(layout.RUN_FILE) or b"{}")
    return job.model_copy(update={"ranks": job.ranks.model_copy(update={"threads": first["threads"]})})


def _record_end(job: Job, channel: Channel, outcome: Outcome) -> None:
    """The last word of a program; the built-in ranks say it themselves."""
    if outcome is Outcome.INTERRUPTED:
        _record(job, channel, phase=TrainerPhase.INTERRUPTED, message="stopped on request")
        return
    told = _record(job, channel, phase=TrainerPhase.SUCCEEDED, message="done")
    store_of(job).put_bytes(layout.RESULT_FILE, told.encode())


def _stop_on_signals(channel: Channel, drain_seconds: int) -> None:
    """Ask the ranks at the first signal, and end the process `drain_seconds` later, or at once where nobody listens."""
    first: list[float] = []

    def stop(number: int, _frame: object) -> None:
        if first:
            # A terminal's Ctrl-C reaches us twice: from the terminal, and passed on by `dsft run`.
            if time.monotonic() - first[0] > SAME_SIGNAL_SECONDS:
                log.warning("second signal: stopping at once, without a commit")
                os._exit(ExitCode.INTERRUPTED)
            return
        first.append(time.monotonic())
        seconds = drain_seconds if channel.listens() else 0
        log.info("%s: asking the ranks to commit and stop, for %s s at most", signal.Signals(number).name, seconds)
        channel.request_drain()
        timer = threading.Timer(seconds, os._exit, (ExitCode.INTERRUPTED,))
        timer.daemon = True
        timer.start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _record(job: Job, channel: Channel, **changes: Any) -> str:
    """Write the last document, here and in storage; what was written."""
    told, now = channel.progress() or starting(job), datetime.now(UTC)
    changes |= {"seq": told.seq + 1, "updated_at": now, "spent": goodput.charged(told, now)}
    progress = told.model_copy(update=changes)
    text = progress.model_dump_json(by_alias=True, exclude_none=True)
    channel.publish(text)
    if progress.failure is not None and progress.failure.failure_class is FailureClass.STORAGE_DENIED:
        return text
    try:
        store = store_of(job)
        newest = max(claimed_ids(store), default=None)
        if newest is None or newest.attempt <= job.attempt:
            store.put_bytes(layout.PROGRESS_FILE, text.encode())
    except Exception as error:  # noqa: BLE001  what became of the run is what matters
        log.warning("progress.json could not be written: %s", error)
    return text


def main(arguments: list[str]) -> int:
    """`python -m dsft_trainer run [--runtime ray|torchrun]`, `preflight [--here]`, `drain`, or `save`."""
    match arguments:
        case ["run"]:
            return run("ray")
        case ["run", "--runtime", ("ray" | "torchrun") as runtime]:
            return run(runtime)
        case ["preflight", *options] if options in ([], ["--here"]):
            return look_ahead(here=bool(options))
        case ["drain"]:
            return drain()
        case ["save"]:
            return save()
        case _:
            sys.stderr.write(
                "usage: python -m dsft_trainer run [--runtime ray|torchrun] | preflight [--here] | drain | save\n"
            )
            return ExitCode.BAD_INPUT
