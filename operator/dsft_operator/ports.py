"""What the reconciler needs from the world, as protocols: the adapters implement them, tests put fakes in their place."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from dsft_api.progress import Progress
from dsft_api.status import FineTuneStatus
from dsft_operator.core.decision import SubmitJob
from dsft_operator.core.observed import Cluster, Head, Pod, PreflightJob, Queueing, RayJob, Run, Unknown, Warned

Manifest = dict[str, Any]


class Key(NamedTuple):
    """Which run."""

    namespace: str
    name: str


class Conflict(Exception):  # noqa: N818  not an error: somebody else was first
    """A precondition did not hold: what was seen is old. Look again."""


class KubeError(Exception):
    """The API server refused or did not answer; the message is fit for a user."""


class Refused(KubeError):  # noqa: N818  an answer
    """A definite answer of the API server: no right to it, or a policy against it. Asked again, it says the same."""


class Kube(Protocol):
    """The Kubernetes API. Every call is bounded in time.

    Raises: KubeError, and Conflict where a precondition is named.
    """

    async def run(self, key: Key) -> Run | None:
        """The resource; None if it is gone."""
        ...

    async def runs(self) -> dict[Key, str]:
        """All resources that are served, with their resourceVersions."""
        ...

    async def cluster(self, key: Key, name: str, run_uid: str) -> Cluster | None:
        """The RayCluster of that name; None if there is none.

        Raises:
            KubeRayMissing: the API server does not know RayClusters.
        """
        ...

    async def preflight(self, key: Key, name: str, run_uid: str) -> PreflightJob | None:
        """The preflight's Job of that name, with its pod; None if there is none. Raises Refused too."""
        ...

    async def pods(self, key: Key, cluster: str) -> tuple[Pod, ...]:
        """The Ray pods of a cluster."""
        ...

    async def queueing(self, key: Key, cluster_uid: str) -> Queueing | None:
        """What Kueue says about a RayCluster; None if it has not looked at it yet."""
        ...

    async def warnings(self, key: Key, uid: str) -> tuple[Warned, ...]:
        """Warning Events about an object of the run's namespace, oldest first."""
        ...

    async def node_trouble(self, name: str) -> str | None:
        """What is wrong with a node, in its own conditions' words; None if nothing is."""
        ...

    async def create(self, manifest: Manifest) -> None:
        """Create an object; one of that name that exists already is success."""
        ...

    async def create_token(self, key: Key, cluster: str, cluster_uid: str) -> None:
        """Create the Secret with the Ray token of a cluster."""
        ...

    async def token(self, cluster_uid: str) -> str:
        """The Ray token of a cluster, derived from the root key."""
        ...

    async def delete_cluster(self, key: Key, name: str, uid: str) -> None:
        """Delete the RayCluster if it has this uid; one that is gone is success."""
        ...

    async def delete_job(self, key: Key, name: str, uid: str) -> None:
        """Delete the preflight's Job if it has this uid; one that is gone is success. Raises Refused too."""
        ...

    async def set_finalizer(self, run: Run, *, present: bool) -> str:
        """Add or remove our finalizer if the resource has not changed; its new resourceVersion. Raises Conflict."""
        ...

    async def apply_status(self, run: Run, status: FineTuneStatus, resource_version: str) -> None:
        """Replace our fields of the status if the resource has not changed. Raises Conflict."""
        ...

    async def event(self, run: Run, kind: str, reason: str, message: str) -> None:
        """Post an Event about the resource. kind: Normal or Warning."""
        ...


class KubeRayMissing(KubeError):  # noqa: N818  a fact about the cluster
    """There is no RayCluster API."""


@dataclass(frozen=True)
class Lease:
    """Who of several replicas leads."""

    holder: str
    """Empty if it was given back."""
    seconds: float
    """For how long after its last change it holds."""
    transitions: int = 0
    acquired: datetime | None = None
    """When its holder took it; None: now."""
    version: str = ""
    """resourceVersion; empty if there is no such object yet."""


class Leases(Protocol):
    """The one Lease of the replicas. Raises: KubeError."""

    async def read(self) -> Lease | None:
        """As it is; None if nobody made it."""
        ...

    async def write(self, lease: Lease) -> Lease:
        """Make it or change it; as it is then. Raises Conflict if it is not any more what `lease` was made from."""
        ...


class RayJobs(Protocol):
    """The API of one run's Ray head. Its replies are a tenant's: bounded in size and time, parsed strictly."""

    async def head(self, address: str, token: str) -> Head | Unknown:
        """Session and version."""
        ...

    async def job(self, address: str, token: str, submission_id: str) -> RayJob | Unknown | None:
        """A submission; None if Ray does not know it."""
        ...

    async def submit(self, address: str, token: str, job: SubmitJob) -> None:
        """Start a driver; a submission of that id that exists is success. Raises RayError."""
        ...

    async def stop(self, address: str, token: str, submission_id: str) -> None:
        """Ask a driver to stop. Raises RayError."""
        ...

    async def progress(self, address: str, token: str) -> Progress | Unknown | None:
        """The trainer's document; None if there is none yet."""
        ...


class RayError(KubeError):
    """The Ray head refused or did not answer."""


class Clock(Protocol):
    """The time. Injected, so that tests need not wait."""

    def now(self) -> datetime:
        """UTC."""
        ...
