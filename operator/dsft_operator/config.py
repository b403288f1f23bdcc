"""The admin's settings: one YAML file of kind OperatorConfig. What a resource leaves out comes from here.

Unknown keys are refused: a misspelt setting of an admin must not be a default in silence.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, Self, cast

import yaml
from pydantic import Field, model_validator

from dsft_api.base import ApiModel, DnsLabel, FreeForm, ListMap, ObjectName, Quantity, Uri
from dsft_api.spec.placement import ImageSpec, StorageSpec
from dsft_operator.tenant_policy import TenantPolicy

CONFIG_ENV = "DSFT_CONFIG"
DEFAULT_FILE = Path("/etc/dsft/config.yaml")


class StorageDefaults(StorageSpec):
    """Storage of runs that name none."""

    uri: Uri | None = Field(
        default=None, description="Default of spec.storage.uri; a run must name one if this is absent."
    )


class RayDefaults(ApiModel):
    """Facts about the trainer image's Ray that KubeRay and the operator need."""

    version: str = Field(default="2.60.0", description="Ray version of the trainer image; sent as rayVersion.")
    dashboard_port: int = Field(default=8265, description="Port of the head's dashboard and Jobs API.")
    request_timeout_seconds: float = Field(default=10.0, gt=0, description="Bound on one request to a Ray head.")


class Intervals(ApiModel):
    """How often the operator looks, in seconds. Events bring it there sooner."""

    resync_seconds: float = Field(default=300, gt=0, description="All resources are listed and looked at again.")
    provisioning_seconds: float = Field(default=5, gt=0, description="While pods come up.")
    queued_seconds: float = Field(default=30, gt=0, description="While a queue decides.")
    running_seconds: float = Field(default=10, gt=0, description="While the trainer runs: age of progress in status.")
    backoff_seconds: float = Field(default=10, gt=0, description="Wait before the second attempt; doubles up to 5 min.")


class ClientLimits(ApiModel):
    """How hard the operator may press the API server."""

    qps: float = Field(default=50, ge=0, description="Requests per second on the long run; 0: no limit.")
    burst: int = Field(default=100, ge=1, description="Requests at once after a calm.")


