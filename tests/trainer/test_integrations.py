"""What the callbacks for frameworks report, and when. Whole runs of them are in test_programs."""

from types import SimpleNamespace
from typing import Any

import pytest

from dsft_trainer import context
from dsft_trainer.integrations import lightning


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    epochs: list[int] = []
    monkeypatch.setattr(lightning, "_report", lambda _, epoch: epochs.append(epoch))
    return epochs


def epoch(callback: lightning.ReportCallback, trainer: Any) -> None:
    """One epoch of two batches."""
    for batch in range(2):
        callback.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    callback.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    trainer.current_epoch += 1


def test_an_epoch_after_which_another_callback_stops_is_reported(reported: list[int]) -> None:
    """Lightning's EarlyStopping says so before, and with `min_epochs` the training goes on all the same."""
    trainer = SimpleNamespace(current_epoch=0, should_stop=False)
    callback = lightning.ReportCallback()
    epoch(callback, trainer)
    trainer.should_stop = True
    epoch(callback, trainer)
    epoch(callback, trainer)
    assert reported == [1, 2, 3]


def test_a_drained_run_is_reported_once(reported: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SimpleNamespace(current_epoch=4, should_stop=False)
    monkeypatch.setattr(context, "drain_requested", lambda: True)
    epoch(lightning.ReportCallback(), trainer)
    assert reported == [4]
    assert trainer.should_stop
