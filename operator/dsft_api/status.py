"""The status of a run: what a user, a GitOps tool and the operator's next step read.

Times are RFC 3339 in UTC. Numbers are finite: NaN is not JSON. The same schema is written by the operator to the
API server and by `dsft run` to status.yaml.
"""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainSerializer

from dsft_api.base import ApiModel, ListMap
from dsft_api.conditions import ConditionType, FailureClass, Phase


def _rfc3339(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _usual(time: datetime) -> datetime:
    """A time with a zone, of years that every clock and format knows: a tenant's head tells some of them."""
    if time.tzinfo is None or not 1970 <= time.year < 9000:
        raise ValueError("write a time with its zone, such as 2026-01-31T12:00:00Z")
    return time


# Seconds precision, as metav1.Time.
Time = Annotated[datetime, AfterValidator(_usual), PlainSerializer(_rfc3339, return_type=str)]
Seconds = Annotated[float, PlainSerializer(lambda seconds: round(seconds, 1), return_type=float)]
NodeName = Annotated[str, Field(max_length=253)]
MAX_AVOIDED = 10
# keepLast and keepBest are 10 at most, and one is being saved.
MAX_RETAINED = 21
Metrics = Annotated[dict[Annotated[str, Field(max_length=64)], float], Field(max_length=32)]


class Condition(ApiModel):
    """A condition by the Kubernetes API conventions."""

    type: ConditionType = Field(description="Type.")
    status: Literal["True", "False", "Unknown"] = Field(description="Status.")
    reason: str = Field(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=64, description="CamelCase reason.")
    message: str = Field(default="", max_length=4096, description="What is going on, or what to do next.")
    last_transition_time: Time = Field(description="When the status last changed.")
    observed_generation: int | None = Field(default=None, description="Generation that was judged.")


class Inputs(ApiModel):
    """What the first attempt found model and data to be. Every later one uses the same, or refuses."""

    model_revision: str | None = Field(default=None, max_length=128, description="Commit of an hf:// model.")
    data_revision: str | None = Field(default=None, max_length=128, description="Commit of an hf:// training data set.")
    mixture_revisions: Annotated[tuple[Annotated[str, Field(max_length=128)], ...], Field(max_length=32)] = Field(
        default=(),
        description="Commits of the members of data.mixture, in their order; empty for one that is not on the Hub.",
    )
    eval_revision: str | None = Field(
        default=None,
        max_length=128,
        description="Commit of an hf:// evaluation data set, where data.eval names a uri or revision of its own.",
    )
    data_digest: str | None = Field(
        default=None, max_length=128, description="Digest of the training and evaluation data."
    )
    template_revision: str | None = Field(
        default=None, max_length=128, description="Commit of the hf:// model in data.chatTemplate.fromModel."
    )
    template_digest: str | None = Field(
        default=None,
        max_length=128,
        description="Digest of its tokenizer's files with the template, if it is elsewhere.",
    )
    start_uri: str | None = Field(default=None, max_length=1024, description="The checkpoint that startFrom chose.")
    start_digest: str | None = Field(default=None, max_length=128, description="Digest of its COMMIT.json.")


class Resolved(Inputs):
    """What the run's inputs were resolved to, so that every attempt uses the same."""

    image: str | None = Field(default=None, description="Trainer image by digest.")
    contract: int | None = Field(default=None, description="Version of the job contract.")
    storage_prefix: str | None = Field(default=None, description="URI of the run's folder.")


class PreflightStatus(ApiModel):
    """The look at storage, model and data before there is a Ray cluster. What it found is in condition Preflighted."""

    job: str = Field(description="Name of its Job, another one for another spec.")
    start_time: Time = Field(description="Start.")
    end_time: Time | None = Field(default=None, description="When it had its result, or was given up.")


class RayClusterStatus(ApiModel):
    """The Ray cluster of the run."""

    name: str = Field(description="Name of the RayCluster.")
    uid: str | None = Field(default=None, description="Its uid.")
    incarnation: int = Field(default=1, description="How many RayClusters this run has had.")
    session: str | None = Field(default=None, description="Ray's session_name of the head.")


class JobStatus(ApiModel):
    """The Ray job of the current attempt."""

    submission_id: str = Field(description="Submission id.")
    state: str | None = Field(default=None, description="State, as Ray reports it.")


class ProgressStatus(ApiModel):
    """How far the training is."""

    step: int = Field(description="Optimizer steps done.")
    total_steps: int | None = Field(default=None, description="Optimizer steps in all.")
    epoch: float | None = Field(default=None, description="Passes over the training data done.")
    percent: float | None = Field(default=None, description="Share of the steps done, 0 to 100.")
    loss: float | None = Field(
        default=None, description="Training loss of the last step, mean over trained tokens or samples."
    )
    learning_rate: float | None = Field(default=None, description="Learning rate of the last step.")
    step_seconds: float | None = Field(
        default=None, description="Seconds of an optimizer step, mean over the last ones."
    )
    tokens_per_second: float | None = Field(
        default=None, description="Tokens per second over all ranks, padding left out."
    )
    mfu: float | None = Field(default=None, description="Model FLOPs utilisation, 0 to 1.")
    eta: Time | None = Field(default=None, description="Expected end of the training.")
    updated_at: Time | None = Field(default=None, description="When this was measured.")


class InterconnectStatus(ApiModel):
    """The network between the ranks, as it was measured when they last started."""

    all_gather_gbps: float = Field(
        ge=0,
        alias="allGatherGBps",
        description="Bus bandwidth of an all-gather, GB/s: the bytes that a rank receives, by the time of the slowest one.",
    )
    ranks: int = Field(description="Ranks that took part.")


class EvaluationStatus(ApiModel):
    """The last evaluation."""

    step: int = Field(description="Step it was done at.")
    metrics: Metrics = Field(description="Values by name.")
    samples: str | None = Field(
        default=None, description="What the model wrote after some prompts: JSON lines, by evaluation.samples."
    )


class CheckpointRef(ApiModel):
    """One committed checkpoint."""

    uri: str = Field(description="Its folder.")
    step: int = Field(description="Optimizer steps done.")
    epoch: float = Field(default=0.0, description="Passes over the training data done.")
    world_size: int = Field(description="Ranks that wrote it.")
    bytes: int = Field(description="Size in bytes.")
    time: Time = Field(description="When it was committed.")
    # Left out where there are none: the API server makes null, which it then refuses, of an empty object that is applied in
    # place of one with fields.
    metrics: Metrics = Field(
        default_factory=dict[str, float],
        exclude_if=lambda metrics: not metrics,
        description="Evaluation metrics of that step, if any.",
    )
    digest: str | None = Field(
        default=None, description="sha256:... of its COMMIT.json. A program's have none: Ray Train takes no checksums."
    )


class Checkpoints(ApiModel):
    """The checkpoints that exist."""

    latest: CheckpointRef | None = Field(default=None, description="The newest.")
    best: CheckpointRef | None = Field(default=None, description="The best by spec.evaluation.metric.")
    retained: Annotated[tuple[CheckpointRef, ...], Field(max_length=MAX_RETAINED)] = Field(
        default=(), description="All that are kept, oldest first."
    )
    blocked_seconds: float | None = Field(
        default=None, description="How long training stood still for the newest save."
    )
    interval_seconds: float | None = Field(
        default=None,
        description="Seconds between saves, where they are made by time: as written, or as chosen for auto.",
    )
    failures: int | None = Field(default=None, description="Saves in a row that failed up to now.")
    failure: str | None = Field(default=None, max_length=1024, description="Why the last of them did, and what to do.")
    damaged: Annotated[tuple[str, ...], Field(max_length=5)] = Field(
        default=(),
        description="Checkpoints that the last start passed over, since their files do not match their checksums.",
    )

    @property
    def summary(self) -> str:
        """The newest commit, and what keeps the next one from being made: the message of CheckpointAvailable."""
        parts = [f"step {self.latest.step}"] if self.latest else []
        if self.damaged:
            parts.append(f"passed over, since files do not match their checksums: {', '.join(self.damaged)}")
        if self.failures:
            parts.append(f"saves that failed since: {self.failures}; {self.failure}")
        return "; ".join(parts)


class Output(ApiModel):
    """The exported model."""

    uri: str = Field(description="Its folder.")
    format: str = Field(
        description="safetensors: a model for transformers. peft: an adapter, for the model that it was trained on."
    )
    bytes: int = Field(description="Size in bytes.")
    digest: str = Field(description="sha256:... of its manifest.json.")
    hub: str | None = Field(default=None, max_length=256, description="ORG/NAME@COMMIT of the copy on the Hub.")


class Spent(ApiModel):
    """Where the seconds of an attempt went."""

    useful_seconds: Seconds = Field(
        default=0.0, description="In steps, evaluations and export that count, up to now those not committed too."
    )
    uncommitted_seconds: Seconds = Field(
        default=0.0, description="Of the useful ones, since the newest commit: what a loss now would throw away."
    )
    redone_seconds: Seconds = Field(
        default=0.0, description="In steps that were thrown away, with the time until their loss was found."
    )
    blocked_seconds: Seconds = Field(default=0.0, description="Training stood still for saves.")
    restart_seconds: Seconds = Field(
        default=0.0, description="Starting and ending: imports, loading, restoring, up to the first step."
    )

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.useful_seconds + self.redone_seconds + self.blocked_seconds + self.restart_seconds


class Loss(ApiModel):
    """Ranks that were lost and started again inside an attempt."""

    failure_class: FailureClass = Field(
        validation_alias="class", serialization_alias="class", description="How they were lost."
    )
    step: int | None = Field(default=None, description="Last step that was told before.")
    time: Time = Field(description="When it was found.")
    message: str = Field(default="", max_length=512, description="What happened.")


class Attempt(ApiModel):
    """One attempt of the run."""

    number: int = Field(description="Counted from 1.")
    incarnation: int | None = Field(default=None, description="RayCluster it ran on.")
    start_time: Time = Field(description="Start.")
    end_time: Time | None = Field(default=None, description="End.")
    from_step: int = Field(default=0, description="Step of the checkpoint it started from.")
    to_step: int | None = Field(default=None, description="Last step it reached.")
    failure_class: FailureClass | None = Field(
        default=None, validation_alias="class", serialization_alias="class", description="Why it ended, if it failed."
    )
    nodes: tuple[str, ...] = Field(default=(), description="Nodes it ran on.")
    exit_code: int | None = Field(default=None, description="Exit code of the trainer.")
    message: str | None = Field(default=None, max_length=1024, description="What happened, and what to do.")
    failed_nodes: Annotated[tuple[NodeName, ...], Field(max_length=MAX_AVOIDED)] = Field(
        default=(),
        description="Of its nodes, those on which it failed, where that is known and says something about them.",
    )
    evidence: str | None = Field(
        default=None,
        max_length=1024,
        description="What is kept in storage of the rank that failed: its last lines, or its stacks.",
    )
    restarts: int | None = Field(default=None, description="How often its ranks were lost and started again.")
    losses: Annotated[tuple[Loss, ...], Field(max_length=5)] = Field(
        default=(), description="The last of these losses, oldest first."
    )
    gpus: int | None = Field(default=None, description="GPUs of its pools.")
    spent: Spent | None = Field(default=None, description="Where its seconds went.")


class Usage(ApiModel):
    """What the run used, over all attempts."""

    trained_seconds: float | None = Field(
        default=None, description="Seconds of all attempts that ended; what spec.deadlines.runSeconds bounds."
    )
    useful_seconds: float | None = Field(
        default=None,
        description="Seconds in steps, evaluations and export that count: up to the last commit of an attempt that ended, "
        "up to now of one that runs.",
    )
    redone_seconds: float | None = Field(
        default=None, description="Seconds in steps that were thrown away, with the time until their loss was found."
    )
    waiting_seconds: float | None = Field(
        default=None,
        description="Seconds without an attempt, of waits that are over: queue, nodes, images, backoff. "
        "What is suspended or has failed does not wait.",
    )
    waiting_since: Time | None = Field(default=None, description="When the wait began that is not over.")
    blocked_seconds: float | None = Field(default=None, description="Seconds in which training stood still for saves.")
    restart_seconds: float | None = Field(
        default=None, description="Seconds of starting and ending: imports, loading, restoring, up to the first step."
    )
    goodput: float | None = Field(default=None, description="Share of the useful seconds in all of these, 0 to 1.")
    gpu_seconds: float | None = Field(
        default=None, description="GPUs of the pools times the seconds of attempts. Waits are left out."
    )
    wasted_gpu_seconds: float | None = Field(default=None, description="Of these, those that were not useful.")


class Logs(ApiModel):
    """Where the logs are."""

    uri: str = Field(description="Their folder.")


class FineTuneStatus(ApiModel):
    """What has become of it: progress, checkpoints, attempts, and the reason for every wait and failure."""

    observed_generation: int | None = Field(default=None, description="Generation that this status is about.")
    phase: Phase | None = Field(default=None, description="Printed summary.")
    phase_time: Time | None = Field(default=None, description="When the phase last changed.")
    message: str | None = Field(default=None, max_length=4096, description="What is going on, or what to do.")
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16), ListMap("type")] = Field(
        default=(), description="Conditions."
    )
    spec_hash: str | None = Field(default=None, description="sha256:... of the identity part of the spec.")
    resolved: Resolved | None = Field(default=None, description="Pinned inputs.")
    attempt: int | None = Field(default=None, description="Number of the current attempt.")
    preflight: PreflightStatus | None = Field(default=None, description="The look before there is a Ray cluster.")
    ray_cluster: RayClusterStatus | None = Field(default=None, description="The Ray cluster.")
    job: JobStatus | None = Field(default=None, description="The Ray job.")
    progress: ProgressStatus | None = Field(default=None, description="Progress of the training.")
    interconnect: InterconnectStatus | None = Field(default=None, description="The network between the ranks.")
    evaluation: EvaluationStatus | None = Field(default=None, description="The last evaluation.")
    checkpoint_request: str | None = Field(
        default=None, description="Value of annotation dsft.dev/checkpoint-request that was last committed."
    )
    checkpoints: Checkpoints | None = Field(default=None, description="Committed checkpoints.")
    output: Output | None = Field(default=None, description="The exported model.")
    attempts: Annotated[tuple[Attempt, ...], Field(max_length=20), ListMap("number")] = Field(
        default=(), description="The last attempts, oldest first."
    )
    avoided_nodes: Annotated[tuple[NodeName, ...], Field(max_length=MAX_AVOIDED)] = Field(
        default=(),
        description="Nodes that pools with avoidFailedNodes keep away from. A new spec.retry.token clears it.",
    )
    retries: int | None = Field(default=None, description="Failed attempts in a row that committed nothing new.")
    retry_token: str | None = Field(default=None, description="The spec.retry.token that was last acted on.")
    usage: Usage | None = Field(default=None, description="What the run used.")
    start_time: Time | None = Field(default=None, description="Start of the first attempt.")
    completion_time: Time | None = Field(default=None, description="End of the run.")
    logs: Logs | None = Field(default=None, description="Logs.")
