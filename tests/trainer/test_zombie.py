"""An attempt that is frozen, superseded by another one elsewhere, and thawed: it harms nothing, and ends with the reason."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsft_api.conditions import ExitCode, FailureClass
from dsft_api.job import JOB_ENV, Ranks
from dsft_api.layout import PROGRESS_FILE, RESULT_FILE
from dsft_api.progress import Progress
from dsft_cli.local_run import job_for
from dsft_trainer.checkpoint.listing import read_commits
from dsft_trainer.runtime.channel import Channel
from tests.s3_faults import faulty
from tests.s3_server import REGION, S3Server
from tests.trainer.killing import assert_same_training, killed_manifest, never_killed
from tests.trainer.runs import PATIENCE_SECONDS, Manifest, Run, family, is_alive, ranks, session, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 24
# The look at the claims comes every 15 s, whatever training does. Generous, since others may use the cores.
END_SECONDS = 60.0
REASON = "a2.g1 has taken this run over from a1.g1"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return killed_manifest(tmp_path_factory.mktemp("assets"), STEPS)


@pytest.fixture(scope="module")
def reference(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return never_killed(manifest, tmp_path_factory.mktemp("reference") / "run")


def test_frozen_while_its_commit_is_on_its_way(
    manifest: Manifest, reference: Run, tmp_path: Path, s3_server: S3Server, s3_uri: str
) -> None:
    """Two machines, one run in S3. The zombie's COMMIT.json arrives when the other one has gone on; so do its next words."""
    with faulty(s3_server.endpoint) as proxy:
        storage = {"uri": s3_uri, "endpointUrl": proxy.endpoint, "region": REGION}
        document = {**manifest, "spec": {**manifest["spec"], "storage": storage}}
        commit = proxy.hold(lambda method, path: method == "PUT" and path.endswith("/step-00000009-a1.g1/COMMIT.json"))
        brake = proxy.hold(lambda method, path: method == "PUT" and "/step-00000018-a2.g1/" in path)
        first = Run(document, tmp_path / "first")
        log = first.local().log_file(1)
        with first.started("torchrun") as zombie:
            wait_until(lambda: zombie.poll() is not None or bool(commit.held), "a commit on its way")
            assert zombie.poll() is None, first.log_tail()
            frozen = freeze(family(zombie))
            second = Run(document, tmp_path / "second")
            with second.started("torchrun") as other:
                wait_until(lambda: other.poll() is not None or bool(brake.held), "step 18 of the second attempt")
                assert other.poll() is None, second.log_tail()
                commit.open()
                wait_until(lambda: bool(commit.passed), "the zombie's commit")
                assert [c.name for c in read_commits(second.store)][-1].endswith("-a2.g1")
                thaw(frozen)
                assert zombie.wait(END_SECONDS) == ExitCode.OTHER
                assert progress_in_storage(second).attempt == 2
                brake.open()
                assert other.wait(PATIENCE_SECONDS) == ExitCode.OK, second.log_tail()
    assert REASON in log.read_text()
    assert_ended(first.told())
    assert_unharmed(second, reference)


@pytest.mark.drill
def test_frozen_on_ray_with_files(manifest: Manifest, reference: Run, tmp_path: Path) -> None:
    """One volume, two drivers with folders of their own, as on a cluster. Ray's own processes were never frozen."""
    run = Run(manifest, tmp_path / "run")
    channels = [Channel(tmp_path / f"channel-{attempt}") for attempt in (1, 2)]
    with trainer(run, channels[0], "ray") as zombie:
        wait_until(lambda: zombie.poll() is not None or run.newest_step() >= 3, "a commit")
        assert zombie.poll() is None, log_of(channels[0])
        frozen = freeze([psutil.Process(zombie.pid), *ranks(zombie)])
        base = run.newest_step()
        with trainer(run, channels[1], "torchrun") as other:
            wait_until(lambda: other.poll() is not None or len(run.claims()) == 2, "the second claim")
            assert other.poll() is None, log_of(channels[1])
            thaw(frozen)
            assert zombie.wait(END_SECONDS) == ExitCode.OTHER
            assert other.wait(PATIENCE_SECONDS) == ExitCode.OK, log_of(channels[1])
    assert run.claims()[-1].base_step >= base
    assert REASON in log_of(channels[0])
    assert_ended(channels[0].progress())
    assert_unharmed(run, reference)


def freeze(processes: list[psutil.Process]) -> list[psutil.Process]:
    """SIGSTOP for all of them, and wait until they stand still."""
    alive = [process for process in processes if is_alive(process)]
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    wait_until(lambda: not any(map(is_moving, alive)), f"a standstill of {[process.pid for process in alive]}", 60)
    return alive


def is_moving(process: psutil.Process) -> bool:
    """Whether it may still run code of ours: what waits in the kernel stops before it comes back, and a zombie never does."""
    still = (psutil.STATUS_STOPPED, psutil.STATUS_DISK_SLEEP, psutil.STATUS_ZOMBIE)
    try:
        return process.is_running() and process.status() not in still
    except psutil.NoSuchProcess:
        return False


def thaw(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.resume()


@contextmanager
def trainer(run: Run, channel: Channel, runtime: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The next attempt, as the operator starts it: told all by its environment."""
    job = job_for(run.local(), Ranks(count=2, device="cpu", threads=1), str(run.file))
    channel.folder.mkdir()
    with session(
        [sys.executable, "-m", "dsft_trainer", "run", "--runtime", runtime],
        channel.folder / "log",
        DSFT_CHANNEL=str(channel.folder),
        DSFT_SCRATCH=str(channel.folder),
        **{JOB_ENV: job.to_json()},
    ) as process:
        yield process


def log_of(channel: Channel) -> str:
    return (channel.folder / "log").read_text()


def progress_in_storage(run: Run) -> Progress:
    return Progress.model_validate_json(run.store.get_bytes(PROGRESS_FILE) or b"")


def assert_ended(told: Progress | None) -> None:
    """It says why, where whoever started it reads."""
    assert told is not None
    assert told.failure is not None
    assert told.failure.failure_class is FailureClass.HEAD_LOST
    assert REASON in told.failure.message


def assert_unharmed(run: Run, reference: Run) -> None:
    """All that is read of the run is the second attempt's, and is what it would be without the first."""
    first, second = run.claims()
    assert (str(first.id), str(second.id)) == ("a1.g1", "a2.g1")
    assert 0 < second.base_step < STEPS
    assert all(commit.claim == second.id or commit.step <= second.base_step for commit in read_commits(run.store))
    run.assert_commits_whole()
    result: dict[str, Any] = json.loads(run.store.get_bytes(RESULT_FILE) or b"{}")
    retained = [ref["uri"].rpartition("/")[2] for ref in result["checkpoints"]["retained"]]
    assert [commit.name for commit in read_commits(run.store)] == retained
    assert (result["attempt"], result["phase"]) == (2, "succeeded")
    last = progress_in_storage(run)
    assert (last.attempt, last.phase) == (2, "succeeded")
    assert_same_training(run, reference)
