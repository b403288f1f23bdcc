"""How the run fits its hardware and where it runs. May change while the run is Pending, Queued, Suspended or Failed."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dsft_api.base import (
    ApiModel,
    ConfigKey,
    DnsLabel,
    FreeForm,
    Labels,
    ListMap,
    ObjectName,
    Quantity,
    Rule,
    Uri,
)


class InterconnectSpec(ApiModel):
    """What the network between nodes must deliver."""

    profile: DnsLabel = Field(
        default="tcp",
        description="Kind of network, by a row of the operator's settings: variables, devices and volumes of the workers.",
    )
    min_all_gather_gbps: float | None = Field(
        default=None,
        gt=0,
        alias="minAllGatherGBps",
        description="Refuse to train below this all-gather rate, GB/s of bus bandwidth. Default: that of the profile.",
    )


class ExecutionSpec(ApiModel):
    """How the same optimisation is cut to fit the devices; does not change the loss beyond rounding."""

    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description="auto: GPUs where the pools ask for them (locally: where there are any), else CPU."
    )
    micro_batch_size: int = Field(default=1, ge=1, description="Samples per rank in one forward and backward pass.")
    eval_batch_size: int = Field(default=8, ge=1, description="Samples per rank in one evaluation pass.")
    activation_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, about 30 % more time."
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa",
        description="Attention implementation of transformers. flash_attention_2 needs GPUs, bf16 or fp16, and an image with "
        "the package flash-attn.",
    )
    loss_kernel: Literal["standard", "chunked"] = Field(
        default="standard",
        description="Cross entropy over whole logits, or (causal-lm only) chunk by chunk: far less memory for large "
        "vocabularies, and the head is computed twice.",
    )
    interconnect: InterconnectSpec | None = Field(default=None, description="Demands on the network.")


class OffloadSpec(ApiModel):
    """State moved from GPU memory to host memory."""

    optimizer: Literal["none", "cpu"] = Field(default="none", description="Where optimizer state lives.")
    params: Literal["none", "cpu"] = Field(default="none", description="Where parameters live.")


class DeepSpeedSpec(ApiModel):
    """DeepSpeed settings. Keys that the manifest decides elsewhere are refused in config."""

    stage: Literal[3] = Field(
        default=3, description="ZeRO stage. Only 3: parameters, gradients, optimizer state sharded."
    )
    offload: OffloadSpec = Field(default_factory=OffloadSpec, description="Host memory for what does not fit.")
    config: FreeForm = Field(
        default_factory=dict[str, object],
        description="Further DeepSpeed configuration keys, merged in. Batch sizes, precision, optimizer, scheduler, "
        "checkpoint, clipping and ZeRO stage have fields of their own and are refused here.",
    )


class ResourceRequirements(ApiModel):
    """Kubernetes resource requests and limits of the Ray container."""

    requests: Annotated[dict[Annotated[str, Field(max_length=253)], Quantity], Field(max_length=16)] = Field(
        default_factory=dict[str, "int | str"], description="Requested amounts, such as cpu: 8, memory: 64Gi."
    )
    limits: Annotated[dict[Annotated[str, Field(max_length=253)], Quantity], Field(max_length=16)] = Field(
        default_factory=dict[str, "int | str"], description="Limits. Default: the requests."
    )


class Toleration(ApiModel):
    """A Kubernetes toleration."""

    key: str | None = Field(default=None, max_length=316, description="Taint key.")
    operator: Literal["Exists", "Equal"] | None = Field(default=None, description="Default: Equal.")
    value: str | None = Field(default=None, max_length=63, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect. Default: all."
    )
    toleration_seconds: int | None = Field(default=None, description="Seconds a NoExecute taint is tolerated.")


class ScratchSpec(ApiModel):
    """Per-pod disk for staging checkpoints and tokenised data."""

    size: Quantity = Field(description="Size of the volume, such as 200Gi.")
    storage_class_name: ObjectName | None = Field(
        default=None, description="Default: the cluster's. Absent size: emptyDir."
    )


class VolumeClaim(ApiModel):
    """A PersistentVolumeClaim of the namespace."""

    claim_name: ObjectName = Field(description="Name of the claim.")


class NodePool(ApiModel):
    """A group of like nodes. The ranks of the run are the GPUs of all pools (on CPU: one rank per node)."""

    name: DnsLabel = Field(description="Name of the pool, unique in the run.")
    nodes: int = Field(default=1, ge=1, le=1024, description="Number of nodes (Ray worker pods).")
    gpus_per_node: int = Field(default=0, ge=0, le=64, description="GPUs of each node; 0 for CPU.")
    gpu_resource: str | None = Field(
        default=None, max_length=253, description="Resource name of a GPU. Default: the operator's, nvidia.com/gpu."
    )
    resources: ResourceRequirements = Field(
        default_factory=ResourceRequirements, description="CPU and memory of each pod."
    )
    node_selector: Labels = Field(default_factory=dict[str, str], description="Node labels that must match.")
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = Field(
        default=(), description="Taints that are tolerated."
    )
    runtime_class_name: ObjectName | None = Field(default=None, description="RuntimeClass of the pods.")
    priority_class_name: ObjectName | None = Field(default=None, description="PriorityClass of the pods.")
    avoid_failed_nodes: bool = Field(
        default=False, description="Keep the pool away from nodes with a GPU fault or two losses of this run."
    )
    scratch: ScratchSpec | None = Field(default=None, description="Scratch disk. Default: emptyDir.")
    model_cache: VolumeClaim | None = Field(default=None, description="Shared cache of Hub downloads.")
    pod_template: FreeForm | None = Field(default=None, description="Further pod fields, from the admin's allow-list.")


class HeadSpec(ApiModel):
    """The Ray head: driver and bookkeeping, no training."""

    resources: ResourceRequirements = Field(default_factory=ResourceRequirements, description="CPU and memory.")
    node_selector: Labels = Field(default_factory=dict[str, str], description="Node labels that must match.")
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = Field(
        default=(), description="Taints that are tolerated."
    )


class PullSecret(ApiModel):
    """A registry Secret of the namespace."""

    name: ObjectName = Field(description="Name of the Secret.")


class ImageSpec(ApiModel):
    """The trainer image, for head and workers."""

    trainer: str | None = Field(default=None, max_length=512, description="Image. Default: the operator's.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(default=None, description="Pull policy.")
    pull_secrets: Annotated[tuple[PullSecret, ...], Field(max_length=16), ListMap()] = Field(
        default=(), description="Registry Secrets."
    )


class SecretKey(ApiModel):
    """One key of a Secret in the resource's namespace."""

    name: ObjectName = Field(description="Name of the Secret.")
    key: ConfigKey = Field(description="Key in it.")


