"""How the run is looked after. These fields may change at any time; the trainer reads them at its next start."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dsft_api.base import ApiModel, ObjectName, Rule


class CheckpointPolicy(ApiModel):
    """When a checkpoint is committed, and which ones are kept."""

    every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints. Default: once per epoch. The end is always committed.",
    )
    every_minutes: float | None = Field(default=None, gt=0, description="Minutes between checkpoints.")
    interval: Literal["auto"] | None = Field(
        default=None, description="auto: chosen from the time that a save blocks and how often the run was restarted."
    )
    keep_last: int = Field(default=2, ge=1, le=10, description="Newest checkpoints to keep.")
    keep_best: int = Field(
        default=1,
        ge=0,
        le=10,
        description="Best checkpoints to keep, by evaluation.metric. An evaluation that is the best so far is "
        "committed.",
    )
    max_failures: int = Field(
        default=3, ge=1, description="Failed saves in a row that fail the attempt. Fewer are skipped: training goes on."
    )
    drain_seconds: int = Field(
        default=300, ge=1, le=3600, description="Longest wait for the commit when asked to stop."
    )
    on_world_size_change: Literal["refuse", "convert"] = Field(
        default="convert",
        description="What to do with a checkpoint of another number of ranks. convert: once, by the first rank; random "
        "generators start anew. refuse: the attempt fails, naming both numbers.",
    )

    rules = (
        Rule(
            "[has(self.everySteps), has(self.everyMinutes), has(self.interval)].filter(x, x).size() <= 1",
            "set at most one of everySteps, everyMinutes and interval",
        ),
    )

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if [self.every_steps, self.every_minutes, self.interval].count(None) < 2:
            raise ValueError("set at most one of everySteps, everyMinutes and interval")
        return self


class PushToHub(ApiModel):
    """Upload of the exported model to the Hugging Face Hub; the token comes from env HF_TOKEN."""

    repo_id: str = Field(
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        max_length=128,
        description="ORG/NAME. Made if there is none.",
    )
    private: bool = Field(default=True, description="Make a new repository private.")


class ExportSpec(ApiModel):
    """The final model, in Hugging Face layout."""

    format: Literal["safetensors", "none"] = Field(
        default="safetensors", description="safetensors: weights, tokenizer, config, model card. none: no export."
    )
    merge_lora: bool = Field(
        default=True,
        description="With training.lora: export the model with its adapters merged in. false: the adapter alone, for peft.",
    )
    push_to_hub: PushToHub | None = Field(default=None, description="Also upload it.")


class MlflowSpec(ApiModel):
    """MLflow tracking; credentials come from env MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD."""

    tracking_uri: str = Field(
        pattern=r"^https?://[^/@$\s]+(/[^$\s]*)?$", max_length=512, description="Tracking server: http(s)://HOST."
    )
    experiment: str | None = Field(
        default=None, max_length=256, description="Experiment. Default: the run's namespace."
    )


class WandbSpec(ApiModel):
    """Weights & Biases tracking; the key comes from env WANDB_API_KEY."""

    project: str = Field(max_length=128, description="Project.")
    entity: str | None = Field(default=None, max_length=128, description="Team or user.")


class TrackingSpec(ApiModel):
    """Where metrics go besides status and storage."""

    tensorboard: bool = Field(default=True, description="Write TensorBoard event files into the run's folder.")
    mlflow: MlflowSpec | None = Field(default=None, description="MLflow.")
    wandb: WandbSpec | None = Field(default=None, description="Weights & Biases.")


class PreflightSpec(ApiModel):
    """What is looked at before there is a Ray cluster."""

    enabled: bool = Field(
        default=True,
        description="Have a short pod without GPUs look at storage, model, data and disks first, with the run's own identity. "
        "What it finds refuses the run before nodes are held.",
    )


class QueueSpec(ApiModel):
    """Queueing by a cluster scheduler."""

    name: ObjectName = Field(description="LocalQueue of the namespace (Kueue), or queue of another scheduler.")
    priority_class: ObjectName | None = Field(
        default=None,
        description="WorkloadPriorityClass (Kueue), or PriorityClass (volcano, kai). With yunikorn: that of nodePools.",
    )
    scheduler: Literal["kueue", "volcano", "yunikorn", "kai"] = Field(
        default="kueue", description="Who decides. All but Kueue must be the batch scheduler of KubeRay."
    )


class RetryPolicy(ApiModel):
    """Attempts after a failure."""

    limit: int = Field(default=5, ge=0, le=100, description="Attempts without progress before the run fails.")
    token: str | None = Field(
        default=None, max_length=64, description="A new value lets a Failed run go on from its last commit."
    )


class Deadlines(ApiModel):
    """Bounds on waiting and running, in seconds. Absent: no bound, but for stallSeconds."""

    queue_seconds: int | None = Field(default=None, ge=1, description="Waiting in Kueue's queue, per attempt.")
    provision_seconds: int | None = Field(default=None, ge=1, description="Waiting for nodes and images, per attempt.")
    run_seconds: int | None = Field(default=None, ge=1, description="Training time in all.")
    stall_seconds: int = Field(
        default=1800,
        ge=10,
        description="Longest time without a finished step, save or evaluation batch, but at least that of 20 steps; then exit 7. "
        "A day while the model is fetched, the data becomes tokens, or the export is written.",
    )
