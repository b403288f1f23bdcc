"""A small world for the reconciler: an API server with preconditions, KubeRay, and a Ray head that trains, all in memory.

Time moves only by `tick`. It counts what the laws are about: live clusters, drivers, submissions, and steps trained twice.
"""

import asyncio
import copy
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from dsft_api import CHECKPOINT_REQUEST
from dsft_api.conditions import FailureClass
from dsft_api.job import SAVE_ENV
from dsft_api.progress import Progress, TrainerFailure, TrainerPhase
from dsft_api.status import FineTuneStatus
from dsft_operator.adapters.reading import Judge, run_of
from dsft_operator.core.decision import SubmitJob
from dsft_operator.core.naming import FINALIZER, ray_token
from dsft_operator.core.observed import Cluster, Head, Pod, Queueing, RayJob, Run, Unknown, Warned
from dsft_operator.ports import Conflict, Key, KubeError, KubeRayMissing, Manifest, RayError
from dsft_operator.runtime.reconciler import Reconciler
from tests.unit.operator.situations import CONFIG, NOW, OUTPUT, UID, resource, told

KEY = Key("ml", "chat")
STEPS = 6


class Crash(BaseException):
    """The operator's process dies here."""


@dataclass
class RayCluster:
    """A cluster, its head's session, and the drivers there."""

    name: str
    uid: str
    manifest: Manifest
    age: int = 0
    deleting: bool = False
    suspended: bool = False
    queued: int = 0  # ticks
    seen: bool = True
    created: datetime = NOW
    as_made: Manifest = field(default_factory=dict[str, Any])
    session: int = 1
    jobs: dict[str, str] = field(default_factory=dict[str, str])
    ended: dict[str, datetime] = field(default_factory=dict[str, datetime])
    head_message: str = ""
    dead_since: datetime | None = None  # one of its nodes: the pod there never ends
    token_of: str | None = None  # the cluster whose Secret its pods started with
    progress: Progress | None = None
    saves: dict[str, str] = field(default_factory=dict[str, str])  # submission -> the request it passed on

    @property
    def owner(self) -> str:
        return self.manifest["metadata"]["ownerReferences"][0]["uid"]

    @property
    def ready(self) -> bool:
        return self.age >= 2 and self.token_of is not None and self.seen and not self.deleting and not self.suspended


