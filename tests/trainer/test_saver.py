"""Saves in the background on one rank: what the loop waits for, what it lives with, and what ends it."""

import random
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint import backoff
from dsft_trainer.checkpoint.checkpointer import Checkpointer, Identity, Point
from dsft_trainer.checkpoint.commits import Claim, ClaimId
from dsft_trainer.checkpoint.listing import Retention, read_commits
from dsft_trainer.checkpoint.saver import DAY, Cadence, Saver, best_interval, seconds_between_failures
from dsft_trainer.checkpoint.store import Store, open_store
from dsft_trainer.errors import TrainerError
from dsft_trainer.runtime import Place
from tests.s3_faults import FaultyS3, faulty
from tests.s3_server import S3Server
from tests.trainer.group_starts import State

pytestmark = pytest.mark.usefixtures("process_group")

PLACE = Place(rank=0, world_size=1, local_rank=0)
EVERY_THREE_STEPS = Cadence(every_steps=3)
PATIENCE_SECONDS = 60.0


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultyS3]:
    with faulty(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def store(s3_uri: str, proxy: FaultyS3) -> Store:
    """A folder of its own, reached through the proxy."""
    return open_store(s3_uri, endpoint_url=proxy.endpoint)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "_LONGEST_SECONDS", 0.05)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Start:
    """A group start with a saver, and a state that tells its step."""

    def __init__(self, store: Store, scratch: Path, cadence: Cadence = EVERY_THREE_STEPS, **more: Any) -> None:
        identity = Identity(spec_hash="sha256:0", zero_stage=3, precision="fp32", versions={"torch": "2"})
        self.checkpointer = Checkpointer(store, PLACE, scratch, identity, Retention(10, 0, "loss", False))
        self.checkpointer.begin(1)
        self.saver = Saver(self.checkpointer, cadence, **{"max_failures": 3, **more})
        self.state = State()

    def save(self, step: int) -> None:
        self.state.value = f"step {step}"
        self.saver.save(self.state, Point(step, samples=8 * step, epoch=0.1, metrics={}))
        self.state.value = "changed since"


def steps(store: Store) -> list[int]:
    return [commit.step for commit in read_commits(store)]


def until(fact: Callable[[], bool], what: str) -> None:
    deadline = threading.Event()
    for _ in range(int(PATIENCE_SECONDS * 100)):
        if fact():
            return
        deadline.wait(0.01)
    raise AssertionError(f"not within {PATIENCE_SECONDS:.0f} s: {what}")


def test_training_goes_on_while_the_store_is_slow(store: Store, proxy: FaultyS3, tmp_path: Path) -> None:
    start = Start(store, tmp_path)
    gate = proxy.hold(lambda method, path: method == "PUT" and "checkpoints" in path)
    start.save(3)
    until(lambda: len(gate.held) == 2, "both files are on their way")
    assert start.saver.votes() == [1.0, 0.0]
    start.saver.heard(1.0, 0.0)
    assert not start.saver.settleable
    assert steps(store) == []
    gate.open()
    until(lambda: start.saver.votes() == [0.0, 0.0], "the save's end")
    start.saver.heard(0.0, 0.0)
    assert start.saver.settleable
    assert start.saver.settle()
    assert steps(store) == [3]
    # The state that was saved is the one from before the loop went on.
    again = Start(store, tmp_path / "again")
    again.checkpointer.load(again.state)
    assert again.state.value == "step 3"


def test_the_next_save_by_steps_waits_for_the_one_before(store: Store, proxy: FaultyS3, tmp_path: Path) -> None:
    start = Start(store, tmp_path)
    gate = proxy.hold(lambda method, path: method == "PUT" and "step-00000003" in path)
    start.save(3)
    assert start.saver.due(6)
    threading.Timer(0.5, gate.open).start()
    start.save(6)
    assert steps(store)[0] == 3, "the second save began before the first was committed"
    assert start.saver.blocked is not None
    assert start.saver.blocked > 0.4
    assert start.saver.settle()
    assert steps(store) == [3, 6]


def test_a_save_that_is_due_by_time_is_put_off(store: Store, proxy: FaultyS3, tmp_path: Path) -> None:
    clock = Clock()
    start = Start(store, tmp_path, Cadence(every_minutes=2), clock=clock)
    assert start.saver.votes() == [0.0, 0.0]
    clock.now += 120
    assert start.saver.votes() == [0.0, 1.0]
    start.saver.heard(0.0, 1.0)
    assert start.saver.due(1)
    gate = proxy.hold(lambda method, path: method == "PUT" and "checkpoints" in path)
    start.save(1)
    clock.now += 121
    start.saver.heard(*start.saver.votes())
    assert not start.saver.due(2), "the save before is not done"
    gate.open()
    assert start.saver.settle()
    start.saver.heard(*start.saver.votes())
    assert start.saver.due(3)


