"""Leader election: never two that act, and never none for long, whatever clocks, answers and freezes do."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import looptime
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dsft_api.conditions import Phase
from dsft_operator.app import act
from dsft_operator.config import ConfigError, LeaderElection, load_config
from dsft_operator.core.observed import Ended
from dsft_operator.ports import Conflict, KubeError, Lease
from dsft_operator.runtime.leader import Elector
from dsft_operator.runtime.reconciler import Reconciler
from dsft_operator.runtime.workqueue import WorkQueue
from tests.unit.operator.fake_ports import FakeKube, FakeRay, WorldClock, operator_in
from tests.unit.operator.settling import PASSES
from tests.unit.operator.situations import CONFIG
from tests.unit.operator.world import KEY, World

TIMES = LeaderElection()
NAMES = ("a", "b", "c")
ENDED = Ended("chat-w", "worker", "node-1", "OOMKilled", 137)


class Server:
    """The Lease as an API server keeps it. `fault`: what becomes of the next request."""

    def __init__(self) -> None:
        self.lease: Lease | None = None
        self.writes = 0
        self.fault: str | None = None

    async def read(self) -> Lease | None:
        self._fail("refused")
        return self.lease

    async def write(self, lease: Lease) -> Lease:
        self._fail("refused")
        if lease.version != (self.lease.version if self.lease else ""):
            raise Conflict("changed")
        self.writes += 1
        self.lease = replace(lease, version=str(self.writes))
        self._fail("lost")
        return self.lease

    def _fail(self, fault: str) -> None:
        if self.fault == fault:
            self.fault = None
            raise KubeError(fault)


@dataclass
class Clock:
    """Monotonic, with an offset of its own: no two machines' agree."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Replica:
    clock: Clock
    elector: Elector

    @classmethod
    def of(cls, server: Server, name: str, offset: float = 0.0, settings: LeaderElection = TIMES) -> "Replica":
        clock = Clock(offset)
        return cls(clock, Elector(server, name, settings, clock=clock))

    def attempt(self) -> bool:
        return asyncio.run(self.elector.attempt())