class EnvConfigMapKey(ApiModel):
    """One key of a ConfigMap in the resource's namespace."""

    name: ObjectName = Field(description="Name of the ConfigMap.")
    key: ConfigKey = Field(description="Key in it.")


class EnvSource(ApiModel):
    """Where a variable's value comes from. Exactly one field."""

    secret_key_ref: SecretKey | None = Field(default=None, description="A key of a Secret.")
    config_map_key_ref: EnvConfigMapKey | None = Field(default=None, description="A key of a ConfigMap.")

    rules = (
        Rule(
            "has(self.secretKeyRef) != has(self.configMapKeyRef)", "set exactly one of secretKeyRef and configMapKeyRef"
        ),
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.secret_key_ref is None) == (self.config_map_key_ref is None):
            raise ValueError("set exactly one of secretKeyRef and configMapKeyRef")
        return self


class EnvVar(ApiModel):
    """An environment variable of the trainer. Secrets by reference only."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128, description="Name.")
    value: str | None = Field(default=None, max_length=4096, description="Plain value; never a secret.")
    value_from: EnvSource | None = Field(default=None, description="Reference to a value.")

    rules = (Rule("has(self.value) != has(self.valueFrom)", "set exactly one of value and valueFrom"),)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.value is None) == (self.value_from is None):
            raise ValueError("set exactly one of value and valueFrom")
        return self


class ObjectRef(ApiModel):
    """An object of the namespace, by name."""

    name: ObjectName = Field(description="Name.")


class EnvFrom(ApiModel):
    """All keys of a Secret or ConfigMap as environment variables."""

    secret_ref: ObjectRef | None = Field(default=None, description="A Secret.")
    config_map_ref: ObjectRef | None = Field(default=None, description="A ConfigMap.")

    rules = (Rule("has(self.secretRef) != has(self.configMapRef)", "set exactly one of secretRef and configMapRef"),)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.secret_ref is None) == (self.config_map_ref is None):
            raise ValueError("set exactly one of secretRef and configMapRef")
        return self


class StorageCredentials(ApiModel):
    """A Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if used, AWS_SESSION_TOKEN."""

    secret_name: ObjectName = Field(
        description="Name of the Secret. Locally the same variables are read from the environment."
    )


class StorageVolume(ApiModel):
    """A volume shared by all pods, for file:// storage."""

    claim_name: ObjectName = Field(description="Name of a ReadWriteMany PersistentVolumeClaim.")
    mount_path: str = Field(pattern=r"^/.+", max_length=512, description="Where it is mounted.")


class CaBundle(ApiModel):
    """Certificates of a private CA for the storage endpoint."""

    config_map_name: ObjectName = Field(description="Name of the ConfigMap.")
    key: ConfigKey = Field(default="ca.crt", description="Key in it.")


class StorageSpec(ApiModel):
    """Where checkpoints, metrics, logs and the exported model go."""

    uri: Uri | None = Field(
        default=None, description="s3://BUCKET/PREFIX or file:///FOLDER. Default: the operator's; locally ./runs."
    )
    endpoint_url: Annotated[str, Field(pattern=r"^https?://[^/@$\s]+(/[^$\s]*)?$", max_length=512)] | None = Field(
        default=None, description="Endpoint of an S3-compatible server. Default: AWS."
    )
    region: str | None = Field(
        default=None, pattern=r"^[a-zA-Z0-9-]+$", max_length=64, description="Region. Default: the environment's."
    )
    credentials: StorageCredentials | None = Field(
        default=None, description="Static keys. Default: the identity of the ServiceAccount or environment."
    )
    volume: StorageVolume | None = Field(default=None, description="The volume behind file:// storage.")
    ca_bundle: CaBundle | None = Field(default=None, description="Private CA of the endpoint.")
