"""The progress contract: what a running trainer tells. One JSON document, replaced as a whole.

Written to Ray's log folder of the head (read by the operator through the dashboard, by `dsft run` as a file) and, less
often, to `progress.json` in the run's folder. `seq` grows with every write of one attempt: order needs no clock.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from dsft_api.base import ApiModel
from dsft_api.conditions import FailureClass, Phase
from dsft_api.status import (
    Checkpoints,
    EvaluationStatus,
    Inputs,
    InterconnectStatus,
    Loss,
    Output,
    ProgressStatus,
    Spent,
    Time,
)

PROGRESS_FILE = "dsft-progress.json"


class TrainerPhase(StrEnum):
    """What the trainer is doing."""

    STARTING = "starting"
    LOADING = "loading"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"
    EXPORTING = "exporting"
    SUCCEEDED = "succeeded"
    INTERRUPTED = "interrupted"
    FAILED = "failed"

    @property
    def phase(self) -> Phase:
        """The phase of a run whose trainer does this."""
        return _PHASES[self]


_PHASES = {
    TrainerPhase.STARTING: Phase.STARTING,
    TrainerPhase.LOADING: Phase.STARTING,
    TrainerPhase.TRAINING: Phase.RUNNING,
    TrainerPhase.EVALUATING: Phase.RUNNING,
    TrainerPhase.SAVING: Phase.RUNNING,
    TrainerPhase.EXPORTING: Phase.EXPORTING,
    TrainerPhase.SUCCEEDED: Phase.SUCCEEDED,
    TrainerPhase.INTERRUPTED: Phase.SUSPENDED,
    TrainerPhase.FAILED: Phase.FAILED,
}


class TrainerFailure(ApiModel):
    """Why the trainer gave up."""

    failure_class: FailureClass = Field(
        validation_alias="class", serialization_alias="class", description="Failure class."
    )
    message: str = Field(max_length=4096, description="What happened.")
    remedy: str = Field(max_length=1024, description="What to do.")
    exit_code: int = Field(description="Exit code of the trainer.")
    rank: int | None = Field(default=None, description="Rank that failed first.")
    host: str | None = Field(default=None, max_length=253, description="Host name of that rank: its pod.")
    evidence: str | None = Field(
        default=None, max_length=1024, description="What is kept of it in storage: its last lines, or its stacks."
    )


class Progress(ApiModel):
    """The state of one attempt."""

    seq: int = Field(description="Grows with every write of one attempt.")
    run_uid: str = Field(description="The run.")
    attempt: int = Field(description="The attempt.")
    group: int = Field(default=1, description="Start of the worker group inside the attempt, counted from 1.")
    from_step: int = Field(default=0, description="Step of the checkpoint that this group started from.")
    phase: TrainerPhase = Field(description="What the trainer is doing.")
    resolved: Inputs | None = Field(default=None, description="What the inputs were found to be.")
    progress: ProgressStatus | None = Field(default=None, description="How far the training is.")
    grad_norm: float | None = Field(default=None, description="Gradient norm of the last step, before clipping.")
    skipped_steps: int = Field(default=0, description="Steps that were not applied, since a gradient was not finite.")
    interconnect: InterconnectStatus | None = Field(default=None, description="The network between the ranks.")
    evaluation: EvaluationStatus | None = Field(default=None, description="The last evaluation.")
    checkpoints: Checkpoints | None = Field(default=None, description="Committed checkpoints.")
    output: Output | None = Field(default=None, description="The exported model.")
    checkpoint_request: str | None = Field(
        default=None, max_length=256, description="The last request for a checkpoint that was committed."
    )
    restarts: int = Field(default=0, description="How often the ranks were lost and started again in this attempt.")
    losses: Annotated[tuple[Loss, ...], Field(max_length=5)] = Field(
        default=(), description="The last of these losses, oldest first."
    )
    spent: Spent | None = Field(default=None, description="Where the seconds of the attempt went so far.")
    failure: TrainerFailure | None = Field(default=None, description="Why the trainer gave up.")
    message: str | None = Field(default=None, max_length=1024, description="What is going on.")
    updated_at: Time = Field(description="When this was written.")