class Election(RuleBasedStateMachine):
    """Replicas that try whenever they like, or not at all for long, as if frozen; requests that fail or lose their answer."""

    @initialize(offsets=st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
    def start(self, offsets: list[float]) -> None:
        self.server = Server()
        self.replicas = {
            name: Replica.of(self.server, name, offset) for name, offset in zip(NAMES, offsets, strict=True)
        }

    # Also just before and after the moments at which something ends.
    @rule(seconds=st.floats(0.01, 20) | st.sampled_from((0.5, 1.0, 2.0, 9.5, 9.9, 10.1, 14.9, 15.1)))
    def time_passes(self, seconds: float) -> None:
        for replica in self.replicas.values():
            replica.clock.now += seconds

    @rule(name=st.sampled_from(NAMES), fault=st.sampled_from([None, None, "refused", "lost"]))
    def tries(self, name: str, fault: str | None) -> None:
        self.server.fault = fault
        self.replicas[name].attempt()
        self.server.fault = None

    @rule(name=st.sampled_from(NAMES))
    def ends_cleanly(self, name: str) -> None:
        asyncio.run(self.replicas[name].elector.release())

    @rule(name=st.sampled_from(NAMES))
    def is_started_again(self, name: str) -> None:
        self.replicas[name] = Replica.of(self.server, name, self.replicas[name].clock.now)

    @rule()
    def all_is_well_for_a_while(self) -> None:
        """Then one leads within 20 s."""
        for _ in range(20):
            if any(replica.elector.leads() for replica in self.replicas.values()):
                return
            for replica in self.replicas.values():
                replica.clock.now += 1.0
                replica.attempt()
        raise AssertionError("nobody leads")

    @invariant()
    def one_leads_at_most(self) -> None:
        assert sum(replica.elector.leads() for replica in self.replicas.values()) <= 1


Election.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestElection = Election.TestCase


def test_a_standby_leads_at_once_where_the_lease_was_given_back() -> None:
    server = Server()
    first, second = Replica.of(server, "a"), Replica.of(server, "b", offset=500.0)
    assert first.attempt()
    assert not second.attempt()
    asyncio.run(first.elector.release())
    assert not first.elector.leads()
    assert second.attempt()
    assert server.lease is not None
    assert (server.lease.holder, server.lease.transitions) == ("b", 1)


def test_a_container_started_again_in_its_pod_does_not_wait() -> None:
    server = Server()
    assert Replica.of(server, "pod-1").attempt()
    assert Replica.of(server, "pod-1").attempt()
    assert server.lease is not None
    assert server.lease.transitions == 0


def test_the_lease_is_taken_when_it_was_not_renewed_in_time() -> None:
    server = Server()
    first, second = Replica.of(server, "a"), Replica.of(server, "b")
    assert first.attempt()
    assert not second.attempt()
    second.clock.now += TIMES.lease_seconds - 0.1
    assert not second.attempt()
    second.clock.now += 0.2
    assert second.attempt()


def test_a_deleted_lease_is_made_again_by_its_holder() -> None:
    class Forgetful(Server):
        async def write(self, lease: Lease) -> Lease:
            if self.lease is None and lease.version:
                raise KubeError("the API server answered 404")
            return await super().write(lease)

    server = Forgetful()
    first = Replica.of(server, "a")
    assert first.attempt()
    server.lease = None
    first.clock.now += 2
    assert not first.attempt()
    assert first.elector.leads()
    first.clock.now += 2
    assert first.attempt()


def test_a_deleted_lease_makes_no_second_leader() -> None:
    """Who has seen its holder gives that one its time."""
    server = Server()
    first, second = Replica.of(server, "a"), Replica.of(server, "b")
    assert first.attempt()
    assert not second.attempt()
    server.lease = None
    second.clock.now += 1
    assert not second.attempt()
    second.clock.now += TIMES.lease_seconds + 0.1
    assert second.attempt()
    first.clock.now += 2
    assert not first.attempt()
    assert not first.elector.leads()


def test_who_finds_another_holder_stops_at_once() -> None:
    server = Server()
    first = Replica.of(server, "a")
    assert first.attempt()
    server.lease = Lease("b", TIMES.lease_seconds, version="77")
    first.clock.now += 2
    assert not first.attempt()
    assert not first.elector.leads()


def test_a_time_that_is_over_is_not_made_longer() -> None:
    """Frozen while another one led and gave the Lease back: what began before must end before this one leads again."""
    server = Server()
    looks_often = TIMES.model_copy(update={"retry_seconds": 0.01})
    first, second = Replica.of(server, "a", settings=looks_often), Replica.of(server, "b")
    assert first.attempt()
    assert not second.attempt()
    for clock in (first.clock, second.clock):
        clock.now += TIMES.lease_seconds + 1
    assert second.attempt()
    asyncio.run(second.elector.release())
    asyncio.run(asyncio.wait_for(first.elector.keep(), 5))
    assert not first.elector.leads()
    assert server.lease is not None
    assert server.lease.holder == ""


def test_a_lease_is_given_back_though_a_renewal_was_cancelled() -> None:
    server = Server()
    first = Replica.of(server, "a")
    assert first.attempt()
    assert server.lease is not None
    # The API server took it, and the answer was not waited for.
    server.lease = replace(server.lease, version="renewed")
    asyncio.run(first.elector.release())
    assert server.lease.holder == ""


def test_a_replica_that_lost_the_lease_and_leads_again_looks_at_every_run() -> None:
    """What a pass left whose time was over is not forgotten."""

    async def scenario() -> None:
        world, queue, server = World(), WorkQueue(), Server()
        clock = Clock()
        elector = Elector(
            server, "a", LeaderElection(lease_seconds=2, renew_seconds=1, retry_seconds=0.01), clock=clock
        )
        reconciler = Reconciler(FakeKube(world), FakeRay(world), WorldClock(world), CONFIG, may_act=elector.leads)
        task = asyncio.create_task(act(elector, queue, reconciler, 1))
        async with asyncio.timeout(10):
            while not elector.leads():  # noqa: ASYNC110  by what is tested
                await asyncio.sleep(0.01)
            clock.now += 5
            queue.add(KEY)
            while not (elector.leads() and world.calls):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert server.lease is not None
        assert server.lease.holder == ""

    asyncio.run(scenario())


def test_a_request_that_hangs_does_not_outlive_the_time() -> None:
    class Hanging(Server):
        async def read(self) -> Lease | None:
            await asyncio.Event().wait()

    quick = LeaderElection(lease_seconds=1, renew_seconds=0.2, retry_seconds=0.1)
    assert not asyncio.run(asyncio.wait_for(Elector(Hanging(), "a", quick).attempt(), 5))


@pytest.mark.parametrize("answered", [1, 2, 5])
def test_a_leader_that_gets_no_answer_ends_before_a_standby_may_begin(answered: int) -> None:
    """To the moment, however the last request that was answered lies to the ones that hang."""
    renewed = 0.0

    class Silent(Server):
        async def write(self, lease: Lease) -> Lease:
            nonlocal renewed
            if self.writes == answered:
                await asyncio.Event().wait()
            renewed = asyncio.get_running_loop().time()
            return await super().write(lease)

    async def scenario() -> float:
        clock = asyncio.get_running_loop().time
        elector = Elector(Silent(), "a", TIMES, clock=clock)
        await elector.acquire()
        await elector.keep()
        return clock()

    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        ended = runner.run(scenario())
    assert ended - renewed == pytest.approx(TIMES.renew_seconds, abs=0.01)


def test_who_does_not_lead_any_more_writes_nothing() -> None:
    """Before each pass of a run, another replica has looked and decided the same; then its time was over."""
    world, stopped = World(), 0
    standby = Reconciler(FakeKube(world), FakeRay(world), WorldClock(world), CONFIG, may_act=lambda: False)
    leader = operator_in(world)
    for _ in range(PASSES):
        before = world.calls
        asyncio.run(standby.reconcile(KEY))
        assert world.calls == before
        if asyncio.run(leader.reconcile(KEY)) != 0.0:
            world.tick()
        stopped += world.calls > before
        if world.seen_status.phase is Phase.SUCCEEDED and not world.clusters:
            break
    assert world.seen_status.phase is Phase.SUCCEEDED
    assert world.submissions == ["0a1b2c3d-a1"]
    assert stopped > 5


def test_a_standby_keeps_no_evidence_of_attempts_that_it_does_not_know() -> None:
    world, leads = World(), False
    replica = Reconciler(FakeKube(world), FakeRay(world), WorldClock(world), CONFIG, may_act=lambda: leads)
    replica.note(KEY, (ENDED,))
    assert replica.evidence.by_key == {}
    leads = True
    replica.note(KEY, (ENDED,))
    assert replica.evidence.by_key == {KEY: (ENDED,)}
    replica.forget()
    assert replica.evidence.by_key == {}


def test_a_key_whose_worker_was_cancelled_comes_back() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add(KEY)

        held = asyncio.Event()

        async def hold() -> None:
            async with queue.next():
                held.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(hold())
        await held.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(5), queue.next() as key:
            assert key == KEY

    asyncio.run(scenario())


def test_times_that_would_let_two_lead_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("leaderElection: {leaseSeconds: 10}\n")
    with pytest.raises(ConfigError, match="renewSeconds 10 < leaseSeconds 10 does not hold"):
        load_config(file)
