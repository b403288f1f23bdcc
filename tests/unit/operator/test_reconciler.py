"""The reconciler in a small world: whatever dies and whenever, one cluster, one driver, one submission per attempt, one end."""

import asyncio
from typing import Any

import pytest

from dsft_api.conditions import FailureClass, Phase
from dsft_api.status import Checkpoints
from dsft_operator.core.observed import Pod, Queueing, Warned
from tests.unit.operator.fake_ports import operator_in
from tests.unit.operator.settling import PASSES, settle, without_times
from tests.unit.operator.situations import CONFIG, NOW, UID
from tests.unit.operator.world import KEY, World


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
    operator = operator_in(world)
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
    assert world.made == (2 if fault == "lose_cluster" else 1), "a cluster that is whole is used again"
    assert [attempt.failure_class for attempt in status.attempts] == [
        FailureClass.WORKER_LOST if fault == "lose_worker" else FailureClass.HEAD_LOST,
        None,
    ]


def test_a_head_that_is_not_ready_is_called_so_in_a_whole_sentence() -> None:
    """KubeRay's own words may be no more than "Unknown", as after an outage of the API server."""
    world = World()
    run_until(world, Phase.RUNNING)
    (found,) = world.clusters.values()
    found.age, found.head_message = 0, "Unknown"
    asyncio.run(operator_in(world).reconcile(KEY))
    assert world.seen_status.phase is Phase.RUNNING
    assert world.seen_status.message == "the head pod is not ready: Unknown"


def reached(phase: Phase) -> World:
    """A run in a phase, by the way that leads there."""
    world = World({"queue": {"name": "team-a"}} if phase is Phase.QUEUED else {})
    if phase is Phase.PENDING:
        world.kuberay = False
    if phase in (Phase.SUSPENDING, Phase.SUSPENDED):
        run_until(world, Phase.RUNNING)
        world.hold = True
        world.edit(suspend=True)
    if phase is Phase.EXPORTING:
        world.exports = 3
    if phase is Phase.FAILED:
        run_until(world, Phase.RUNNING)
        world.lose_worker("DataInvalid")
    run_until(world, phase)
    return world


@pytest.mark.parametrize("ray_down", [False, True], ids=["Ray answers", "Ray does not answer"])
@pytest.mark.parametrize("phase", Phase)
def test_deleted_in_every_phase(phase: Phase, *, ray_down: bool) -> None:
    world = reached(phase)
    world.delete()
    world.ray_down = ray_down
    began = world.now
    settle(world)
    assert world.gone
    assert (world.now - began).total_seconds() < 60


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in (Phase.SUCCEEDED, Phase.FAILED)])
def test_suspended_in_every_phase(phase: Phase) -> None:
    world = reached(phase)
    world.hold = True
    world.edit(suspend=True)
    settle(world)
    assert world.seen_status.phase is Phase.SUSPENDED
    assert world.clusters == {}
    assert all(attempt.end_time is not None for attempt in world.seen_status.attempts)
    world.hold, world.kuberay = False, True
    world.edit(suspend=False)
    while not world.clusters:
        run_until(world, Phase.QUEUED if phase is Phase.QUEUED else Phase.PROVISIONING)
    world.give_nodes()
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED


@pytest.mark.parametrize("phase", [Phase.SUCCEEDED, Phase.FAILED])
def test_a_run_that_is_over_stays_so_when_suspended(phase: Phase) -> None:
    world = reached(phase)
    world.edit(suspend=True)
    settle(world)
    assert world.seen_status.phase is phase
    assert world.seen_status.observed_generation == world.generation
    assert world.clusters == {}


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
    asyncio.run(operator_in(world).reconcile(KEY))
    assert world.seen_status.phase is Phase.PENDING
    assert "install KubeRay" in (world.seen_status.message or "")
    world.kuberay = True
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED


QUOTA = 'rayclusters.ray.io "chat" is forbidden: exceeded quota: used 9, limited 9'


@pytest.mark.parametrize("kind", ["RayCluster", "NetworkPolicy", "Secret"])
def test_what_the_api_server_refuses_is_told_and_tried_again(kind: str) -> None:
    world = World({"deadlines": {"provisionSeconds": 300}}, refused={kind: QUOTA})
    operator = operator_in(world)
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
    operator = operator_in(world)
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
        asyncio.run(operator_in(world).reconcile(KEY))
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
    operator = operator_in(world)
    for _ in range(3):
        asyncio.run(operator.reconcile(KEY))
        for cluster in world.clusters.values():
            cluster.seen = False
    assert "has not taken the RayCluster up" in (world.seen_status.message or "")
    world.tick(10)
    asyncio.run(operator.reconcile(KEY))
    assert ("InvalidRayClusterSpec: no containers" in (world.seen_status.message or "")) is may


def test_events_tell_the_transitions_once() -> None:
    world = World()
    operator = operator_in(world)
    asyncio.run(operator.reconcile(KEY))
    world.pods = (Pod("chat-gpu-1", "worker", "gpu", waiting=("ImagePullBackOff", "not found")),)
    for _ in range(5):
        asyncio.run(operator.reconcile(KEY))
    world.pods = ()
    settle(world)
    assert world.events == [
        ("Normal", "Provisioning"),
        ("Warning", "ImagePull"),
        ("Normal", "Starting"),
        ("Normal", "Running"),
        ("Normal", "Succeeded"),
    ]


def test_a_damaged_checkpoint_is_told_once() -> None:
    world = World()
    run_until(world, Phase.RUNNING)
    world.hold = True
    (cluster,) = world.clusters.values()
    operator = operator_in(world)
    for _ in range(3):
        assert cluster.progress is not None
        told = cluster.progress.checkpoints or Checkpoints()
        told = told.model_copy(update={"damaged": ("step-00000006-a1.g1",)})
        cluster.progress = cluster.progress.model_copy(update={"checkpoints": told})
        asyncio.run(operator.reconcile(KEY))
        world.tick()
    assert world.events.count(("Warning", "CheckpointDamaged")) == 1


def test_events_that_cannot_be_posted_stop_nothing() -> None:
    world = World(refused={"Event of ours": "events is forbidden"})
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED


def test_a_root_key_that_cannot_be_read_is_told() -> None:
    world = World()
    run_until(world, Phase.RUNNING)
    world.refused["root key"] = "secrets is forbidden"
    asyncio.run(operator_in(world).reconcile(KEY))
    assert "root key" in (world.seen_status.message or "")
    assert "secrets is forbidden" in (world.seen_status.message or "")
    world.refused.clear()
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED
    assert world.submissions == ["0a1b2c3d-a1"]


def test_two_writes_until_the_cluster_exists() -> None:
    world = World()
    asyncio.run(operator_in(world).reconcile(KEY))
    assert world.calls == 3, "finalizer, RayCluster, status"
    assert world.made == 1


def test_nothing_is_made_by_an_old_look_at_the_resource() -> None:
    """An operator that stood still after it had read the resource: meanwhile its RayCluster is another incarnation."""
    world = World()
    run_until(world, Phase.PROVISIONING)
    old = world.raw
    run_until(world, Phase.RUNNING)
    world.lose_cluster()
    run_until(world, Phase.PROVISIONING)
    world.before, world.stale_reads = old, 1
    asyncio.run(operator_in(world).reconcile(KEY))
    assert [cluster.name for cluster in world.clusters.values()] == [f"chat-{UID[:5]}-2"]