def test_a_refused_save_is_skipped_and_told(store: Store, proxy: FaultyS3, tmp_path: Path) -> None:
    start = Start(store, tmp_path)
    start.save(3)
    assert start.saver.settle()
    proxy.refuse = lambda method, path: method == "PUT" and path.endswith("model.pt")
    start.save(6)
    assert not start.saver.settle()
    assert len(proxy.refused) == 3, "it is tried three times"
    told = start.saver.report("s3://x")
    assert told.failures == 1
    assert told.failure is not None
    assert "AccessDenied: not now" in told.failure
    assert told.latest is not None
    assert told.latest.step == 3
    proxy.refuse = lambda _method, _path: False
    start.save(9)
    assert start.saver.settle()
    assert (start.saver.report("s3://x").failures, start.saver.report("s3://x").failure) == (None, None)
    assert steps(store) == [3, 9]
    # What was uploaded for the one that failed is gone.
    assert {entry.key.split("/")[1][:13] for entry in store.list("checkpoints")} == {"step-00000003", "step-00000009"}


def test_a_commit_that_is_refused_is_never_listed(store: Store, proxy: FaultyS3, tmp_path: Path) -> None:
    start = Start(store, tmp_path)
    proxy.refuse = lambda method, path: method == "PUT" and path.endswith("COMMIT.json")
    start.save(3)
    assert not start.saver.settle()
    assert steps(store) == []
    assert Start(store, tmp_path / "again").checkpointer.restorer.base is None


def test_too_many_failures_in_a_row_end_the_attempt(store: Store, proxy: FaultyS3, tmp_path: Path) -> None:
    start = Start(store, tmp_path, max_failures=2)
    proxy.refuse = lambda method, path: method == "PUT" and "checkpoints" in path
    start.save(3)
    assert not start.saver.settle()
    with pytest.raises(TrainerError, match="checkpoints failed 2 times in a row; the last: cannot write") as caught:
        start.saver.save_now(start.state, Point(6, samples=1, epoch=0.1, metrics={}))
    assert caught.value.failure_class is FailureClass.STORAGE_DENIED
    assert "s3:PutObject" in caught.value.remedy


def test_the_last_save_is_tried_again(store: Store, proxy: FaultyS3, tmp_path: Path) -> None:
    start = Start(store, tmp_path)
    proxy.refuse = lambda method, path: method == "PUT" and path.endswith("COMMIT.json") and len(proxy.refused) < 4
    start.saver.save_now(start.state, Point(6, samples=1, epoch=0.1, metrics={}))
    assert len(proxy.refused) == 4
    assert steps(store) == [6]


def test_a_superseded_start_ends_at_once(store: Store, proxy: FaultyS3, tmp_path: Path) -> None:
    zombie = Start(store, tmp_path)
    Start(store, tmp_path / "again")
    zombie.save(3)
    with pytest.raises(TrainerError, match=r"a1\.g2 has taken this run over") as caught:
        zombie.saver.settle()
    assert caught.value.failure_class is FailureClass.HEAD_LOST


def test_the_end_of_a_rank_waits_for_its_save(store: Store, proxy: FaultyS3, tmp_path: Path) -> None:
    start = Start(store, tmp_path)
    gate = proxy.hold(lambda method, path: method == "PUT" and "checkpoints" in path)
    start.save(3)
    start.checkpointer.close(0.01)
    assert steps(store) == []
    threading.Timer(0.2, gate.open).start()
    start.checkpointer.close(PATIENCE_SECONDS)
    assert steps(store) == [3]


def test_metrics_that_could_not_be_stored_keep_the_commit_back(store: Store, tmp_path: Path) -> None:
    start = Start(store, tmp_path)

    def fails() -> None:
        raise TrainerError(FailureClass.UNKNOWN, "no metrics today")

    start.checkpointer.before_commit = fails
    start.save(3)
    assert not start.saver.settle()
    assert steps(store) == []


@pytest.mark.parametrize(
    ("cadence", "blocked", "seconds"),
    [
        (Cadence(every_steps=5), 1.0, None),
        (Cadence(every_minutes=1.5), 1.0, 90.0),
        (Cadence(seconds_between_failures=20_000), None, 200.0),
        (Cadence(seconds_between_failures=20_000), 4.0, 400.0),
        # A staged save costs next to nothing; the steps after it do.
        (Cadence(seconds_between_failures=20_000), 0.0, best_interval(0.1, 20_000)),
    ],
)
def test_interval(cadence: Cadence, blocked: float | None, seconds: float | None) -> None:
    assert cadence.seconds(blocked) == pytest.approx(seconds)


def test_starts_tell_how_often_a_run_fails() -> None:
    now = datetime.now(UTC)

    def claim(group: int, hours_ago: float) -> Claim:
        time = now - timedelta(hours=hours_ago)
        return Claim(id=ClaimId(attempt=1, group=group), world_size=1, start_time=time, nonce=str(group))

    assert seconds_between_failures([], now) == DAY
    assert seconds_between_failures([claim(1, 0)], now) == DAY
    assert seconds_between_failures([claim(1, 72), claim(2, 48), claim(3, 1), claim(4, 0)], now) == pytest.approx(DAY)
    assert seconds_between_failures([claim(n, 4 - n) for n in range(1, 5)], now) < DAY / 3


def test_jitter_draws_nothing_from_the_generator_that_training_uses() -> None:
    state = random.getstate()
    values = {backoff.jittered(3, 60.0) for _ in range(20)}
    assert random.getstate() == state
    assert len(values) > 1
    assert all(2.0 <= value <= 4.0 for value in values)
