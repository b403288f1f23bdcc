"""The runs whose every point is disturbed: what the world and its users do, told so that it happens in a disturbed run too."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from dsft_api.conditions import FailureClass, Phase
from dsft_api.preflight import Finding
from dsft_operator.core.naming import FINALIZER
from dsft_operator.core.observed import Pod
from tests.unit.operator.simulated import Point, Simulation, Until, User
from tests.unit.operator.situations import UID
from tests.unit.operator.world import RayCluster, World

STEPS = 3
# Less than the 180 s, 60 s and 600 s of real life, each of whose looks would be a few more points of the same kind.
UNREACHABLE_SECONDS = 40
STRANDED_SECONDS = 15
PREFLIGHT_SECONDS = 40
SILENT_TICKS = 16
NAME = f"chat-{UID[:5]}"
# Deleted in a phase means there or later: a disturbed run may pass a phase by.
ORDER = list(Phase)


@dataclass(frozen=True)
class Story:
    """A run: the spec, what its users do, and the phase in which it comes to rest (None: it is gone)."""

    end: Phase | None = Phase.SUCCEEDED
    spec: dict[str, Any] = field(default_factory=dict[str, Any])
    user: User | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    submissions: int = 1
    clusters: int = 1
    pauses: bool = False  # a user lets time pass that is none of the run's

    @property
    def is_cut_off(self) -> bool:
        """Whether it ends when its time is up, however far it came."""
        return "runSeconds" in self.spec.get("deadlines", {})

    def simulation(self, point: Point | None = None, meanwhile: Callable[[World], None] | None = None) -> Simulation:
        """A fresh world with this story, disturbed at the point."""
        return Simulation(World(self.spec, steps=STEPS, **self.facts), self.user, point, meanwhile)


def phase(world: World) -> Phase | None:
    return world.seen_status.phase


def passed(world: World, seconds: float) -> Until:
    """So many seconds from now."""
    end = world.now + timedelta(seconds=seconds)
    return lambda: world.now >= end


def at_step(step: int, happens: Callable[[World], None]) -> User:
    """What happens once when the status tells of so many steps, and the driver stands there."""

    def user(world: World) -> Iterator[Until]:
        yield lambda: world.committed >= step
        world.hold = True
        yield lambda: world.trains and (told := world.seen_status.progress) is not None and told.step == step
        happens(world)
        world.hold = False

    return user


def new_token(world: World) -> Iterator[Until]:
    """What failed is mended, and goes on."""
    yield lambda: phase(world) is Phase.FAILED and not world.clusters
    world.fails_with = None
    world.edit(retry={"token": "2"})


def asks(world: World) -> Iterator[Until]:
    """For a checkpoint, at a step that the driver stands at until it is answered."""
    yield from at_step(1, lambda world: world.ask("before the maintenance"))(world)
    world.hold = True
    yield lambda: world.seen_status.checkpoint_request == world.asked
    world.hold = False


def suspends(world: World) -> Iterator[Until]:
    yield from at_step(1, lambda world: world.edit(suspend=True))(world)
    world.hold = True
    yield lambda: phase(world) is Phase.SUSPENDED
    world.hold = False


def resumes(world: World) -> Iterator[Until]:
    yield from suspends(world)
    world.edit(suspend=False)


def resumed_when_suspended(world: World) -> Iterator[Until]:
    yield lambda: phase(world) is Phase.SUSPENDED
    world.edit(suspend=False)


def resumes_with_other_pools(world: World) -> Iterator[Until]:
    yield from suspends(world)
    world.edit(nodePools=[{"name": "gpu", "nodes": 2, "gpusPerNode": 1, "nodeSelector": {"zone": "b"}}])
    world.edit(suspend=False)


QUEUE = {"queue": {"name": "team-a"}}
ADMITTED = {"generous": True, "queue_ticks": 8}


def foreigner(world: World) -> RayCluster:
    """A RayCluster that somebody else made under our name."""
    manifest = {"metadata": {"ownerReferences": [{"uid": "somebody"}], "annotations": {"dsft.dev/template-digest": ""}}}
    return RayCluster(NAME, "foreign", manifest, as_made=manifest)


def name_becomes_free(world: World) -> Iterator[Until]:
    world.clusters[NAME] = foreigner(world)
    yield lambda: phase(world) is Phase.PENDING
    yield passed(world, 20)
    del world.clusters[NAME]


WITHOUT_SECRET = (
    Pod(f"{NAME}-gpu-1", "worker", "gpu", waiting=("CreateContainerConfigError", 'secret "s3" not found')),
)


def secret_appears(world: World) -> Iterator[Until]:
    world.stuck, world.pods = True, WITHOUT_SECRET
    yield lambda: phase(world) is Phase.PROVISIONING
    yield passed(world, 20)
    world.stuck, world.pods = False, ()


def never_starts(world: World) -> Iterator[Until]:
    world.stuck, world.pods = True, WITHOUT_SECRET
    yield from ()


def stands_still(world: World) -> Iterator[Until]:
    yield from at_step(1, lambda _: None)(world)
    world.hold = True


def kuberay_comes(world: World) -> Iterator[Until]:
    world.kuberay = False
    yield lambda: phase(world) is Phase.PENDING
    yield passed(world, 20)
    world.kuberay = True


def is_mended(world: World) -> Iterator[Until]:
    yield lambda: phase(world) is Phase.FAILED
    world.edit(nodePools=[{"name": "gpu", "nodes": 2, "gpusPerNode": 1}])


def gone_before_it_was_known(world: World) -> Iterator[Until]:
    """Somebody deletes the RayCluster as soon as it is there."""
    yield lambda: bool(world.clusters)
    world.lose_cluster()


def gone_with_its_secret(world: World) -> Iterator[Until]:
    """Somebody deletes the RayCluster when it has its Secret, which goes a while later."""
    yield lambda: bool(world.children)
    world.lose_cluster()


def falls_silent(world: World) -> None:
    """The head answers nobody, for longer than the operator is patient with it."""
    world.go_without("ray_down", SILENT_TICKS)


def deleted(at: Phase) -> Story:
    """Deleted in a phase."""

    def user(world: World) -> Iterator[Until]:
        if at is Phase.PENDING:
            world.kuberay = False
        before = suspends(world) if at in (Phase.SUSPENDING, Phase.SUSPENDED) else ()
        for condition in before:
            yield lambda condition=condition: condition() or phase(world) is at
        yield lambda: (known := phase(world)) is not None and ORDER.index(known) >= ORDER.index(at)
        world.delete()

    queue = QUEUE if at is Phase.QUEUED else {}
    facts = {Phase.EXPORTING: {"exports": 3}, Phase.FAILED: {"fails_with": "DataInvalid"}}.get(at, {})
    never = at in (Phase.PENDING, Phase.QUEUED, Phase.PROVISIONING, Phase.STARTING)
    return Story(None, queue, user, facts, submissions=int(not never), clusters=int(at is not Phase.PENDING))


AVOIDS = {"nodePools": [{"name": "gpu", "nodes": 2, "gpusPerNode": 1, "avoidFailedNodes": True}]}


def gpu_fault(world: World) -> None:
    """The rank in a pod tells that its GPU has a fault."""
    world.pods = (Pod(f"{NAME}-gpu-1", "worker", "gpu", node="node-1", ready=True),)
    world.lose_worker("GpuFault", host=f"{NAME}-gpu-1")


LOOKS = {"preflight": {"enabled": True}}
FINDING = Finding(
    failure_class=FailureClass.DATA_INVALID, field="spec.data.train", message="no rows", remedy="add some"
)


def mends_what_was_found(world: World) -> Iterator[Until]:
    yield lambda: phase(world) is Phase.FAILED
    world.finds = ()
    world.edit(retry={"token": "2"})


def suspends_while_it_is_looked_at(world: World) -> Iterator[Until]:
    yield lambda: bool(world.jobs)
    world.edit(suspend=True)
    yield lambda: phase(world) is Phase.SUSPENDED
    world.edit(suspend=False)


def deleted_early(world: World) -> Iterator[Until]:
    yield passed(world, 20)
    world.delete()


def another_token_meanwhile(world: World) -> Iterator[Until]:
    """What was found is not mended, and what is set while the next look is under way is a look of its own."""
    yield lambda: phase(world) is Phase.FAILED
    world.edit(retry={"token": "2"})
    yield lambda: (look := world.seen_status.preflight) is not None and look.end_time is None and world.looked > 1
    world.edit(retry={"token": "3"})


NO_RIGHT: dict[str, Any] = {"refused": {"get Job": "the API server answered 403: jobs.batch is forbidden"}}
PREFLIGHTS: dict[str, Story] = {
    "nothing is found": Story(spec=LOOKS),
    "something is found": Story(Phase.FAILED, LOOKS, facts={"finds": (FINDING,)}, submissions=0, clusters=0),
    "what was found is mended": Story(spec=LOOKS, user=mends_what_was_found, facts={"finds": (FINDING,)}, pauses=True),
    "it comes to no result": Story(spec=LOOKS, facts={"mute": True}),
    "it does not in the time that nodes have": Story(
        Phase.FAILED, {**LOOKS, "deadlines": {"provisionSeconds": 20}}, facts={"mute": True}, submissions=0, clusters=0
    ),
    "suspended meanwhile": Story(spec=LOOKS, user=suspends_while_it_is_looked_at, pauses=True),
    "in a queue": Story(spec={**LOOKS, **QUEUE}, facts=ADMITTED),
    "a token more while it is looked at": Story(
        Phase.FAILED, LOOKS, another_token_meanwhile, {"finds": (FINDING,)}, submissions=0, clusters=0, pauses=True
    ),
    "Jobs may not be read": Story(spec=LOOKS, facts=NO_RIGHT),
    "Jobs may not be read, and nodes have their time": Story(
        Phase.FAILED, {**LOOKS, "deadlines": {"provisionSeconds": 20}}, facts=NO_RIGHT, submissions=0, clusters=0
    ),
    "Jobs may not be read, and it is deleted": Story(
        None, LOOKS, deleted_early, {**NO_RIGHT, "finalizers": [FINALIZER]}, submissions=0, clusters=0
    ),
}
FAILURES: dict[str, Story] = {
    "nothing fails": Story(),
    "a worker is lost": Story(user=at_step(1, World.lose_worker), submissions=2),
    "a GPU has a fault": Story(spec=AVOIDS, user=at_step(1, gpu_fault), submissions=2, clusters=2),
    "the head restarts": Story(user=at_step(1, World.restart_head), submissions=2),
    "the cluster is deleted": Story(user=at_step(1, World.lose_cluster), submissions=2, clusters=2),
    "the head falls silent": Story(user=at_step(1, falls_silent), submissions=2, clusters=2),
    "a node dies, and its pod never ends": Story(user=at_step(1, World.lose_node), submissions=2, clusters=2),
    "the API server is away at the end": Story(user=at_step(1, lambda world: world.go_without("api_down", 14))),
    "the program raises": Story(Phase.FAILED, facts={"fails_with": "UserCode"}),
    "deleted before it was known": Story(user=gone_before_it_was_known, clusters=2),
    "deleted with its Secret": Story(user=gone_with_its_secret, clusters=2),
}
USERS: dict[str, Story] = {
    "a new retry.token": Story(
        user=new_token, facts={"fails_with": "DataInvalid"}, submissions=2, clusters=2, pauses=True
    ),
    "a checkpoint is asked for": Story(user=asks),
    "suspended": Story(Phase.SUSPENDED, user=suspends),
    "suspended and resumed": Story(user=resumes, submissions=2, clusters=2, pauses=True),
    "resumed with other pools": Story(user=resumes_with_other_pools, submissions=2, clusters=2, pauses=True),
    "an invalid spec is mended": Story(spec={"nodePools": []}, user=is_mended, pauses=True),
    **{f"deleted while {at}": deleted(at) for at in Phase},
}
# What happens to a run at any moment, and not once it is told.
FAULTS: dict[str, Callable[[World], None]] = {
    "the RayCluster is deleted": World.lose_cluster,
    "the head restarts": World.restart_head,
    "a worker is lost": World.lose_worker,
    "the resource is deleted": World.delete,
    "it is suspended": lambda world: world.edit(suspend=True),
}
RESUMED = Story(user=resumed_when_suspended)
WAITS: dict[str, Story] = {
    "keepClusterSeconds": Story(spec={"keepClusterSeconds": 60}),
    "queued": Story(spec=QUEUE, facts=ADMITTED),
    "preempted by the queue": Story(spec=QUEUE, user=at_step(1, World.take_nodes), facts=ADMITTED, submissions=2),
    "queueSeconds": Story(Phase.FAILED, {**QUEUE, "deadlines": {"queueSeconds": 60}}, submissions=0),
    "provisionSeconds": Story(Phase.FAILED, {"deadlines": {"provisionSeconds": 60}}, never_starts, submissions=0),
    "runSeconds": Story(Phase.FAILED, {"deadlines": {"runSeconds": 60}}, stands_still),
    "the name is taken": Story(user=name_becomes_free),
    "a Secret is missing": Story(user=secret_appears),
    "KubeRay comes later": Story(user=kuberay_comes),
}