@dataclass
class World:
    """Everything but the operator."""

    spec: dict[str, Any] = field(default_factory=dict[str, Any])
    now: datetime = NOW
    status: dict[str, Any] = field(default_factory=dict[str, Any])
    steps: int = STEPS
    finalizers: list[str] = field(default_factory=list[str])
    version: int = 1
    generation: int = 1
    deleting: datetime | None = None
    gone: bool = False
    clusters: dict[str, RayCluster] = field(default_factory=dict[str, RayCluster])
    children: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])  # kind and name -> owner
    made: int = 0
    submissions: list[str] = field(default_factory=list[str])
    committed: int = 0
    calls: int = 0
    crash_at: tuple[int, bool] | None = None  # the call, and whether its effect happens first
    # What another operator does while the one at this call stands still.
    meanwhile: tuple[int, Callable[[], None]] | None = None
    lost_reply_at: int | None = None  # the call whose effect happens, and whose answer is lost
    stale_reads: int = 0  # so many reads of the resource still show it as it was before the last write
    before: dict[str, Any] = field(default_factory=dict[str, Any])
    kuberay: bool = True
    without: dict[str, int] = field(default_factory=dict[str, int])  # what is away, and for how many more ticks
    api_down: bool = False
    ray_down: bool = False
    pods: tuple[Pod, ...] = ()
    events: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    zombie_reads: int = 0  # so many reads of the progress show the document of an earlier attempt
    generous: bool = False  # the queue gives nodes to whoever asks
    queue_ticks: int = 0  # after so long
    exports: int = 0  # looks that an export takes
    hold: bool = False  # drivers stand still
    stuck: bool = False  # pods do not start
    fails_with: str | None = None  # each driver, after a step
    refused: dict[str, str] = field(default_factory=dict[str, str])  # kind or verb -> the words it is refused with
    asked: str | None = None  # annotation dsft.dev/checkpoint-request
    said: dict[str, Queueing | tuple[Warned, ...]] = field(default_factory=dict[str, Any])  # uid -> what its owner says
    judge: Judge = field(default_factory=lambda: Judge(CONFIG))
    _read: Run | None = None
    _seen_status: tuple[dict[str, Any], FineTuneStatus] | None = None

    def reconciler(self) -> Reconciler:
        """A fresh operator process."""
        return Reconciler(FakeKube(self), FakeRay(self), WorldClock(self), CONFIG)

    # --- time and faults

    def tick(self, seconds: float = 5) -> None:
        """Let the world move on."""
        self.now += timedelta(seconds=seconds)
        self._come_back()
        self._admit()
        self._collect_garbage()
        for cluster in list(self.clusters.values()):
            cluster.age += not self.stuck
            if cluster.deleting:
                del self.clusters[cluster.name]
                continue
            cluster.token_of = cluster.token_of or self.children.get(("Secret", cluster.name))
            for submission, state in cluster.jobs.items():
                self._drive(cluster, submission, state)
                self._answer(cluster)
        self.check_laws()

    def _collect_garbage(self) -> None:
        """What an owner leaves behind goes a while after it."""
        owners = {cluster.uid for cluster in self.clusters.values()}
        self.children = {child: owner for child, owner in self.children.items() if owner in owners}
        for cluster in self.clusters.values():
            cluster.deleting |= self.gone and cluster.owner == UID

    def _drive(self, cluster: RayCluster, submission: str, state: str) -> None:
        attempt = int(submission.rpartition("a")[2])
        if state == "RUNNING" and self.committed and self.fails_with is not None:
            self.lose_worker(self.fails_with)
            return
        if state == "PENDING":
            cluster.jobs[submission] = "RUNNING"
            cluster.progress = told(TrainerPhase.LOADING, attempt)
        elif state == "RUNNING" and cluster.dead_since is not None:
            cluster.progress = told(TrainerPhase.STARTING, attempt, step=self.committed, committed=self.committed)
        elif state == "RUNNING" and self.hold and self.committed:
            cluster.progress = told(TrainerPhase.TRAINING, attempt, step=self.committed, committed=self.committed)
        elif state == "RUNNING" and not self.hold:
            self.committed = min(self.steps, self.committed + 1)
            phase = TrainerPhase.SUCCEEDED if self.committed >= self.steps else TrainerPhase.TRAINING
            if phase is TrainerPhase.SUCCEEDED and self.exports:
                self.exports -= 1
                phase = TrainerPhase.EXPORTING
            cluster.progress = told(phase, attempt, step=self.committed, committed=self.committed)
            if phase is TrainerPhase.SUCCEEDED:
                cluster.progress = cluster.progress.model_copy(update={"output": OUTPUT})
                self.end(cluster, submission, "SUCCEEDED")

    def _answer(self, cluster: RayCluster) -> None:
        """Each step is committed here, so whatever was asked for is there."""
        if cluster.saves and cluster.progress is not None:
            (*_, value) = cluster.saves.values()
            cluster.progress = cluster.progress.model_copy(update={"checkpoint_request": value})

    def end(self, cluster: RayCluster, submission: str, state: str) -> None:
        cluster.jobs[submission] = state
        cluster.ended[submission] = self.now

    def go_without(self, what: str, ticks: int) -> None:
        """Be without KubeRay, the API server, Ray or steps (hold) for so many ticks."""
        self.without[what] = ticks
        setattr(self, what, what != "kuberay")

    def restore(self) -> None:
        """All is there again, and nothing is planned to go wrong."""
        self.without.clear()
        self.api_down = self.ray_down = self.hold = False
        self.kuberay, self.stale_reads, self.lost_reply_at, self.crash_at = True, 0, None, None

    def _come_back(self) -> None:
        for what, ticks in list(self.without.items()):
            self.without[what] = ticks - 1
            if ticks <= 1:
                del self.without[what]
                setattr(self, what, what == "kuberay")

    def pods_without_secret(self, name: str) -> tuple[Pod, ...]:
        """The head of a cluster, while it waits for the Secret."""
        cluster = self.clusters.get(name)
        if cluster is None or cluster.age == 0 or cluster.token_of or cluster.suspended or not cluster.seen:
            return ()
        if ("Secret", name) in self.children:
            return ()
        waiting = ("CreateContainerConfigError", f'secret "{name}" not found')
        return (Pod(f"{name}-head", "head", "headgroup", waiting=waiting),)

    def dead_pods(self, name: str) -> tuple[Pod, ...]:
        """The pod of a cluster whose node is dead."""
        cluster = self.clusters.get(name)
        if cluster is None or cluster.dead_since is None:
            return ()
        return (Pod(f"{name}-gpu-1", "worker", "gpu", node="node-1", deleting=True, gone_by=cluster.dead_since),)

    def check_untouched(self) -> None:
        """What only users, Kueue and KubeRay write is as they wrote it."""
        for cluster in self.clusters.values():
            assert cluster.manifest == cluster.as_made

    def check_laws(self) -> None:
        """One of each."""
        live = [cluster for cluster in self.clusters.values() if not cluster.deleting]
        assert len(live) <= 1, f"{len(live)} live clusters"
        assert len(self.submissions) == len(set(self.submissions)), f"submitted twice: {self.submissions}"
        drivers = [job for cluster in live for job, state in cluster.jobs.items() if state in ("PENDING", "RUNNING")]
        assert len(drivers) <= 1, f"drivers at once: {drivers}"

    @property
    def trains(self) -> bool:
        """A driver runs."""
        return any("RUNNING" in c.jobs.values() for c in self.clusters.values() if not c.deleting)

    def restart_head(self) -> None:
        """A new session that knows no jobs."""
        for cluster in self.clusters.values():
            self._new_session(cluster)

    def let_a_zombie_write(self) -> None:
        """What is left of an earlier attempt writes its document over the one that counts."""
        self.zombie_reads = 3

    def _admit(self) -> None:
        """A queue that has nodes gives them to whoever has asked for long enough."""
        for cluster in self.clusters.values():
            cluster.queued = cluster.queued + 1 if cluster.suspended else 0
            cluster.suspended &= not self.generous or cluster.queued <= self.queue_ticks

    def give_nodes(self) -> None:
        """The queue admits the cluster."""
        for cluster in self.clusters.values():
            cluster.suspended = False

    def take_nodes(self) -> None:
        """The queue takes the nodes back: the pods go, and the drivers with them."""
        for cluster in self.clusters.values():
            if "queue" in self.spec and not cluster.deleting:
                cluster.suspended, cluster.age = True, 0
                self._new_session(cluster)

    def _new_session(self, cluster: RayCluster) -> None:
        cluster.session += 1
        cluster.jobs.clear()
        cluster.saves.clear()
        cluster.progress = None

    def lose_worker(self, failure_class: str = "WorkerLost", host: str | None = None) -> None:
        """The driver fails and says why."""
        for cluster in self.clusters.values():
            for submission, state in cluster.jobs.items():
                if state == "RUNNING":
                    failure = TrainerFailure(
                        failure_class=FailureClass(failure_class),
                        message="rank 1 is gone",
                        remedy="nothing",
                        exit_code=1,
                        host=host,
                    )
                    attempt = int(submission.rpartition("a")[2])
                    self.end(cluster, submission, "FAILED")
                    cluster.progress = told(
                        TrainerPhase.FAILED, attempt, step=self.committed, committed=self.committed, failure=failure
                    )

    def lose_node(self) -> None:
        """A node dies, and nobody ends the pod there."""
        for cluster in self.clusters.values():
            cluster.dead_since = self.now

    def lose_cluster(self) -> None:
        """Somebody deletes the RayCluster."""
        for cluster in self.clusters.values():
            cluster.deleting = True

    def edit(self, **spec: Any) -> None:
        """The user changes the spec."""
        self.spec = {**self.spec, **spec}
        self.version += 1
        self.generation += 1

    def ask(self, value: str) -> None:
        """The user asks for a checkpoint."""
        self.asked = value
        self.version += 1

    def delete(self) -> None:
        """The user deletes the resource."""
        if self.deleting is None and not self.gone:
            self.deleting = self.now
            self.version += 1
            self.gone = not self.finalizers

    # --- how the operator gets at it

    def called(self, *, after: bool) -> None:
        """Count a call; die before or after its effect where that was planned."""
        if not after:
            self.calls += 1
        if not after and self.meanwhile is not None and self.meanwhile[0] == self.calls:
            other, self.meanwhile = threading.Thread(target=self.meanwhile[1]), None
            other.start()
            other.join()
        if self.crash_at == (self.calls, after):
            raise Crash
        if after and self.lost_reply_at == self.calls:
            raise RayError("the connection was reset")

    @property
    def run(self) -> Run | None:
        """The resource as an operator reads it now."""
        if self.gone:
            return None
        if self._read is None or self._read.resource_version != str(self.version):
            self._read = run_of(self.raw, CONFIG, self.judge)
        return self._read

    @property
    def raw(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"deletionTimestamp": self.deleting.isoformat()} if self.deleting else {}
        if self.asked is not None:
            extra["annotations"] = {CHECKPOINT_REQUEST: self.asked}
        metadata = {"finalizers": self.finalizers, "resourceVersion": str(self.version), "generation": self.generation}
        return {**resource(self.spec, **metadata, **extra), "status": self.status}

    def remember(self) -> None:
        """Keep the resource as it is now, for whoever reads it late."""
        self.before = self.raw

    @property
    def seen_status(self) -> FineTuneStatus:
        if self._seen_status is None or self._seen_status[0] is not self.status:
            self._seen_status = self.status, FineTuneStatus.model_validate(self.status)
        return self._seen_status[1]


