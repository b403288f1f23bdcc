"""The whole spec, in three groups by when a field may change: identity, placement, policy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from dsft_api.base import ApiModel, ListMap, ObjectName, Rule
from dsft_api.spec.identity import (
    DatasetSource,
    DataSpec,
    EvaluationSpec,
    ModelSpec,
    ProgramSpec,
    StartFrom,
    TrainingSpec,
)
from dsft_api.spec.placement import (
    DeepSpeedSpec,
    EnvFrom,
    EnvVar,
    ExecutionSpec,
    HeadSpec,
    ImageSpec,
    NodePool,
    StorageSpec,
)
from dsft_api.spec.policy import (
    CheckpointPolicy,
    Deadlines,
    ExportSpec,
    PreflightSpec,
    QueueSpec,
    RetryPolicy,
    TrackingSpec,
)

# Frozen once a run began; also what specHash covers.
IDENTITY_FIELDS = ("model", "data", "training", "evaluation", "program", "storage", "start_from")
# May change only while the run is Pending, Queued, Suspended or Failed. What is in neither group is policy.
PLACEMENT_FIELDS = (
    "execution",
    "deepspeed",
    "node_pools",
    "head",
    "image",
    "service_account_name",
    "env",
    "env_from",
)


class FineTuneSpec(ApiModel):
    """What to do: what to fine-tune, on what, where, and how it is looked after."""

    model: ModelSpec | None = Field(default=None, description="The pretrained model.")
    data: DataSpec | None = Field(default=None, description="The data of the run.")
    training: TrainingSpec | None = Field(default=None, description="The optimisation.")
    evaluation: EvaluationSpec = Field(
        default_factory=EvaluationSpec, description="When the held-out data is evaluated."
    )
    program: ProgramSpec | None = Field(
        default=None, description="Your own DeepSpeed code, instead of model, data and training."
    )
    storage: StorageSpec = Field(
        default_factory=StorageSpec, description="Where checkpoints, metrics, logs and the exported model go."
    )
    start_from: StartFrom | None = Field(default=None, description="Start from a checkpoint of another run.")

    execution: ExecutionSpec = Field(
        default_factory=ExecutionSpec, description="How the same optimisation is cut to fit the devices."
    )
    deepspeed: DeepSpeedSpec = Field(default_factory=DeepSpeedSpec, description="DeepSpeed settings.")
    node_pools: Annotated[tuple[NodePool, ...], Field(max_length=8), ListMap()] = Field(
        default=(), description="The nodes to train on."
    )
    head: HeadSpec = Field(default_factory=HeadSpec, description="The Ray head.")
    image: ImageSpec = Field(default_factory=ImageSpec, description="The trainer image.")
    service_account_name: ObjectName | None = Field(default=None, description="ServiceAccount of the pods.")
    env: Annotated[tuple[EnvVar, ...], Field(max_length=64), ListMap()] = Field(
        default=(), description="Environment variables of the trainer."
    )
    env_from: Annotated[tuple[EnvFrom, ...], Field(max_length=16)] = Field(
        default=(), description="Secrets and ConfigMaps as environment variables."
    )

    checkpoint: CheckpointPolicy = Field(
        default_factory=CheckpointPolicy, description="When a checkpoint is committed."
    )
    export: ExportSpec = Field(default_factory=ExportSpec, description="The final model.")
    tracking: TrackingSpec = Field(default_factory=TrackingSpec, description="Experiment tracking.")
    suspend: bool = Field(default=False, description="Commit, free the nodes, and wait.")
    preflight: PreflightSpec = Field(
        default_factory=PreflightSpec, description="What is looked at before there is a Ray cluster."
    )
    queue: QueueSpec | None = Field(default=None, description="Queueing by a cluster scheduler.")
    retry: RetryPolicy = Field(default_factory=RetryPolicy, description="Attempts after a failure.")
    deadlines: Deadlines = Field(default_factory=Deadlines, description="Bounds on waiting and running.")
    keep_cluster_seconds: int = Field(default=0, ge=0, description="Hold the Ray cluster after the end, for debugging.")

    rules = (
        Rule(
            "has(self.program) ? !(has(self.model) || has(self.data) || has(self.training))"
            " : (has(self.model) && has(self.data) && has(self.training))",
            "set model, data and training, or program alone",
        ),
    )

    @model_validator(mode="after")
    def _program_or_builtin(self) -> Self:
        builtin = {"model": self.model, "data": self.data, "training": self.training}
        present = [name for name, part in builtin.items() if part is not None]
        missing = [name for name in builtin if name not in present]
        if self.program is not None and present:
            raise ValueError(f"program replaces model, data and training: remove {', '.join(present)}")
        if self.program is None and missing:
            raise ValueError(f"set {', '.join(missing)} (or program, to run your own code)")
        return self

    def identity(self) -> dict[str, Any]:
        """The frozen part on the wire, defaults left out, so that a new default does not change old runs."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True, include=set(IDENTITY_FIELDS))

    @property
    def gpus(self) -> int:
        """GPUs of all pools."""
        return sum(pool.nodes * pool.gpus_per_node for pool in self.node_pools)

    @property
    def trains_on_gpus(self) -> bool:
        """Whether each rank has a GPU of the pools. GPUs that `execution.device: cpu` leaves alone are held all the same."""
        return self.gpus > 0 and self.execution.device != "cpu"

    @property
    def ranks(self) -> int:
        """Ranks the pools ask for: one per GPU, or one per node on CPU; 0 when there are no pools."""
        return self.gpus if self.trains_on_gpus else sum(pool.nodes for pool in self.node_pools)

    def train_sources(self) -> Iterator[DatasetSource]:
        """All training data sets, in manifest order."""
        if self.data is not None:
            yield from (source for _, source in self.data.sources())

    def workload(self) -> "Workload":
        """Model, data and training of a run that brings no program of its own.

        Raises:
            ValueError: if the run is a program, which has none.
        """
        if self.model is None or self.data is None or self.training is None:
            raise ValueError("spec.program has no built-in workload")
        return Workload(self.model, self.data, self.training)


@dataclass(frozen=True)
class Workload:
    """The parts of a spec that the built-in trainer works from, all present."""

    model: ModelSpec
    data: DataSpec
    training: TrainingSpec
