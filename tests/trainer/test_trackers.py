"""MLflow and Weights & Biases by their own clients: what arrives, what a restart finds, and that no trouble reaches training.

Weights & Biases runs offline, with its real service process. MLflow's client speaks to a small double of its server
(`mlflow_server`): a real one wants far more packages than the trainer.
"""

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsft_api.job import Job, Ranks, RunRef
from dsft_api.spec import FineTuneSpec
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.metrics import MetricsLog
from dsft_trainer.runtime import Outcome
from dsft_trainer.trackers import Point, Tracker, trackers_of
from tests.trainer.mlflow_server import MlflowServer

UID = "6f1b7e4e-3a0e-5d0c-9b1f-0d5f7a1c2e11"
# Starting a client's processes takes long where the cores are busy.
PATIENCE = 240.0


def job(**tracking: Any) -> Job:
    spec = FineTuneSpec.model_validate(
        {
            "model": {"uri": "hf://a/b", "task": "causal-lm"},
            "data": {"train": {"uri": "hf://c/d", "format": "text"}},
            "training": {"maxSteps": 4, "globalBatchSize": 8, "optimizer": {"learningRate": 1e-5}},
            "tracking": tracking,
        }
    )
    return Job(
        run=RunRef(namespace="ml", name="chat", uid=UID),
        attempt=1,
        spec=spec,
        spec_hash="sha256:0",
        storage_prefix="",
        ranks=Ranks(count=1, device="cpu", threads=1),
    )


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsft_trainer.trackers.CLOSE_SECONDS", PATIENCE)


def attempt(asked: Job, folder: Path, steps: range, outcome: Outcome | None) -> None:
    """What rank 0 does with its metrics in one attempt."""
    store = open_store((folder / "storage").as_uri())
    scratch = folder / f"scratch-{steps.start}"
    log = MetricsLog(store, "a1.g1", scratch, tensorboard=False, trackers=trackers_of(asked, scratch, store))
    for step in steps:
        log.write("train", step, {"loss": 1.0 / step})
    log.write("eval", steps[-1], {"loss": 0.5})
    log.close(outcome)


def test_mlflow_gets_all_metrics_in_one_run_over_two_attempts(tmp_path: Path) -> None:
    with MlflowServer() as server:
        asked = job(mlflow={"trackingUri": server.uri})
        attempt(asked, tmp_path, range(1, 3), Outcome.INTERRUPTED)
        (run,) = server.runs.values()
        assert (run.status, run.name, run.tags["dsft.uid"]) == ("KILLED", "chat", UID)
        attempt(asked, tmp_path, range(2, 4), Outcome.SUCCEEDED)
        (run,) = server.runs.values()
    assert server.experiments == {"ml": "1"}
    assert run.status == "FINISHED"
    assert run.params["training.optimizer.learningRate"] == "1e-05"
    assert [(key, step) for key, step, _ in run.metrics] == [
        ("train/loss", 1),
        ("train/loss", 2),
        ("eval/loss", 2),
        ("train/loss", 2),
        ("train/loss", 3),
        ("eval/loss", 3),
    ]


def test_wandb_offline_leaves_its_files_in_storage_and_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    before = set(psutil.Process().children(recursive=True))
    attempt(job(wandb={"project": "p"}), tmp_path, range(1, 3), Outcome.SUCCEEDED)
    store = open_store((tmp_path / "storage").as_uri())
    (synced,) = [entry.key for entry in store.list("wandb") if entry.key.endswith(".wandb")]
    assert f"run-{UID}.wandb" in synced
    content = store.get_bytes(synced) or b""
    assert b"train/loss" in content
    assert b"0123456789abcdef" not in content
    assert "0123456789abcdef" not in "".join(capfd.readouterr())
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []


def test_a_server_that_refuses_is_given_up_with_one_line_and_without_the_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "very-secret")
    with MlflowServer(refuse="no such token: very-secret") as server:
        caplog.set_level(logging.WARNING)
        attempt(job(mlflow={"trackingUri": server.uri}), tmp_path, range(1, 3), Outcome.SUCCEEDED)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dsft_trainer.trackers"]
    assert "tracking.mlflow is given up, training goes on" in line
    assert "very-secret" not in line
    store = open_store((tmp_path / "storage").as_uri())
    assert len(store.list("metrics")) == 1


class Stuck:
    """A client that never returns."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def write(self, point: Point) -> None:
        self.let_go.wait(PATIENCE)

    def close(self, outcome: Outcome | None) -> None: ...


def test_a_tracker_that_hangs_holds_up_neither_the_loop_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dsft_trainer.trackers.CLOSE_SECONDS", 0.2)
    monkeypatch.setattr("dsft_trainer.trackers.QUEUE_LENGTH", 5)
    client = Stuck()
    tracker = Tracker("stuck", lambda: client)
    begin = time.monotonic()
    for step in range(100):
        tracker.write("train", step, {"loss": 1.0})
    tracker.close(Outcome.SUCCEEDED)
    assert time.monotonic() - begin < 5
    client.let_go.set()
    lines = [record.getMessage() for record in caplog.records if "tracking.stuck" in record.getMessage()]
    assert len(lines) == 1


def test_a_client_that_ends_the_process_ends_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    def connect() -> Any:
        raise SystemExit(1)

    tracker = Tracker("rude", connect)
    tracker.close(None)
    assert os.getpid()
    assert "tracking.rude is given up" in caplog.text
