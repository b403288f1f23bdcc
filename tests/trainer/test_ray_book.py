"""A program's checkpoints: Ray Train's book, and the ledger that the status is made of. Without Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsft_api.spec.identity import EvaluationSpec
from dsft_trainer.checkpoint.ray_book import BOOK, LEDGER, entries, listed, mend, read_ledger
from dsft_trainer.checkpoint.store import Store, open_store

Metrics = dict[str, Any]
LOSS = EvaluationSpec()
F1 = EvaluationSpec(metric="f1")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path.as_uri())


def book(*reported: Metrics) -> bytes:
    """As Ray Train 2.60 writes it, with a folder per step."""
    results = [{"version": 0, "checkpoint_dir_name": f"checkpoint_{m['at']}", "metrics": m} for m in reported]
    latest = results[-1] if results else None
    return json.dumps({"checkpoint_results": results, "latest_checkpoint_result": latest}).encode()


def report(store: Store, *reported: Metrics, evaluation: EvaluationSpec = LOSS, step: int = 0) -> Any:
    """The book after reports, and what is listed then."""
    for metrics in reported:
        store.put_bytes(f"ray/checkpoint_{metrics['at']}/weights", b"x" * 10)
    store.put_bytes(BOOK, book(*reported))
    ledger = read_ledger(store)
    known = ledger.checkpoints if ledger is not None else ()
    return listed(store, known, evaluation=evaluation, step=step, world_size=2)


def test_without_a_book_there_is_nothing(store: Store) -> None:
    assert mend(store) is None
    assert listed(store, (), evaluation=LOSS, step=0, world_size=2) is None
    assert report(store) is None


def test_what_is_in_the_book_is_listed_with_what_it_leaves_out(store: Store) -> None:
    told = report(store, {"at": 5, "step": 5, "epoch": 0.5, "loss": 2.0, "note": "x", "nan": float("nan")})
    (ref,) = told.retained
    assert (ref.uri, ref.step, ref.epoch, ref.world_size, ref.bytes) == (f"{store.uri}/ray/checkpoint_5", 5, 0.5, 2, 10)
    assert ref.metrics == {"at": 5.0, "loss": 2.0}
    assert told.latest == told.best == ref


def test_a_known_one_keeps_its_time_and_one_that_left_the_book_is_forgotten(store: Store) -> None:
    first = report(store, {"at": 1, "step": 1}, {"at": 2, "step": 2})
    second = report(store, {"at": 2, "step": 2}, {"at": 3, "step": 3})
    assert second.retained[0] == first.latest
    assert [ref.step for ref in second.retained] == [2, 3]


def test_without_a_step_it_gets_that_of_the_progress(store: Store) -> None:
    assert report(store, {"at": 1}, step=7).latest.step == 7


@pytest.mark.parametrize(("evaluation", "step"), [(LOSS, 2), (F1, 1)], ids=["loss", "f1"])
def test_the_best_is_by_the_runs_metric(store: Store, evaluation: EvaluationSpec, step: int) -> None:
    reported = (
        {"at": at, "step": at, "loss": loss, "f1": f1} for at, loss, f1 in [(1, 2, 0.9), (2, 1, 0.5), (3, 3, 0.5)]
    )
    assert report(store, *reported, evaluation=evaluation).best.step == step


def test_without_the_metric_none_is_the_best(store: Store) -> None:
    assert report(store, {"at": 1, "step": 1, "loss": 1.0}, evaluation=F1).best is None


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_book_cut_off_in_a_write_is_the_one_before_it_again(store: Store, cut: int) -> None:
    report(store, {"at": 1, "step": 1})
    whole = store.get_bytes(BOOK)
    store.put_bytes(BOOK, book({"at": 1, "step": 1}, {"at": 2, "step": 2})[:cut])
    ledger = mend(store)
    assert store.get_bytes(BOOK) == whole
    assert ledger is not None
    assert [ref.step for ref in ledger.checkpoints] == [1]


def test_the_first_book_cut_off_is_none(store: Store) -> None:
    store.put_bytes(BOOK, b'{"checkpoint_res')
    assert mend(store) is None
    assert store.get_bytes(BOOK) is None


def test_a_ledger_that_is_none_is_left_out(store: Store) -> None:
    report(store, {"at": 1, "step": 1})
    store.put_bytes(LEDGER, b"{}")
    assert mend(store) is None
    assert store.get_bytes(BOOK) is not None


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b'{"checkpoint_results": [1]}', b'{"checkpoint_results": [{}]}'])
def test_what_is_no_book(text: bytes) -> None:
    assert entries(text) is None