class LeaderElection(ApiModel):
    """Which of several replicas acts; the others stand by. After client-go, whose defaults these are."""

    enabled: bool = Field(default=True, description="Off: every process acts, so there must be one only.")
    lease_name: ObjectName = Field(
        default="dsft-operator", description="Lease in the operator's namespace, shared by the replicas."
    )
    lease_seconds: int = Field(default=15, ge=1, description="A standby takes over a Lease not renewed for that long.")
    renew_seconds: float = Field(default=10, gt=0, description="A leader that cannot renew for that long stops acting.")
    retry_seconds: float = Field(default=2, gt=0, description="Between two renewals, and two looks of a standby.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.retry_seconds < self.renew_seconds < self.lease_seconds:
            raise ValueError(
                f"retrySeconds {self.retry_seconds:g} < renewSeconds {self.renew_seconds:g} < leaseSeconds "
                f"{self.lease_seconds} does not hold: else two replicas may act at once, or none for long"
            )
        return self


class Interconnect(ApiModel):
    """A kind of network between workers, and what their pods need for it. All of it is the admin's word: no policy judges it."""

    model_config = ApiModel.model_config | {"extra": "forbid"}

    name: DnsLabel = Field(description="What spec.execution.interconnect.profile names.")
    env: Annotated[dict[str, str], Field(max_length=64)] = Field(
        default_factory=dict[str, str], description="Variables of the trainer, unless the run sets them: NCCL_*, FI_*."
    )
    resources: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(
        default_factory=dict[str, "int | str"], description="Devices of each pod, such as `vpc.amazonaws.com/efa: 32`."
    )
    annotations: Annotated[dict[str, str], Field(max_length=16)] = Field(
        default_factory=dict[str, str], description="Annotations of each pod, such as those of Multus."
    )
    volumes: Annotated[tuple[FreeForm, ...], Field(max_length=16)] = Field(
        default=(), description="Volumes, as in a pod."
    )
    volume_mounts: Annotated[tuple[FreeForm, ...], Field(max_length=16)] = Field(
        default=(), description="Mounts of the trainer, as in a container."
    )
    sidecars: Annotated[tuple[FreeForm, ...], Field(max_length=4)] = Field(
        default=(), description="Containers beside the trainer, as in a pod: a daemon of the network."
    )
    min_all_gather_gbps: float | None = Field(
        default=None,
        gt=0,
        alias="minAllGatherGBps",
        description="Least rate, unless the run names one: below it, it ends as SlowInterconnect.",
    )


class OperatorConfig(ApiModel):
    """Settings of one operator."""

    model_config = ApiModel.model_config | {"extra": "forbid"}

    api_version: Literal["config.dsft.dev/v1alpha1"] = Field(default="config.dsft.dev/v1alpha1", description="Version.")
    kind: Literal["OperatorConfig"] = Field(default="OperatorConfig", description="Kind.")
    namespace: DnsLabel = Field(default="dsft-system", description="The operator's own namespace. Env: POD_NAMESPACE.")
    watch_namespaces: Annotated[tuple[DnsLabel, ...], Field(max_length=64)] = Field(
        default=(), description="Namespaces to serve. Empty: all."
    )
    image: ImageSpec = Field(default_factory=ImageSpec, description="Default trainer image, pull policy and secrets.")
    monitoring_namespaces: Annotated[tuple[DnsLabel, ...], Field(max_length=16)] = Field(
        default=(), description="Namespaces whose pods may read Ray's metrics, port 8080: that of Prometheus."
    )
    gpu_resource: str = Field(default="nvidia.com/gpu", max_length=253, description="Resource name of a GPU.")
    storage: StorageDefaults = Field(default_factory=StorageDefaults, description="Default storage.")
    policies: Annotated[tuple[TenantPolicy, ...], Field(max_length=256)] = Field(
        default=(), description="What runs may ask for: the first row whose namespaces match."
    )
    interconnects: Annotated[tuple[Interconnect, ...], Field(max_length=16), ListMap()] = Field(
        default=(), description="Networks between workers, by the names that runs use. Without a row there is `tcp`."
    )
    root_key_secret: ObjectName = Field(
        default="dsft-root-key", description="Secret in the operator's namespace that Ray tokens are derived from."
    )
    ray: RayDefaults = Field(default_factory=RayDefaults, description="The trainer image's Ray.")
    intervals: Intervals = Field(default_factory=Intervals, description="How often the operator looks.")
    client: ClientLimits = Field(default_factory=ClientLimits, description="Requests to the API server.")
    leader_election: LeaderElection = Field(default_factory=LeaderElection, description="Which replica acts.")
    workers: int = Field(default=8, ge=1, le=64, description="Resources that are worked on at the same time.")
    http_port: int = Field(default=8080, ge=0, le=65535, description="Port of /healthz, /readyz and /metrics; 0: any.")


class ConfigError(Exception):
    """The configuration file cannot be used."""


def load_config(path: Path | None = None) -> OperatorConfig:
    """Read the file of DSFT_CONFIG (or /etc/dsft/config.yaml, if it is there); POD_NAMESPACE names our namespace.

    Raises:
        ConfigError: if it is no OperatorConfig, naming each wrong key.
    """
    named = path or (Path(os.environ[CONFIG_ENV]) if CONFIG_ENV in os.environ else None)
    file = named or DEFAULT_FILE
    document: object = {}
    if named is not None or file.exists():
        try:
            document = yaml.safe_load(file.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{file}: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{file}: is no mapping; start with kind: OperatorConfig")
    if namespace := os.environ.get("POD_NAMESPACE"):
        document = {"namespace": namespace, **cast("dict[str, object]", document)}
    try:
        return OperatorConfig.model_validate(document)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
