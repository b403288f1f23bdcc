"""What rank 0 says while it trains, in the log and in storage, and where it says that its time went."""

import logging
import queue
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dsft_api.conditions import FailureClass
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import CheckpointRef, Checkpoints, EvaluationStatus, ProgressStatus, Spent
from dsft_trainer import progress as progress_module
from dsft_trainer.checkpoint.listing import make_claim
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.errors import TrainerError
from dsft_trainer.progress import Reporter
from tests.trainer.runs import wait_until

NOW = datetime(2026, 1, 1, tzinfo=UTC)


FIRST = Progress(seq=0, run_uid="u", attempt=1, phase=TrainerPhase.STARTING, updated_at=NOW)


def test_who_was_superseded_is_told_so_and_overwrites_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    make_claim(store, 1, None, 1)
    told: queue.Queue[TrainerError] = queue.Queue()
    reporter = Reporter(FIRST, lambda _: None, store, told.put)
    reporter.update(message="alone")
    wait_until(lambda: "alone" in str(store.get_bytes("progress.json")), "the first document", 30)
    make_claim(store, 2, None, 1)
    store.put_bytes("progress.json", b"of attempt 2")
    reporter.close()
    error = told.get(timeout=30)
    assert error.failure_class is FailureClass.HEAD_LOST
    assert "a2.g1 has taken this run over from a1.g1" in error.message
    assert store.get_bytes("progress.json") == b"of attempt 2"


def test_evaluations_commits_and_the_step_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsft_trainer.progress")
    reporter = Reporter(FIRST, lambda _: None, open_store(tmp_path.as_uri()))
    step = ProgressStatus(step=6, total_steps=24, loss=0.25)
    latest = CheckpointRef(uri="s3://b/step-6", step=6, world_size=2, bytes=1, time=NOW, digest="sha256:0")
    for _ in range(2):
        reporter.update(progress=step)
        reporter.update(evaluation=EvaluationStatus(step=6, metrics={"accuracy": 0.5}))
        reporter.update(checkpoints=Checkpoints(latest=latest))
    reporter.close()
    assert [record.getMessage() for record in caplog.records] == [
        "step 6 of 24: loss 0.25",
        "step 6: evaluation: accuracy 0.5",
        "step 6: committed s3://b/step-6",
    ]


def test_each_second_is_charged_and_a_commit_holds_what_was_trained_before_its_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return NOW + timedelta(seconds=seconds)

    monkeypatch.setattr(progress_module, "datetime", Clock)
    opening = Progress(
        seq=0,
        run_uid="u",
        attempt=1,
        phase=TrainerPhase.STARTING,
        spent=Spent(useful_seconds=100, redone_seconds=50, restart_seconds=1),
        updated_at=NOW,
    )
    reporter = Reporter(opening, lambda _: None, open_store(tmp_path.as_uri()))

    def pass_time(more: int, **changes: Any) -> Spent | None:
        nonlocal seconds
        seconds += more
        reporter.update(**changes)
        return reporter.progress.spent

    def at(step: int) -> ProgressStatus:
        return ProgressStatus(step=step, total_steps=24)

    def latest(step: int) -> Checkpoints:
        return Checkpoints(
            latest=CheckpointRef(uri="s3://b", step=step, world_size=2, bytes=1, time=NOW, digest="sha256:0")
        )

    pass_time(3, phase=TrainerPhase.LOADING)
    # What the start went on from is nobody's save.
    pass_time(7, phase=TrainerPhase.TRAINING, checkpoints=latest(2))
    pass_time(20, progress=at(3))
    pass_time(0, phase=TrainerPhase.SAVING)
    pass_time(2, phase=TrainerPhase.TRAINING)
    pass_time(10, progress=at(4))
    pass_time(5, phase=TrainerPhase.EVALUATING)
    # The next save begins before the one before it is told to have been committed.
    pass_time(4, phase=TrainerPhase.SAVING)
    spent = pass_time(1, phase=TrainerPhase.TRAINING, checkpoints=latest(3))
    expected = {"useful_seconds": 139, "redone_seconds": 50, "blocked_seconds": 3, "restart_seconds": 11}
    assert spent == Spent(**expected, uncommitted_seconds=19)
    spent = pass_time(6, checkpoints=latest(4))
    assert spent == Spent(**expected | {"useful_seconds": 145}, uncommitted_seconds=6)
    reporter.close()


def test_a_start_that_has_not_said_its_claim_is_not_superseded_by_it(tmp_path: Path) -> None:
    """The second start of an attempt opens with the number of the first one, and claims the next while it is looked for."""
    store = open_store(tmp_path.as_uri())
    make_claim(store, 1, None, 1)
    mine = make_claim(store, 1, None, 1)
    told: queue.Queue[TrainerError] = queue.Queue()
    reporter = Reporter(FIRST, lambda _: None, store, told.put)
    reporter.update(message="opening")
    wait_until(lambda: "opening" in str(store.get_bytes("progress.json")), "the document", 30)
    assert told.empty()
    reporter.claimed(mine)
    make_claim(store, 1, None, 1)
    reporter.close()
    assert "a1.g3 has taken this run over from a1.g2" in told.get(timeout=30).message
