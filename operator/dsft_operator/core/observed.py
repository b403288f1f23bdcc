"""What was seen of one run, as values. "Could not be read" is a value of its own (`Unknown`), never None."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from dsft_api.preflight import PreflightResult
from dsft_api.problem import Problem
from dsft_api.progress import Progress
from dsft_api.spec import FineTuneSpec
from dsft_api.status import FineTuneStatus


@dataclass(frozen=True)
class Unknown:
    """A fact that could not be read, and why."""

    reason: str


@dataclass(frozen=True)
class Run:
    """The resource. `spec` has the admin's defaults; it is None where it cannot be parsed, and `problems` say why.

    `identity` is the digest of the frozen part as the user wrote it: the admin's defaults may move under a run.
    `ignored` are the fields of a newer custom resource definition, which this operator does not know.
    """

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    spec: FineTuneSpec | None
    status: FineTuneStatus
    identity: str | None = None
    problems: tuple[Problem, ...] = ()
    ignored: tuple[str, ...] = ()
    deleting: datetime | None = None
    finalizers: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    checkpoint_request: str | None = None  # of annotation dsft.dev/checkpoint-request


@dataclass(frozen=True)
class Warned:
    """A Warning Event about an object: what it does not say in its status."""

    reason: str
    message: str


@dataclass(frozen=True)
class Queueing:
    """What the queue says about a suspended RayCluster: a reason of ours (`conditions.WAITS`), and its words.

    `place`: which one it is of how many that wait in its LocalQueue, where that is known.
    """

    reason: str
    message: str
    place: tuple[int, int] | None = None
    evicted: str | None = None  # why its nodes were taken back, until it gets some again


@dataclass(frozen=True)
class Cluster:
    """Our RayCluster, or one that has its name (`owned` False)."""

    name: str
    uid: str
    owned: bool
    deleting: bool = False
    template_digest: str | None = None
    suspended: bool = False
    head_ready: bool = False
    head_message: str = ""
    ready_workers: int = 0
    desired_workers: int = 0
    head_address: str | None = None
    problem: str | None = None  # what KubeRay says it cannot do
    created: datetime | None = None
    seen_by_kuberay: bool = True  # it has a status
    warning: Warned | None = None
    managed_by: str | None = None  # who makes its pods, elsewhere; None: KubeRay, here


@dataclass(frozen=True)
class Ended:
    """How a container ended, or why its pod had to go. Kept in memory, since KubeRay deletes failed pods at once."""

    pod: str
    role: Literal["head", "worker"]
    node: str | None
    reason: str
    exit_code: int | None = None  # of a container
    message: str = ""
    at: datetime | None = None
    disrupted: bool = False  # Kubernetes took the pod away: preempted, evicted, its node drained or lost

    def __str__(self) -> str:
        words = f"{self.role} {self.pod} on {self.node or 'no node'}: {self.reason or 'ended'}"
        code = "" if self.exit_code is None else f", exit code {self.exit_code}"
        last = self.message.strip().rpartition("\n")[2]
        return f"{words}{code}{f': {last[:200]}' if last else ''}"


@dataclass(frozen=True)
class Pod:
    """One Ray pod."""

    name: str
    role: Literal["head", "worker"]
    pool: str
    uid: str = ""
    node: str | None = None
    ready: bool = False
    deleting: bool = False
    gone_by: datetime | None = None  # of one that is being deleted: its grace is over then
    unscheduled: str | None = None  # the scheduler's words
    waiting: tuple[str, str] | None = None  # reason and message of a container that does not start
    waits_for_head: bool = False  # KubeRay's init container asks the head until it answers
    preparing_since: datetime | None = None  # on a node, and no container has started: volumes, sandbox, image
    warning: Warned | None = None
    image_id: str | None = None
    ended: tuple[Ended, ...] = ()


@dataclass(frozen=True)
class PreflightJob:
    """The preflight's Job, or one that has its name (`owned` False).

    `pod` is the one that it has made, and `result` what this told; `failed` why the Job is over without a result.
    """

    name: str
    uid: str
    owned: bool
    deleting: bool = False
    suspended: bool = False
    created: datetime | None = None
    failed: str | None = None
    pod: Pod | None = None
    result: PreflightResult | None = None
    warning: Warned | None = None


@dataclass(frozen=True)
class Head:
    """A head whose API answers."""

    session: str
    ray_version: str


@dataclass(frozen=True)
class RayJob:
    """A submission, as Ray's Jobs API tells it."""

    submission_id: str
    state: Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
    message: str = ""
    error_type: str | None = None
    exit_code: int | None = None
    ended: datetime | None = None

    @property
    def is_over(self) -> bool:
        """No driver is running."""
        return self.state in ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True)
class Observed:
    """Everything the decision is made from. None: certainly not there."""

    run: Run
    cluster: Cluster | Unknown | None = None
    kuberay_installed: bool = True
    preflight: PreflightJob | Unknown | None = None
    pods: tuple[Pod, ...] = ()
    head: Head | Unknown | None = None
    job: RayJob | Unknown | None = None
    progress: Progress | Unknown | None = None
    save: RayJob | Unknown | None = (
        None  # the submission that passes a checkpoint request on; asked for only where one is open
    )
    queue: Queueing | Unknown | None = None
    evidence: tuple[Ended, ...] = ()  # containers that ended in this attempt, also of pods that are gone
    nodes: Mapping[str, str] = field(default_factory=dict[str, str])  # what is wrong with those on which they ended
