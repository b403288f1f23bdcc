"""Heads that answer late: they hold up their own run, and no other namespace's."""

import asyncio
from contextlib import AsyncExitStack

import looptime

from dsft_api.conditions import Phase
from dsft_operator.core.observed import Head, Unknown
from dsft_operator.ports import Key
from dsft_operator.runtime.reconciler import HEAD_SECONDS, Reconciler
from dsft_operator.runtime.workqueue import WorkQueue
from tests.unit.operator.fake_ports import FakeKube, FakeRay, WorldClock, operator_in
from tests.unit.operator.settling import PASSES
from tests.unit.operator.situations import CONFIG
from tests.unit.operator.world import KEY, World

WORKERS = 8


def test_all_answers_of_a_head_together_have_a_bound() -> None:
    """Each within its own time-out, and so many that a worker would wait for minutes."""

    class Slow(FakeRay):
        async def head(self, address: str, token: str) -> Head | Unknown:
            await asyncio.sleep(9.9 * 5)
            return await super().head(address, token)

    world = World()
    operator = operator_in(world)
    for _ in range(PASSES):
        if world.seen_status.phase is Phase.RUNNING:
            break
        if asyncio.run(operator.reconcile(KEY)) != 0.0:
            world.tick()
    assert world.seen_status.phase is Phase.RUNNING

    async def scenario() -> float:
        clock = asyncio.get_running_loop().time
        began = clock()
        await Reconciler(FakeKube(world), Slow(world), WorldClock(world), CONFIG).reconcile(KEY)
        return clock() - began

    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        assert runner.run(scenario()) < HEAD_SECONDS + 1
    # Once is no loss yet.
    assert world.seen_status.phase is Phase.RUNNING


def test_a_namespace_of_slow_runs_does_not_hold_up_another() -> None:
    """Hundreds of one tenant's runs are due, and all workers are with them: the next free one takes the other tenant's."""

    async def scenario() -> list[str]:
        queue, taken = WorkQueue(), []
        for number in range(300):
            queue.add(Key("slow", f"run-{number}"))
        async with AsyncExitStack() as others:
            for _ in range(WORKERS - 1):
                await others.enter_async_context(queue.next())
            async with queue.next():
                queue.add(Key("quick", "one"))
                queue.add(Key("quick", "two"))
            for _ in range(3):
                async with queue.next() as key:
                    taken.append(key.name)
        assert len(queue) == 300 + 2 - WORKERS - 3
        return taken

    assert asyncio.run(scenario()) == ["one", "two", f"run-{WORKERS}"]


def test_within_a_namespace_the_first_that_is_due_is_first() -> None:
    async def scenario() -> list[str]:
        queue, taken = WorkQueue(), []
        for number in range(5):
            queue.add(Key("a", f"run-{number}"))
        for _ in range(5):
            async with queue.next() as key:
                taken.append(key.name)
        return taken

    assert asyncio.run(scenario()) == [f"run-{number}" for number in range(5)]
