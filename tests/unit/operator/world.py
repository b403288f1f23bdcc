"""A small world for the reconciler: an API server with preconditions, KubeRay, and a Ray head that trains, all in memory.

Time moves only by `tick`. It counts what the laws are about: live clusters, drivers, submissions, and steps trained twice.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from dsft_api import CHECKPOINT_REQUEST
from dsft_api.conditions import FailureClass
from dsft_api.preflight import Finding
from dsft_api.progress import Progress, TrainerFailure, TrainerPhase
from dsft_api.status import FineTuneStatus
from dsft_operator.adapters.reading import Judge, run_of
from dsft_operator.core.observed import Pod, Queueing, Run, Warned
from dsft_operator.ports import Key, Manifest, RayError
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
class Job:
    """The preflight's Job, whose pod comes to a result after two ticks."""

    name: str
    uid: str
    owner: str
    created: datetime
    age: int = 0
    deleting: bool = False


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
    jobs: dict[str, Job] = field(default_factory=dict[str, Job])
    looked: int = 0  # Jobs that were made
    finds: tuple[Finding, ...] = ()  # what each preflight finds
    mute: bool = False  # preflights come to no result
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
    troubles: dict[str, str] = field(default_factory=dict[str, str])  # node -> what is wrong with it
    judge: Judge = field(default_factory=lambda: Judge(CONFIG))
    _read: Run | None = None
    _seen_status: tuple[dict[str, Any], FineTuneStatus] | None = None

    # --- time and faults

    def tick(self, seconds: float = 5) -> None:
        """Let the world move on."""
        self.now += timedelta(seconds=seconds)
        self._come_back()
        self._admit()
        self._collect_garbage()
        self.jobs = {name: job for name, job in self.jobs.items() if not job.deleting}
        for job in self.jobs.values():
            job.age += not self.mute
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
        for job in self.jobs.values():
            job.deleting |= self.gone

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
        self.api_down = self.ray_down = self.hold = self.mute = False
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
        may_delete = "delete Job" not in self.refused
        looks = [job.name for job in self.jobs.values() if may_delete and not job.deleting]
        assert len(looks) + len(live) <= 1, f"{looks} beside {[cluster.name for cluster in live]}"
        assert not (live and self.finds), f"made {live[0].name} in spite of {self.finds}"
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
