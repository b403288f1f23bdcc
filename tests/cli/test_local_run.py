"""What the command knows of a run on this machine from the lock that its trainer holds."""

import fcntl
import threading
from pathlib import Path

import pytest
import yaml

from dsft_api.manifest import parse
from dsft_cli import local_run
from dsft_cli.local_run import LocalRun, find_run, has_ended, is_running
from tests.trainer.runs import causal_lm


@pytest.fixture
def run(tmp_path: Path) -> LocalRun:
    manifest = causal_lm("held", tmp_path / "model", tmp_path / "prompt_completion.jsonl", steps=1)
    found = find_run(parse(yaml.safe_dump(manifest), "held.yaml"), tmp_path / "runs")
    found.channel.mkdir(parents=True)
    return found


def test_a_run_that_never_was_has_ended(run: LocalRun) -> None:
    assert not is_running(run)
    assert has_ended(run)


def test_a_killed_trainer_that_still_holds_its_lock_is_waited_for(run: LocalRun) -> None:
    with (run.channel / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dying = threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN))
        dying.start()
        assert is_running(run)
        assert has_ended(run)
        dying.join()


def test_a_trainer_that_lives_has_not_ended(run: LocalRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_run, "KILLED_LINGERS_SECONDS", 0.2)
    with (run.channel / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not has_ended(run)
