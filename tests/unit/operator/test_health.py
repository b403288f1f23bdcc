"""Health, readiness and metrics, and the resync that they look at."""

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import REGISTRY

from dsft_api.conditions import Phase
from dsft_operator.ports import Key
from dsft_operator.runtime.health import Health
from dsft_operator.runtime.http import application
from dsft_operator.runtime.workers import resync, work
from dsft_operator.runtime.workqueue import WorkQueue
from tests.unit.operator.fake_ports import FakeKube, operator_in
from tests.unit.operator.world import KEY, World

OTHER = Key("ml", "other")
RESYNC = 300.0
SECONDS = 20.0


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(RESYNC, clock)


def test_an_operator_that_lists_and_watches_is_well(health: Health, clock: Clock) -> None:
    for version in range(10, 20):
        health.heard(KEY, str(version))
        health.listed({KEY: str(version)})
        clock.now += RESYNC
        assert list(health.problems()) == []


def test_runs_that_are_not_listed_for_long_are_a_failure(health: Health, clock: Clock) -> None:
    health.listed({})
    clock.now += 3 * RESYNC
    assert list(health.problems()) == []
    clock.now += 1
    assert list(health.problems()) == ["runs were not listed for 901 s"]
    health.listed({})
    assert list(health.problems()) == []


def test_a_watch_that_has_gone_silent_is_a_failure(health: Health, clock: Clock) -> None:
    health.heard(KEY, "10")
    for version in (11, 12, 13):
        health.listed({KEY: str(version)})
        clock.now += RESYNC
    (problem,) = health.problems()
    assert problem == "the watch has not told for 900 s what a list has shown"


# what the watch does after version 11 was listed and not heard of
CURES: dict[str, Callable[[Health], None]] = {
    "tells of it": lambda health: health.heard(KEY, "11"),
    "tells of a newer one": lambda health: health.heard(KEY, "15"),
    "the run is gone": lambda health: health.listed({OTHER: "0"}),
}


@pytest.mark.parametrize("name", CURES)
def test_a_watch_that_is_late_has_caught_up(health: Health, clock: Clock, name: str) -> None:
    health.listed({KEY: "11"})
    clock.now += RESYNC
    CURES[name](health)
    health.listed({} if name == "the run is gone" else {KEY: "11"})
    clock.now += 2 * RESYNC
    assert list(health.problems()) == []


def test_another_runs_events_do_not_hide_a_run_that_is_never_told_of(health: Health, clock: Clock) -> None:
    for version in (20, 30, 40):
        health.heard(OTHER, str(version))
        health.listed({OTHER: str(version), KEY: "5"})
        clock.now += RESYNC
    assert len(list(health.problems())) == 1


def test_an_event_loop_that_stands_still_is_a_failure() -> None:
    async def stand_still() -> list[str]:
        health = Health(RESYNC, beat_seconds=0.01, max_lag_seconds=0.2)
        heart = asyncio.create_task(health.beat())
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251  the fault
        async with asyncio.timeout(SECONDS):
            while not (found := list(health.problems())):  # noqa: ASYNC110  it is what is tested
                await asyncio.sleep(0)
        heart.cancel()
        return found

    (problem,) = asyncio.run(stand_still())
    assert problem.startswith("the event loop came 0.")


async def asked(ailments: Iterable[str], obstacles: Iterable[str], *paths: str) -> list[tuple[int, str]]:
    server = TestServer(application(lambda: ailments, lambda: obstacles))
    async with TestClient(server) as client:
        answers = [await client.get(path) for path in paths]
        return [(answer.status, await answer.text()) for answer in answers]


@pytest.mark.parametrize(
    ("ailments", "obstacles", "answers"),
    [
        ([], [], [(200, "ok\n"), (200, "ok\n")]),
        ([], ["the watches are not up"], [(200, "ok\n"), (503, "the watches are not up\n")]),
        (["a", "b"], [], [(503, "a\nb\n"), (200, "ok\n")]),
    ],
)
def test_the_answers_say_what_is_wrong(
    ailments: list[str], obstacles: list[str], answers: list[tuple[int, str]]
) -> None:
    assert asyncio.run(asked(ailments, obstacles, "/healthz", "/readyz")) == answers


def test_a_run_by_resync_alone_and_its_metrics() -> None:
    """From apply to the end with no event, past an API server that is down at first; a run that is gone is forgotten."""
    asyncio.run(_live(World()))


async def _live(world: World) -> None:
    queue, reconciler = WorkQueue(), operator_in(world)
    REGISTRY.register(reconciler.metrics)
    world.api_down = True
    listing = resync(queue, FakeKube(world), Health(RESYNC), reconciler, 0.01, random.Random(1))
    tasks = [asyncio.create_task(work(queue, reconciler)), asyncio.create_task(listing)]
    try:
        async with asyncio.timeout(SECONDS):
            await asyncio.sleep(0.05)
            world.api_down = False
            while world.seen_status.phase is not Phase.SUCCEEDED or world.clusters:
                world.tick()
                await asyncio.sleep(0.02)
            ((_, text),) = await asked([], [], "/metrics")
            world.gone = True
            while reconciler.known:  # noqa: ASYNC110  by what was to be tested, not by an event of the test's own
                await asyncio.sleep(0.01)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        REGISTRY.unregister(reconciler.metrics)
    assert 'dsft_runs{phase="Succeeded"} 1.0' in text
    assert 'dsft_reconcile_total{result="ok"}' in text
    for name in ("dsft_queue_latency_seconds_bucket", "dsft_queue_retries_total", "dsft_event_loop_lag_seconds"):
        assert name in text
    named = [line.partition("{")[0] for line in text.splitlines() if "chat" in line]
    assert named == ["dsft_run_phase"], (
        "of a run that is over, and gone with it: counters that name runs would have no bound"
    )
