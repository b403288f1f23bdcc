"""Runs the trainer of one attempt as a process, shows what it tells, and keeps status.yaml up to date."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime

import yaml
from pydantic import ValidationError

from dsft_api.conditions import ExitCode
from dsft_api.job import JOB_ENV, Job
from dsft_api.progress import PROGRESS_FILE, Progress, TrainerPhase
from dsft_api.resource import DeepSpeedFineTune, spec_hash
from dsft_api.status import FineTuneStatus
from dsft_cli.local_run import LocalRun, is_running
from dsft_cli.local_status import status_of
from dsft_cli.view import View

POLL_SECONDS = 0.1


def follow(run: LocalRun, job: Job, runtime: str, environment: Mapping[str, str], view: View) -> int:
    """Run one attempt to its end; the trainer's exit code.

    SIGINT and SIGTERM are passed on: the trainer commits and stops; a second one stops it at once.
    """
    log = run.log_file(job.attempt)
    log.parent.mkdir(parents=True, exist_ok=True)
    run.channel.mkdir(parents=True, exist_ok=True)
    (run.channel / PROGRESS_FILE).unlink(missing_ok=True)
    with log.open("ab") as output:
        trainer = subprocess.Popen(
            [sys.executable, "-m", "dsft_trainer", "run", "--runtime", runtime],
            env={**environment, JOB_ENV: job.to_json(), "DSFT_CHANNEL": str(run.channel)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _pass_signals_on(trainer, view, job)
        return _watch(run, job, trainer, view)


def _pass_signals_on(trainer: "subprocess.Popen[bytes]", view: View, job: Job) -> None:
    def pass_on(_number: int, _frame: object) -> None:
        view.say(
            f"[yellow]stopping[/]: committing at the next step, {job.spec.checkpoint.drain_seconds} s at most;"
            " once more to stop at once"
        )
        if trainer.poll() is None:
            trainer.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)


def _watch(run: LocalRun, job: Job, trainer: "subprocess.Popen[bytes]", view: View) -> int:
    seen = -1
    gpus = job.ranks.count if job.ranks.device == "cuda" else 0
    while True:
        code = trainer.poll()
        progress = read_progress(run)
        if progress is not None and progress.seq != seen and progress.attempt == job.attempt:
            seen = progress.seq
            view.show(progress)
            write_status(run, _next_status(run, progress, gpus=gpus))
        if code is not None:
            break
        time.sleep(POLL_SECONDS)
    # A process that a signal killed has a negative code, which is no exit code of ours.
    code = code if code >= 0 else int(ExitCode.OTHER)
    last = read_progress(run)
    # A trainer that ended before its first word leaves that of the attempt before it.
    told = last if last is not None and last.attempt == job.attempt else _silence(run, job)
    write_status(run, _next_status(run, told, code, gpus=gpus))
    return code


def settle_status(run: LocalRun) -> None:
    """Bring status.yaml up to date with a trainer that ended when nobody was watching any more."""
    progress = read_progress(run)
    status = read_status(run)
    if progress is None or is_running(run):
        return
    # By the attempt that told, not by the last claim: one that was refused has made none.
    if status is not None and any(a.number == progress.attempt and a.end_time for a in status.attempts):
        return
    match progress.phase:
        case TrainerPhase.SUCCEEDED:
            code = ExitCode.OK
        case TrainerPhase.INTERRUPTED:
            code = ExitCode.INTERRUPTED
        case _:
            code = progress.failure.exit_code if progress.failure else ExitCode.OTHER
    # Nobody knows when it ended: time in which nothing ran must not count.
    write_status(run, _next_status(run, progress, int(code), now=progress.updated_at))


def _next_status(
    run: LocalRun,
    progress: Progress,
    exit_code: int | None = None,
    *,
    now: datetime | None = None,
    gpus: int | None = None,
) -> FineTuneStatus:
    return status_of(
        progress,
        read_status(run),
        spec_hash=spec_hash(run.resource.spec),
        storage_prefix=run.storage_prefix,
        logs=run.log_file(progress.attempt).parent.as_uri(),
        now=now or datetime.now(UTC),
        exit_code=exit_code,
        gpus=gpus,
    )


def _silence(run: LocalRun, job: Job) -> Progress:
    """What a trainer that died before its first word would have told."""
    return Progress(
        seq=0, run_uid=run.uid, attempt=job.attempt, phase=TrainerPhase.FAILED, updated_at=datetime.now(UTC)
    )


def read_progress(run: LocalRun) -> Progress | None:
    """The trainer's last document; None if there is none."""
    try:
        return Progress.model_validate_json((run.channel / PROGRESS_FILE).read_text())
    except (FileNotFoundError, ValidationError):
        return None


def read_status(run: LocalRun) -> FineTuneStatus | None:
    """What status.yaml says; None if there is none."""
    if not run.status_file.exists():
        return None
    return DeepSpeedFineTune.model_validate(yaml.safe_load(run.status_file.read_text())).status


def write_status(run: LocalRun, status: FineTuneStatus) -> None:
    """Replace status.yaml: the resource as `kubectl get -o yaml` would show it."""
    manifest = run.resource.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"status"})
    text = yaml.safe_dump({**manifest, "status": status.to_wire()}, sort_keys=False)
    temporary = run.status_file.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(run.status_file)
