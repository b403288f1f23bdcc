"""What to do next, as data: actions in order, the status to write, and when to look again.

Every action is idempotent or has a precondition (a uid), so a second operator or a repeated step does no harm.
"""

from dataclasses import dataclass
from typing import Any

from dsft_api.status import FineTuneStatus

Manifest = dict[str, Any]


@dataclass(frozen=True)
class AddFinalizer:
    """Keep the resource until its cluster was released."""


@dataclass(frozen=True)
class RemoveFinalizer:
    """Let the resource go."""


@dataclass(frozen=True)
class CreateCluster:
    """Create the RayCluster; one that is there already is left as it is."""

    manifest: Manifest


@dataclass(frozen=True)
class CreateJob:
    """Create the preflight's Job; one that is there already is left as it is."""

    manifest: Manifest


@dataclass(frozen=True)
class DeleteJob:
    """Delete the preflight's Job of this uid; its pod follows."""

    name: str
    uid: str


@dataclass(frozen=True)
class CreateChild:
    """Create an object that the RayCluster owns (NetworkPolicy); one that is there already is left as it is."""

    manifest: Manifest


@dataclass(frozen=True)
class CreateToken:
    """Create the Secret with the Ray token of a cluster. Never read, never replaced."""

    cluster_name: str
    cluster_uid: str


@dataclass(frozen=True)
class DeleteCluster:
    """Delete the RayCluster of this uid; its pods, Secret and NetworkPolicy follow."""

    name: str
    uid: str


@dataclass(frozen=True)
class SubmitJob:
    """Start the driver on the head. A submission of this id that exists already is success."""

    submission_id: str
    entrypoint: str
    environment: dict[str, str]
    metadata: dict[str, str]


@dataclass(frozen=True)
class RequestSave:
    """Have the trainer told that a checkpoint was asked for, by a short submission beside the driver's."""

    submission: SubmitJob


@dataclass(frozen=True)
class StopJob:
    """Ask the driver to commit and stop."""

    submission_id: str


Action = (
    AddFinalizer
    | RemoveFinalizer
    | CreateCluster
    | CreateJob
    | DeleteJob
    | CreateChild
    | CreateToken
    | DeleteCluster
    | SubmitJob
    | RequestSave
    | StopJob
)


@dataclass(frozen=True)
class Decision:
    """The next step of a run. `status` None: leave it. `requeue_after` None: only an event brings us back."""

    actions: tuple[Action, ...] = ()
    status: FineTuneStatus | None = None
    requeue_after: float | None = None
