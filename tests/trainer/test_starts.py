"""Which losses are followed by another start of the ranks inside the attempt, and what is told of them."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from dsft_api.conditions import FailureClass
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import ProgressStatus, Spent
from dsft_trainer.errors import TrainerError
from dsft_trainer.runtime.channel import Channel
from dsft_trainer.runtime.ray_relay import Relay
from dsft_trainer.runtime.starts import HEALED, KEPT_LOSSES, Start, waiting

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OPENING = Progress(seq=4, run_uid="u", attempt=2, phase=TrainerPhase.STARTING, updated_at=NOW)
TOLD = OPENING.model_copy(update={"phase": TrainerPhase.TRAINING, "progress": ProgressStatus(step=7), "seq": 9})


def lost(
    start: Start, newest: str | None, failure_class: FailureClass = FailureClass.WORKER_LOST, *, draining: bool = False
) -> Start | None:
    failure = TrainerError(failure_class, "rank 1 went away\nand a traceback")
    return start.after(failure, TOLD, newest, NOW, draining=draining)


@pytest.mark.parametrize("failure_class", list(FailureClass))
def test_only_lost_ranks_and_hangs_are_healed(failure_class: FailureClass) -> None:
    following = lost(Start(1, None, OPENING), "step-3", failure_class)
    assert (following is not None) == (failure_class in {FailureClass.WORKER_LOST, FailureClass.HANG})
    assert (following is not None) == (failure_class in HEALED)


@pytest.mark.parametrize(
    ("newest", "starts"),
    [
        # The newest commit at the first start and at each loss -> how many starts there are.
        ([None, None, None], 2),
        (["3", "3", "3"], 2),
        (["3", "6", "6", "6"], 3),
        (["3", "3", "6", "6", "6"], 4),
        (["3", "3", "6", "9", "9", "12", "12", "12"], 7),
    ],
)
def test_one_start_in_vain_is_followed_by_another_and_two_in_a_row_are_not(
    newest: list[str | None], starts: int
) -> None:
    start: Start | None = Start(1, newest[0], OPENING)
    last = start
    for at_loss in newest[1:]:
        assert start is not None, "it gave up too early"
        last, start = start, lost(start, at_loss)
    assert start is None
    assert last is not None
    assert last.number == starts


def test_nothing_is_started_for_nodes_that_are_to_be_given_back() -> None:
    assert lost(Start(1, None, OPENING), "3", draining=True) is None


def test_the_story() -> None:
    start = Start(1, None, OPENING)
    assert waiting(start, None) == "starting the ranks"
    start = lost(start, "3")
    assert start is not None
    opening = start.opening
    assert (start.number, opening.phase, opening.restarts, opening.seq) == (2, TrainerPhase.STARTING, 1, 10)
    assert opening.progress == TOLD.progress, "the step is forgotten"
    (loss,) = opening.losses
    assert (loss.failure_class, loss.step, loss.message) == (FailureClass.WORKER_LOST, 7, "rank 1 went away")
    story = "WorkerLost after step 7: rank 1 went away"
    assert opening.message == story
    assert waiting(start, None) == f"starting the ranks again from the last commit ({story})"
    assert waiting(start, "waiting for nodes") == f"waiting for nodes ({story})"


def test_what_was_not_committed_is_trained_again_and_the_time_until_the_loss_was_found_with_it() -> None:
    spent = Spent(useful_seconds=50, uncommitted_seconds=20, redone_seconds=5, restart_seconds=8)
    start = Start(1, None, OPENING).after(
        TrainerError(FailureClass.HANG, "it hangs"),
        TOLD.model_copy(update={"spent": spent}),
        "3",
        NOW + timedelta(seconds=90),
        draining=False,
    )
    assert start is not None
    assert start.opening.spent == Spent(useful_seconds=30, redone_seconds=115, restart_seconds=8)


def test_many_losses_are_counted_and_the_last_are_kept() -> None:
    start = Start(1, None, OPENING)
    for number in range(KEPT_LOSSES + 2):
        failure = TrainerError(FailureClass.HANG, "stuck")
        told = start.opening.model_copy(update={"progress": ProgressStatus(step=number)})
        following = start.after(failure, told, f"step-{number}", NOW, draining=False)
        assert following is not None
        start = following
    assert start.opening.restarts == KEPT_LOSSES + 2
    assert [loss.step for loss in start.opening.losses] == list(range(2, KEPT_LOSSES + 2))
    Progress.model_validate_json(start.opening.model_dump_json(by_alias=True))


def test_the_driver_leaves_torch_to_the_ranks() -> None:
    """It is seconds in which nothing else starts; Ray Train's controller unpickles what these modules define."""
    modules = (
        "driver",
        *(f"runtime.{name}" for name in ("ray", "ray_starts", "ray_trainer", "ray_torch", "ray_failures")),
    )
    imports = ", ".join(f"dsft_trainer.{module}" for module in modules)
    script = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class TestRelay:
    """What is heard of ranks that are lost, or thought to be."""

    @pytest.fixture
    def channel(self, tmp_path) -> Channel:
        channel = Channel(tmp_path / "channel")
        channel.reset()
        return channel

    @pytest.fixture
    def relay(self, channel: Channel) -> Relay:
        return Relay(str(channel.folder))

    def test_only_the_current_start_is_heard(self, relay: Relay, channel: Channel) -> None:
        failure = TrainerError(FailureClass.DIVERGED, "NaN").report(0).model_dump_json(by_alias=True)
        relay.begin(1)
        relay.publish(1, document(step=5))
        relay.begin(2)
        relay.publish(1, document(step=6))
        relay.fail(1, failure)
        relay.set_outcome(1, "succeeded")
        assert step(channel) == 5
        assert channel.failure() is None
        assert relay.outcome() is None

        relay.publish(2, document(step=3))
        relay.fail(2, failure)
        relay.set_outcome(2, "interrupted")
        assert step(channel) == 3
        assert channel.failure() is not None
        assert relay.outcome() == "interrupted"

    def test_who_asks_for_a_drain_can_be_waited_for(self, relay: Relay, channel: Channel) -> None:
        assert not relay.drains()
        assert relay.drain_time() is None
        assert relay.drains()
        relay.request_drain()
        first = relay.drain_time()
        assert first is not None
        relay.request_drain()
        assert relay.drain_time() == first
        channel.reset()
        assert (relay.drain_time(), channel.drain_requested()) == (None, False)

    def test_between_two_starts_nobody_is(self, relay: Relay, channel: Channel) -> None:
        relay.begin(1)
        relay.publish(1, document(step=5))
        relay.close()
        relay.publish(1, document(step=6))
        assert step(channel) == 5

    def test_the_driver_speaks_until_the_ranks_do(self, relay: Relay, channel: Channel) -> None:
        relay.begin(1)
        assert relay.announce(1, document(step=1))
        assert relay.announce(1, None)
        assert step(channel) == 1
        relay.publish(1, document(step=2))
        assert not relay.announce(1, document(step=1))
        assert step(channel) == 2

    def test_documents_are_numbered_in_the_order_of_their_arrival(self, relay: Relay, channel: Channel) -> None:
        numbers = []
        for start in (1, 2):
            relay.begin(start)
            for seq in (5, 6, 7):
                relay.publish(start, document(step=seq, seq=seq))
                told = channel.progress()
                assert told is not None
                numbers.append(told.seq)
        assert numbers == sorted(set(numbers))


def document(step: int, seq: int = 0) -> str:
    told = OPENING.model_copy(update={"progress": ProgressStatus(step=step), "seq": seq})
    return told.model_dump_json(by_alias=True)


def step(channel: Channel) -> int:
    told = channel.progress()
    assert told is not None
    assert told.progress is not None
    return told.progress.step