@dataclass
class WorldClock:
    """`ports.Clock` on a World."""

    world: World

    def now(self) -> datetime:
        return self.world.now


class FakeKube:
    """`ports.Kube` on a World."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def run(self, key: Key) -> Run | None:
        self._up()
        if self._world.stale_reads and self._world.before and not self._world.gone:
            self._world.stale_reads -= 1
            return run_of(self._world.before, CONFIG, self._world.judge)
        return self._world.run

    async def runs(self) -> dict[Key, str]:
        self._up()
        return {} if self._world.gone else {KEY: str(self._world.version)}

    async def cluster(self, key: Key, name: str, run_uid: str) -> Cluster | None:
        self._up()
        if not self._world.kuberay:
            raise KubeRayMissing("no API")
        found = self._world.clusters.get(name)
        if found is None:
            return None
        return Cluster(
            name=name,
            uid=found.uid,
            owned=found.owner == run_uid,
            deleting=found.deleting,
            template_digest=found.manifest["metadata"]["annotations"]["dsft.dev/template-digest"],
            suspended=found.suspended,
            created=found.created,
            seen_by_kuberay=found.seen,
            head_ready=found.ready,
            head_message=found.head_message,
            ready_workers=2 - (found.dead_since is not None) if found.ready else 0,
            desired_workers=2,
            head_address=name if found.ready else None,
        )

    async def pods(self, key: Key, cluster: str) -> tuple[Pod, ...]:
        return (*self._world.pods, *self._world.pods_without_secret(cluster), *self._world.dead_pods(cluster))

    async def queueing(self, key: Key, cluster_uid: str) -> Queueing | None:
        self._up()
        said = self._world.said.get(cluster_uid)
        return said if isinstance(said, Queueing) else None

    async def warnings(self, key: Key, uid: str) -> tuple[Warned, ...]:
        self._up()
        self._may("Event")
        said = self._world.said.get(uid, ())
        return said if isinstance(said, tuple) else ()

    async def create(self, manifest: Manifest) -> None:
        self._may(manifest["kind"])
        self._write(lambda: self._create(manifest))

    def _create(self, manifest: Manifest) -> None:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "RayCluster" and name not in self._world.clusters:
            self._world.made += 1
            self._world.clusters[name] = RayCluster(
                name,
                f"cluster-{self._world.made}",
                manifest,
                suspended=manifest["spec"].get("suspend", False),
                created=self._world.now,
                as_made=copy.deepcopy(manifest),
            )
        elif manifest["kind"] == "NetworkPolicy":
            owner = manifest["metadata"]["ownerReferences"][0]["uid"]
            self._world.children.setdefault(("NetworkPolicy", name), owner)

    async def create_token(self, key: Key, cluster: str, cluster_uid: str) -> None:
        self._may("Secret")

        self._write(lambda: self._world.children.setdefault(("Secret", cluster), cluster_uid))

    async def token(self, cluster_uid: str) -> str:
        self._may("root key")
        return ray_token(b"root", cluster_uid)

    async def delete_cluster(self, key: Key, name: str, uid: str) -> None:
        def effect() -> None:
            found = self._world.clusters.get(name)
            if found is not None and found.uid == uid:
                found.deleting = True

        self._write(effect)

    async def set_finalizer(self, run: Run, *, present: bool) -> str:
        def effect() -> None:
            self._precondition(run.resource_version)
            wanted = [FINALIZER] if present else []
            self._world.version += wanted != self._world.finalizers
            self._world.finalizers = wanted
            self._world.gone = self._world.deleting is not None and not present

        self._write(effect)
        return str(self._world.version)

    async def apply_status(self, run: Run, status: FineTuneStatus, resource_version: str) -> None:
        def effect() -> None:
            self._precondition(resource_version)
            self._world.remember()
            self._world.status = status.to_wire()
            self._world.version += 1

        self._write(effect)

    async def event(self, run: Run, kind: str, reason: str, message: str) -> None:
        self._may("Event of ours")
        self._world.events.append((kind, reason))

    def _precondition(self, version: str) -> None:
        if version != str(self._world.version) or self._world.gone:
            raise Conflict("the object has been modified")

    def _may(self, kind: str) -> None:
        if kind in self._world.refused:
            raise KubeError(self._world.refused[kind])

    def _up(self) -> None:
        if self._world.api_down:
            raise KubeError("down")

    def _write(self, effect: Any) -> None:
        self._up()
        self._world.called(after=False)
        effect()
        self._world.called(after=True)


class FakeRay:
    """`ports.RayJobs` on a World; a cluster's address is its name."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _at(self, address: str, token: str) -> RayCluster | None:
        found = self._world.clusters.get(address)
        if self._world.ray_down or found is None or not found.ready or found.token_of is None:
            return None
        return found if token == ray_token(b"root", found.token_of) else None

    async def head(self, address: str, token: str) -> Head | Unknown:
        found = self._at(address, token)
        return Head(f"{found.uid}-s{found.session}", "2.60.0") if found else Unknown("refused")

    async def job(self, address: str, token: str, submission_id: str) -> RayJob | Unknown | None:
        found = self._at(address, token)
        if found is None:
            return Unknown("refused")
        state: Any = "SUCCEEDED" if submission_id in found.saves else found.jobs.get(submission_id)
        return RayJob(submission_id, state, ended=found.ended.get(submission_id)) if state else None

    async def submit(self, address: str, token: str, job: SubmitJob) -> None:
        found = self._at(address, token)
        if found is None or "submit" in self._world.refused:
            raise RayError(self._world.refused.get("submit", "refused"))
        self._world.called(after=False)
        if SAVE_ENV in job.environment:
            found.saves[job.submission_id] = job.environment[SAVE_ENV]
        elif job.submission_id not in found.jobs:
            self._world.submissions.append(job.submission_id)
            found.jobs[job.submission_id] = "PENDING"
        self._world.called(after=True)

    async def stop(self, address: str, token: str, submission_id: str) -> None:
        found = self._at(address, token)
        if found is None or "stop" in self._world.refused:
            raise RayError(self._world.refused.get("stop", "refused"))
        self._world.called(after=False)
        if found.jobs.get(submission_id) in ("PENDING", "RUNNING"):
            self._world.end(found, submission_id, "STOPPED")
            if found.progress is not None:
                found.progress = found.progress.model_copy(update={"phase": TrainerPhase.INTERRUPTED})
        self._world.called(after=True)

    async def progress(self, address: str, token: str) -> Progress | Unknown | None:
        found = self._at(address, token)
        attempt = (self._world.seen_status.attempt or 0) - 1
        if self._world.zombie_reads and attempt > 0:
            self._world.zombie_reads -= 1
            return told(TrainerPhase.TRAINING, attempt, step=999, committed=999)
        return found.progress if found else Unknown("refused")


