"""A run on Ray that is killed without warning, as a whole or in part, trains exactly as one that never was."""

import subprocess
from pathlib import Path

import psutil
import pytest

from dsft_api.conditions import FailureClass
from dsft_cli.follow import read_status
from tests.trainer.killing import (
    STEPS,
    assert_same_training,
    in_storage,
    kill_and_compare,
    killed_manifest,
    killer_of,
    never_killed,
)
from tests.trainer.runs import PATIENCE_SECONDS, Manifest, Run, is_alive, ranks, wait_until

# Longer than what a start does in one piece on a busy machine.
STALL_SECONDS = 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return killed_manifest(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def reference(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return never_killed(manifest, tmp_path_factory.mktemp("reference") / "run")


@pytest.mark.drill
def test_killed_twice_with_files(manifest: Manifest, reference: Run, tmp_path: Path) -> None:
    killer = killer_of(manifest, tmp_path / "run", "ray", "file")
    kill_and_compare(killer, reference, finisher="ray", kills=2)


@pytest.mark.drill
def test_killed_with_s3_and_finished_by_torchrun(
    manifest: Manifest, reference: Run, tmp_path: Path, s3_uri: str
) -> None:
    """Who starts the ranks may change between attempts."""
    killer = killer_of(in_storage(manifest, s3_uri), tmp_path / "run", "ray", "s3")
    kill_and_compare(killer, reference, finisher="torchrun", kills=1)


def test_ranks_that_are_killed_and_hang_are_healed_inside_the_attempt(
    manifest: Manifest, reference: Run, tmp_path: Path
) -> None:
    """First one rank is killed, then one is stopped; each time after a commit of that start of the ranks."""
    spec = manifest["spec"] | {"deadlines": {"stallSeconds": STALL_SECONDS}}
    run = Run({**manifest, "spec": spec}, tmp_path / "run")
    with run.started("ray") as process:
        killed = rank_after_commit(run, process, group=1)
        killed.kill()
        stopped = rank_after_commit(run, process, group=2)
        stopped.suspend()
        wait_until(lambda: not is_alive(stopped), "the end of the rank that hangs")
        code = process.wait(PATIENCE_SECONDS)
    assert code == 0, run.log_tail()

    assert [str(claim.id) for claim in run.claims()] == ["a1.g1", "a1.g2", "a1.g3"]
    run.assert_commits_whole()
    assert_same_training(run, reference)
    status = read_status(run.local())
    assert status is not None
    (attempt,) = status.attempts
    assert (attempt.from_step, attempt.to_step, attempt.exit_code, attempt.restarts) == (0, STEPS, 0, 2)
    assert [loss.failure_class for loss in attempt.losses] == [FailureClass.WORKER_LOST, FailureClass.HANG]
    assert all(loss.step for loss in attempt.losses)
    # The one that was stopped could not write its own.
    stacks = run.local().state / "logs" / "attempt-1"
    assert len(list(stacks.glob("stacks-rank-*-start-2.txt"))) == len(list(stacks.glob("stacks-*"))) == 1
    assert "stacks are in" in attempt.losses[1].message
    # What was trained since the commits, and the time that the ranks hung.
    assert attempt.spent is not None
    assert attempt.spent.redone_seconds >= STALL_SECONDS
    assert attempt.spent.useful_seconds > 0
    first, second, third = (claim.base_step for claim in run.claims())
    assert first == 0 < second < third


def rank_after_commit(run: Run, process: "subprocess.Popen[bytes]", group: int) -> psutil.Process:
    """A rank of this start, once it has committed."""
    wait_until(
        lambda: process.poll() is not None or any(name.endswith(f"-a1.g{group}") for name in committed(run)),
        f"a commit of start {group}",
    )
    assert process.poll() is None, run.log_tail()
    members = ranks(process)
    assert len(members) == 2, members
    return members[1]


def committed(run: Run) -> list[str]:
    return [name for name, whole in run.checkpoints().items() if whole]
