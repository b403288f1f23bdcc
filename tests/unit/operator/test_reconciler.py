"""The reconciler in a small world: whatever dies and whenever, one cluster, one driver, one submission per attempt, one end."""

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsft_api.conditions import FailureClass, Phase
from dsft_operator.core.observed import Queueing, Warned
from dsft_operator.ports import KubeError
from tests.unit.operator.situations import CONFIG, NOW, UID
from tests.unit.operator.world import KEY, Crash, World, without_times

PASSES = 200


def settle(world: World, passes: int = PASSES) -> None:
    """Reconcile and let time go by until the run has ended and nothing is left to do."""
    operator = world.reconciler()
    quiet = 0
    for _ in range(passes):
        try:
            pause = asyncio.run(operator.reconcile(KEY))
        except KubeError:
            pause = 1.0
        except Crash:
            world.crash_at = None
            operator, pause = world.reconciler(), 0.0
        quiet = quiet + 1 if pause is None else 0
        if quiet > 1:
            return
        if pause != 0.0:
            world.tick()
    pytest.fail(f"not settled after {passes} passes: {world.seen_status.phase} {world.seen_status.message}")


def finished(**spec: Any) -> World:
    world = World(spec)
    settle(world)
    return world


def test_a_run_from_apply_to_the_end() -> None:
    world = finished()
    assert world.seen_status.phase is Phase.SUCCEEDED
    assert world.clusters == {}
    assert world.submissions == ["0a1b2c3d-a1"]
    assert world.seen_status.output is not None


CALLS = finished().calls


@pytest.mark.parametrize("after", [False, True], ids=["before its effect", "after its effect"])
@pytest.mark.parametrize("call", range(1, CALLS + 1))
def test_the_operator_dies_at_any_call(call: int, *, after: bool) -> None:
    world = World(crash_at=(call, after))
    settle(world)
    assert world.made == 1
    assert world.submissions == ["0a1b2c3d-a1"]
    assert world.clusters == {}
    assert without_times(world.seen_status) == without_times(finished().seen_status)


@pytest.mark.parametrize("call", range(1, CALLS + 1))
def test_two_operators_at_once(call: int) -> None:
    """The first one stands still before a call's effect, and goes on after the second one has brought the run to its end."""
    world = World()
    ended: list[Phase | None] = []

    def second() -> None:
        settle(world)
        ended.append(world.seen_status.phase)

    world.meanwhile = (call, second)
    settle(world)
    assert ended == [Phase.SUCCEEDED]
    assert world.submissions == ["0a1b2c3d-a1"]
    assert world.clusters == {}
    assert without_times(world.seen_status) == without_times(finished().seen_status)


def run_until(world: World, phase: Phase) -> None:
    operator = world.reconciler()
    for _ in range(PASSES):
        pause = asyncio.run(operator.reconcile(KEY))
        if world.seen_status.phase is phase:
            return
        if pause != 0.0:
            world.tick()
    pytest.fail(f"never {phase}")


@pytest.mark.parametrize("fault", ["restart_head", "lose_worker", "lose_cluster"])
def test_a_run_goes_on_after_a_loss(fault: str) -> None:
    world = World()
    run_until(world, Phase.RUNNING)
    getattr(world, fault)()
    settle(world)
    status = world.seen_status
    assert status.phase is Phase.SUCCEEDED
    assert world.submissions == ["0a1b2c3d-a1", "0a1b2c3d-a2"]
    assert [attempt.failure_class for attempt in status.attempts] == [
        FailureClass.WORKER_LOST if fault == "lose_worker" else FailureClass.HEAD_LOST,
        None,
    ]


def test_deleted_in_every_phase() -> None:
    for phase in (Phase.PROVISIONING, Phase.STARTING, Phase.RUNNING, Phase.SUCCEEDED):
        for ray_down in (False, True):
            world = World()
            run_until(world, phase)
            world.delete()
            world.ray_down = ray_down
            began = world.now
            settle(world)
            assert world.gone
            assert (world.now - began).total_seconds() < 60


def test_suspended_and_resumed() -> None:
    world = World()
    run_until(world, Phase.RUNNING)
    world.edit(suspend=True)
    settle(world)
    assert world.seen_status.phase is Phase.SUSPENDED
    assert world.clusters == {}
    at = world.committed
    world.edit(suspend=False)
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED
    assert world.committed == 6 >= at
    assert world.made == 2


def test_kuberay_comes_later() -> None:
    world = World(kuberay=False)
    asyncio.run(world.reconciler().reconcile(KEY))
    assert world.seen_status.phase is Phase.PENDING
    assert "install KubeRay" in (world.seen_status.message or "")
    world.kuberay = True
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED


QUOTA = 'rayclusters.ray.io "chat" is forbidden: exceeded quota: used 9, limited 9'


@pytest.mark.parametrize("kind", ["RayCluster", "NetworkPolicy", "Secret"])
def test_what_the_api_server_refuses_is_told_and_tried_again(kind: str) -> None:
    world = World({"deadlines": {"provisionSeconds": 300}}, refused={kind: QUOTA})
    operator = world.reconciler()
    pauses: list[float] = []
    for used in range(8):
        world.refused[kind] = QUOTA.replace("9,", f"{used},")
        pauses.append(asyncio.run(operator.reconcile(KEY)) or 0.0)
        world.tick(pauses[-1])
    status = world.seen_status
    assert "exceeded quota" in (status.message or "")
    (ready,) = (c for c in status.conditions if c.type == "ClusterReady")
    assert (ready.status, ready.reason) == ("False", "ClusterRefused")
    version = world.version
    asyncio.run(operator.reconcile(KEY))
    assert world.version == version, "words that differ in a number alone are not written again"
    assert pauses[-1] == CONFIG.intervals.queued_seconds
    world.refused.clear()
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED
    assert world.made == 1


