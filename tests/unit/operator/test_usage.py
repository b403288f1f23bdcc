"""status.usage over a whole run: no second is left out or counted twice, whatever happens to the run or its operator."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest

from dsft_api.conditions import Phase
from dsft_api.progress import TrainerPhase
from dsft_api.status import Spent
from dsft_operator.core.observed import Head
from tests.unit.operator.crash_points import counted, whole
from tests.unit.operator.fake_ports import operator_in
from tests.unit.operator.settling import settle
from tests.unit.operator.simulated import Until, User
from tests.unit.operator.situations import NOW, after, job, submitted, told
from tests.unit.operator.stories import Story, at_step, new_token, passed, phase, suspends
from tests.unit.operator.world import KEY, World

# Less than after what the world is at rest.
PAUSE_SECONDS = 100

STORIES: dict[str, Story] = {
    "nothing fails": Story(),
    "a worker is lost": Story(user=at_step(1, World.lose_worker)),
    "the head restarts": Story(user=at_step(1, World.restart_head)),
    "the cluster is deleted": Story(user=at_step(1, World.lose_cluster)),
    "the program raises": Story(Phase.FAILED, facts={"fails_with": "UserCode"}),
}


@pytest.mark.parametrize("name", STORIES)
def test_the_parts_are_the_whole(name: str) -> None:
    status = STORIES[name].simulation().run().world.seen_status
    # Times in the status are whole seconds.
    assert counted(status) == pytest.approx(whole(status), abs=1 + len(status.attempts))


def rests(world: World) -> Iterator[Until]:
    yield from suspends(world)
    yield passed(world, PAUSE_SECONDS)
    world.edit(suspend=False)


def is_mended_late(world: World) -> Iterator[Until]:
    yield lambda: phase(world) is Phase.FAILED
    yield passed(world, PAUSE_SECONDS)
    yield from new_token(world)


@pytest.mark.parametrize(("user", "facts"), [(rests, {}), (is_mended_late, {"fails_with": "DataInvalid"})])
def test_time_that_the_user_lets_pass_does_not_count(user: User, facts: dict[str, str]) -> None:
    """Suspended, or failed until somebody mends it."""
    status = Story(user=user, facts=facts).simulation().run().world.seen_status
    assert status.phase is Phase.SUCCEEDED
    assert counted(status) == pytest.approx(whole(status) - PAUSE_SECONDS, abs=30)


def test_what_the_trainer_told_is_summed_up_over_attempts() -> None:
    document = told(
        TrainerPhase.TRAINING,
        step=9,
        committed=5,
        spent=Spent(useful_seconds=50, uncommitted_seconds=20, blocked_seconds=2, restart_seconds=8),
        updated_at=NOW + timedelta(seconds=100),
    )
    seen, _ = after(replace(submitted(), job=job("RUNNING"), progress=document), 100)
    usage = seen.run.status.usage
    assert usage is not None
    assert (usage.useful_seconds, usage.blocked_seconds, usage.restart_seconds) == (50, 2, 48)
    assert (usage.gpu_seconds, usage.wasted_gpu_seconds) == (200, 100), "two GPUs"
    # The head is lost with what it had not told, and with what was not committed.
    seen, _ = after(replace(seen, head=Head("session-2", "2.60.0"), job=None, progress=None), 130)
    usage = seen.run.status.usage
    assert usage is not None
    assert (usage.useful_seconds, usage.redone_seconds, usage.restart_seconds) == (30, 50, 48)
    assert usage.waiting_since == NOW + timedelta(seconds=130)
    assert (usage.gpu_seconds, usage.wasted_gpu_seconds) == (260, 200)
    assert usage.trained_seconds == 130


def test_time_alone_writes_nothing() -> None:
    """Neither while it waits, nor while a driver that tells nothing new runs."""
    world = World(stuck=True)
    operator = operator_in(world)
    for _ in range(10):
        asyncio.run(operator.reconcile(KEY))
    waiting = world.version
    for _ in range(10):
        world.tick(60)
        asyncio.run(operator.reconcile(KEY))
    assert world.version == waiting
    world.stuck = False
    for _ in range(20):
        world.tick()
        world.hold = world.committed > 0
        asyncio.run(operator.reconcile(KEY))
    assert world.seen_status.phase is Phase.RUNNING
    running = world.version
    for _ in range(10):
        world.tick(60)
        asyncio.run(operator.reconcile(KEY))
    assert world.version == running
    world.hold = False
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED
