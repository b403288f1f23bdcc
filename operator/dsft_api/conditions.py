"""One vocabulary of conditions, reasons, phases and failure classes, with the remedy each one calls for.

Status, logs, exit codes and the troubleshooting guide all speak these words (design: laws 8 and 10).
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class ConditionType(StrEnum):
    """Condition types in status, by the Kubernetes API conventions and kstatus."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    SUCCEEDED = "Succeeded"
    ACCEPTED = "Accepted"
    PREFLIGHTED = "Preflighted"
    CLUSTER_READY = "ClusterReady"
    JOB_SUBMITTED = "JobSubmitted"
    CHECKPOINT_AVAILABLE = "CheckpointAvailable"


class Phase(StrEnum):
    """The printed summary of the conditions. Only the CRD's rules on placement decide by it, and the health checks for
    GitOps tools, which tell a run that waits for others (Queued, Suspended) from one that is on its way.
    """

    PENDING = "Pending"
    QUEUED = "Queued"
    PROVISIONING = "Provisioning"
    STARTING = "Starting"
    RUNNING = "Running"
    EXPORTING = "Exporting"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Reason(StrEnum):
    """Reasons that are no failure class."""

    INVALID = "Invalid"
    NOT_SUPPORTED = "NotSupported"
    NOT_ALLOWED = "NotAllowed"
    ACCEPTED = "Accepted"
    STARTING = "Starting"
    TRAINING = "Training"
    EXPORTING = "Exporting"
    SUCCEEDED = "Succeeded"
    INTERRUPTED = "Interrupted"
    COMMITTED = "Committed"
    NO_CHECKPOINT = "NoCheckpoint"
    CHECKPOINT_DAMAGED = "CheckpointDamaged"
    SUBMITTED = "Submitted"
    PREFLIGHT = "Preflight"
    PREFLIGHT_PASSED = "PreflightPassed"
    PREFLIGHT_INCOMPLETE = "PreflightIncomplete"
    PROVISIONING = "Provisioning"
    QUEUED = "Queued"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    NAME_CONFLICT = "NameConflict"
    KUBERAY_MISSING = "KubeRayMissing"
    CLUSTER_REFUSED = "ClusterRefused"
    POD_CONFIG_INVALID = "PodConfigInvalid"
    POD_FAILED = "PodFailed"
    VOLUME_UNAVAILABLE = "VolumeUnavailable"
    NEVER_FITS = "NeverFits"
    QUEUE_CLOSED = "QueueClosed"
    KUEUE_MISSING = "KueueMissing"
    WAITING_FOR_RAY = "WaitingForRay"
    RAY_UNREACHABLE = "RayUnreachable"


class ExitCode(IntEnum):
    """Exit codes of the trainer (and of the `dsft` command)."""

    OK = 0
    OTHER = 1
    BAD_INPUT = 2
    ACCESS = 3
    OUT_OF_MEMORY = 4
    DIVERGED = 5
    INTERRUPTED = 6
    HANG = 7
    GPU_FAULT = 8


@dataclass(frozen=True)
class Failure:
    """What a failure class means: its exit code, whether a retry can help by itself, and what to do."""

    exit_code: ExitCode
    retried: bool
    remedy: str


class FailureClass(StrEnum):
    """Why an attempt ended."""

    CONFIG_INVALID = "ConfigInvalid"
    DATA_INVALID = "DataInvalid"
    STORAGE_DENIED = "StorageDenied"
    MODEL_DENIED = "ModelDenied"
    CUDA_OOM = "CudaOOM"
    HOST_OOM = "HostOOM"
    DIVERGED = "Diverged"
    HANG = "Hang"
    HEAD_LOST = "HeadLost"
    WORKER_LOST = "WorkerLost"
    GPU_FAULT = "GpuFault"
    SLOW_INTERCONNECT = "SlowInterconnect"
    PREEMPTED = "Preempted"
    IMAGE_PULL = "ImagePull"
    UNSCHEDULABLE = "Unschedulable"
    QUEUE_TIMEOUT = "QueueTimeout"
    PROVISION_TIMEOUT = "ProvisionTimeout"
    RUN_TIMEOUT = "RunTimeout"
    USER_CODE = "UserCode"
    UNKNOWN = "Unknown"

    @property
    def failure(self) -> Failure:
        """Exit code, retry and remedy of this class."""
        return FAILURES[self]


