"""What rank 0 says in the log while it trains."""

import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import CheckpointRef, Checkpoints, EvaluationStatus, ProgressStatus
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.progress import Reporter

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_evaluations_commits_and_the_step_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsft_trainer.progress")
    first = Progress(seq=0, run_uid="u", attempt=1, phase=TrainerPhase.STARTING, updated_at=NOW)
    reporter = Reporter(first, lambda _: None, open_store(tmp_path.as_uri()))
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