PASSES = 200
# Passes at one moment until nothing is left to do: the longest chain of steps of the rules, and some.
MOST_PASSES_AT_ONCE = 12


def settle(world: World, passes: int = PASSES) -> None:
    """Reconcile and let time go by until the run has ended and nothing is left to do."""
    operator = world.reconciler()
    quiet = at_once = 0
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
        at_once = at_once + 1 if pause == 0.0 else 0
        assert at_once < MOST_PASSES_AT_ONCE, f"turns in circles: {world.seen_status.message}"
        if pause != 0.0:
            world.tick()
    raise AssertionError(f"not settled after {passes} passes: {world.seen_status.phase} {world.seen_status.message}")


# How long it was, and the words of the last look: another look has others.
_SILENCE = re.compile(r"for \d+ s: .* ->")


def without_times(status: FineTuneStatus) -> FineTuneStatus:
    """A status without what the clock and the number of attempts decide."""
    conditions = tuple(condition.model_copy(update={"last_transition_time": NOW}) for condition in status.conditions)
    return replace_status(status, conditions=conditions)


def replace_status(status: FineTuneStatus, **changes: Any) -> FineTuneStatus:
    timeless = dict.fromkeys(("start_time", "completion_time", "phase_time"), NOW)
    attempts = tuple(
        a.model_copy(
            update={
                "start_time": NOW,
                "end_time": NOW,
                "spent": None,
                "message": _SILENCE.sub("for N s ->", a.message or ""),
            }
        )
        for a in status.attempts
    )
    return status.model_copy(update={**timeless, "attempts": attempts, "usage": None, **changes})


def outcome(world: World) -> Any:
    """What must be the same however a run came to its end: all but times, and the book of how it came there."""
    status = without_times(world.seen_status)
    ways = (
        "attempt",
        "attempts",
        "retries",
        "ray_cluster",
        "job",
        "observed_generation",
        "retry_token",
        "resolved",
        "logs",
    )
    conditions = tuple(condition.model_copy(update={"observed_generation": 1}) for condition in status.conditions)
    checkpoints = status.checkpoints and status.checkpoints.model_copy(update={"retained": ()})
    return status.model_copy(update={**dict.fromkeys(ways), "conditions": conditions, "checkpoints": checkpoints})


__all__ = ["KEY", "PASSES", "STEPS", "Crash", "World", "outcome", "replace", "settle", "without_times"]