_E = ExitCode
FAILURES: dict[FailureClass, Failure] = {
    FailureClass.CONFIG_INVALID: Failure(_E.BAD_INPUT, False, "correct the manifest and apply it again"),
    FailureClass.DATA_INVALID: Failure(_E.BAD_INPUT, False, "correct the data set or the columns in spec.data"),
    FailureClass.STORAGE_DENIED: Failure(_E.ACCESS, False, "check spec.storage: bucket, endpoint and credentials"),
    FailureClass.MODEL_DENIED: Failure(_E.ACCESS, False, "check spec.model.uri and that HF_TOKEN may read it"),
    FailureClass.CUDA_OOM: Failure(
        _E.OUT_OF_MEMORY, False, "lower spec.execution.microBatchSize, or set spec.execution.activationCheckpointing"
    ),
    FailureClass.HOST_OOM: Failure(_E.OUT_OF_MEMORY, True, "give the pods more memory in spec.nodePools[].resources"),
    FailureClass.DIVERGED: Failure(
        _E.DIVERGED, False, "lower spec.training.optimizer.learningRate, add warmupSteps, or look at the data"
    ),
    FailureClass.HANG: Failure(
        _E.HANG, True, "look at the stacks that the message names; raise spec.deadlines.stallSeconds for slow steps"
    ),
    FailureClass.HEAD_LOST: Failure(_E.OTHER, True, "nothing: the run goes on from its last checkpoint"),
    FailureClass.WORKER_LOST: Failure(_E.OTHER, True, "nothing: the run goes on from its last checkpoint"),
    FailureClass.GPU_FAULT: Failure(_E.GPU_FAULT, True, "have the node's GPU looked at"),
    FailureClass.SLOW_INTERCONNECT: Failure(
        _E.OTHER,
        False,
        "check spec.execution.interconnect.profile and the network of the nodes, or lower minAllGatherGBps",
    ),
    FailureClass.PREEMPTED: Failure(_E.INTERRUPTED, True, "nothing: the run goes on from its last checkpoint"),
    FailureClass.IMAGE_PULL: Failure(_E.OTHER, True, "check spec.image.trainer and pullSecrets"),
    FailureClass.UNSCHEDULABLE: Failure(_E.OTHER, True, "check spec.nodePools against the nodes of the cluster"),
    FailureClass.QUEUE_TIMEOUT: Failure(
        _E.OTHER, False, "raise spec.deadlines.queueSeconds, then set a new spec.retry.token"
    ),
    FailureClass.PROVISION_TIMEOUT: Failure(
        _E.OTHER, False, "raise spec.deadlines.provisionSeconds, then set a new spec.retry.token"
    ),
    FailureClass.RUN_TIMEOUT: Failure(
        _E.OTHER, False, "raise spec.deadlines.runSeconds, then set a new spec.retry.token"
    ),
    FailureClass.USER_CODE: Failure(_E.OTHER, False, "correct the program named in spec.program"),
    FailureClass.UNKNOWN: Failure(_E.OTHER, True, "read the log"),
}


# Why a run waits, as reason of condition ClusterReady, and what to do. None: nothing, it passes.
WAITS: dict[str, str | None] = {
    Reason.PREFLIGHT: None,
    Reason.PROVISIONING: None,
    Reason.WAITING_FOR_RAY: None,
    FailureClass.IMAGE_PULL: FAILURES[FailureClass.IMAGE_PULL].remedy,
    FailureClass.UNSCHEDULABLE: FAILURES[FailureClass.UNSCHEDULABLE].remedy,
    Reason.POD_CONFIG_INVALID: "make the Secret or ConfigMap that is named, or correct its name in the spec",
    Reason.VOLUME_UNAVAILABLE: "make the claim, ConfigMap or volume that is named, or correct its name in the spec",
    Reason.POD_FAILED: "read what the pod said; check spec.image and the resources of spec.head and spec.nodePools",
    Reason.CLUSTER_REFUSED: "correct what is named: a quota, an admission policy, a right, or a field of the spec",
    Reason.QUEUED: None,
    Reason.NEVER_FITS: "ask in spec.nodePools for no more than a flavor of the queue has, or have its quota raised",
    Reason.QUEUE_CLOSED: "correct spec.queue.name, or have the queue opened",
    Reason.KUEUE_MISSING: "install Kueue with its integration ray.io/raycluster, or remove spec.queue",
    Reason.KUBERAY_MISSING: "install KubeRay",
    Reason.NAME_CONFLICT: "remove the RayCluster of that name, or give this resource another name",
}