def test_what_stays_refused_ends_with_the_deadline() -> None:
    world = World({"deadlines": {"provisionSeconds": 60}}, refused={"RayCluster": QUOTA})
    began = world.now
    settle(world)
    status = world.seen_status
    assert (world.now - began).total_seconds() < 100
    assert status.phase is Phase.FAILED
    assert "ProvisionTimeout" in (status.message or "")
    assert "exceeded quota" in (status.message or "")
    assert world.made == 0


def test_a_submission_that_ray_does_not_take_is_told_and_ends_with_another_cluster() -> None:
    world = World(refused={"submit": "the submission was answered 500: no disk"})
    run_until(world, Phase.STARTING)
    operator = world.reconciler()
    for _ in range(3):
        asyncio.run(operator.reconcile(KEY))
    assert "no disk" in (world.seen_status.message or "")
    while world.made == 1:
        if asyncio.run(operator.reconcile(KEY)):
            world.tick()
        assert (world.now - NOW).total_seconds() < 400
    world.refused.clear()
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED
    assert world.seen_status.attempts[0].failure_class is FailureClass.HEAD_LOST
    assert world.submissions == ["0a1b2c3d-a2"]


def test_a_driver_that_cannot_be_stopped_does_not_hold_the_nodes() -> None:
    world = World(refused={"stop": "500"})
    run_until(world, Phase.RUNNING)
    world.hold = True
    world.edit(suspend=True)
    began = world.now
    settle(world)
    assert world.seen_status.phase is Phase.SUSPENDED
    assert world.clusters == {}
    assert (world.now - began).total_seconds() < 150


def test_what_kueue_says_is_asked_while_the_cluster_is_suspended() -> None:
    world = World({"queue": {"name": "team-a"}})
    world.said["cluster-1"] = Queueing("NeverFits", "16 > 8")
    run_until(world, Phase.QUEUED)
    for _ in range(3):
        asyncio.run(world.reconciler().reconcile(KEY))
    assert "queue team-a: 16 > 8" in (world.seen_status.message or "")
    world.clusters[f"chat-{UID[:5]}"].suspended = False
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED


@pytest.mark.parametrize("may", [True, False])
def test_what_kuberay_refuses_is_read_from_its_events(*, may: bool) -> None:
    world = World()
    if not may:
        world.refused["Event"] = "events is forbidden"
    world.said["cluster-1"] = (Warned("FailedToCreate", "old news"), Warned("InvalidRayClusterSpec", "no containers"))
    operator = world.reconciler()
    for _ in range(3):
        asyncio.run(operator.reconcile(KEY))
        for cluster in world.clusters.values():
            cluster.seen = False
    assert "has not taken the RayCluster up" in (world.seen_status.message or "")
    world.tick(10)
    asyncio.run(operator.reconcile(KEY))
    assert ("InvalidRayClusterSpec: no containers" in (world.seen_status.message or "")) is may


def test_two_writes_until_the_cluster_exists() -> None:
    world = World(finalizers=["dsft.dev/release-cluster"])
    asyncio.run(world.reconciler().reconcile(KEY))
    assert world.calls == 2
    assert world.made == 1


class Storm(RuleBasedStateMachine):
    """Faults, edits and restarts in any order; the laws hold all along, and the run ends once the storm is over."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World({"retry": {"limit": 100}})
        self.operator = self.world.reconciler()

    @rule(count=st.integers(1, 4))
    def reconcile(self, count: int) -> None:
        for _ in range(count):
            try:
                asyncio.run(self.operator.reconcile(KEY))
            except KubeError:
                pass
            except Crash:
                self.operator = self.world.reconciler()

    @rule(count=st.integers(1, 3))
    def tick(self, count: int) -> None:
        for _ in range(count):
            self.world.tick()

    @rule(later=st.integers(1, 3), after=st.booleans())
    def crash_soon(self, later: int, *, after: bool) -> None:
        self.world.crash_at = (self.world.calls + later, after)

    @rule(fault=st.sampled_from(["restart_head", "lose_worker", "lose_cluster"]))
    def lose(self, fault: str) -> None:
        getattr(self.world, fault)()

    @rule(what=st.sampled_from(["kuberay", "api_down", "ray_down"]))
    def toggle(self, what: str) -> None:
        setattr(self.world, what, not getattr(self.world, what))

    @rule(suspend=st.booleans())
    def suspend(self, *, suspend: bool) -> None:
        self.world.edit(suspend=suspend)

    @precondition(lambda self: self.world.deleting is None)
    @rule()
    def delete(self) -> None:
        self.world.delete()

    @invariant()
    def status_says_why(self) -> None:
        status = self.world.seen_status
        assert status.phase is None or status.message
        assert len([a for a in status.attempts if a.end_time is None]) <= 1

    def teardown(self) -> None:
        world = self.world
        world.api_down = world.ray_down = False
        world.kuberay = True
        world.edit(suspend=False)
        settle(world, 400)
        if world.deleting is None:
            assert world.seen_status.phase is Phase.SUCCEEDED, world.seen_status.message
        else:
            assert world.gone
        world.tick()
        assert world.clusters == {} or world.gone


TestStorm = Storm.TestCase
TestStorm.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
