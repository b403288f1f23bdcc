"""What the admin lets the runs of a namespace ask for: the rows of `policies` in the operator's settings.

Whoever may create a DeepSpeedFineTune makes the operator create pods, so the rows say what such a pod may be. Patterns are
a shell's, with `{namespace}` for the namespace of the run; `*` stands for anything, also for a slash. Of a list the last pattern
that matches decides, and one that begins with `!` refuses: `["*", "!system-*"]` is everything but what begins with `system-`.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from dsft_api.base import ApiModel

Pattern = Annotated[str, Field(min_length=1, max_length=512)]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=64)]

_ALL = ("*",)
# Whoever tolerates the taint of a control plane runs beside its keys. The two last are what Kubernetes tolerates for all.
_TAINTS = (
    "*",
    "!node-role.kubernetes.io/*",
    "!node.kubernetes.io/*",
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
)
_TOPOLOGY = (
    "kueue.x-k8s.io/podset-required-topology",
    "kueue.x-k8s.io/podset-preferred-topology",
    "kueue.x-k8s.io/podset-unconstrained-topology",
)


class TenantPolicy(ApiModel):
    """What runs in some namespaces may ask for. What a row leaves out has the default, not what another row says."""

    model_config = ApiModel.model_config | {"extra": "forbid"}

    namespaces: Patterns = Field(default=_ALL, description="Namespaces that this row is for.")
    images: Patterns = Field(
        default=_ALL,
        description="Images of spec.image.trainer, and of sidecars, by their whole names: `registry.example.com/ml/*`, "
        "`docker.io/library/*`.",
    )
    service_accounts: Patterns = Field(
        default=("default",), description="ServiceAccounts. Each has the rights and the cloud identity it was given."
    )
    programs: Patterns = Field(default=_ALL, description="Functions of spec.program: `ours.*:train`.")
    storage: Patterns = Field(default=_ALL, description="URIs of spec.storage.uri: `s3://ml-runs/{namespace}/*`.")
    endpoints: Patterns = Field(
        default=_ALL,
        description="URLs of spec.storage.endpointUrl. A run that names s3:// storage and no endpoint asks for "
        "`https://s3.amazonaws.com`.",
    )
    sources: Patterns = Field(default=_ALL, description="URIs of models, data and program.source: `hf://meta-llama/*`.")
    trust_remote_code: Patterns = Field(
        default=(),
        description="Models whose code spec.model.trustRemoteCode may run, as URI@REVISION: `hf://org/model@0123abc...`, "
        "`hf://org/*`. A branch is what its repository's owner makes it.",
    )
    start_from: Patterns = Field(
        default=_ALL, description="Runs whose checkpoints spec.startFrom may load: pickles, so their code is run."
    )
    dns: bool = Field(default=True, description="Allow podTemplate.spec.dnsConfig and hostAliases.")
    secrets: Patterns = Field(default=_ALL, description="Secrets of the namespace that a run may name.")
    config_maps: Patterns = Field(default=_ALL, description="ConfigMaps of the namespace that a run may name.")
    volume_claims: Patterns = Field(default=_ALL, description="Claims of the namespace that a run may mount.")
    runtime_classes: Patterns = Field(default=("nvidia",), description="Runtime classes.")
    priority_classes: Patterns = Field(
        default=("*", "!system-*"), description="Priority classes, of pods and of queues."
    )
    schedulers: Patterns = Field(default=_ALL, description="Schedulers, as podTemplate.spec.schedulerName.")
    tolerations: Patterns = Field(default=_TAINTS, description="Keys of taints that may be tolerated.")
    pod_labels: Patterns = Field(
        default=(), description="Labels of podTemplate: Services and admission webhooks select pods by them."
    )
    pod_annotations: Patterns = Field(
        default=_TOPOLOGY, description="Annotations of podTemplate: webhooks and runtimes take orders by them."
    )
    gpu_resources: Patterns = Field(
        default=("nvidia.com/*", "amd.com/gpu", "gpu.intel.com/*", "habana.ai/gaudi"),
        description="Resources that spec.nodePools[].gpuResource may name, beside the admin's `gpuResource`.",
    )
    extended_resources: Patterns = Field(
        default=("rdma/*", "vpc.amazonaws.com/efa", "hugepages-*"),
        description="Resources beside cpu, memory and ephemeral-storage. GPUs are asked for by gpusPerNode, and counted.",
    )
    storage_classes: Patterns = Field(default=_ALL, description="Storage classes of scratch disks.")
    queues: Patterns = Field(default=_ALL, description="Queues, as spec.queue.name.")
    queue_schedulers: Patterns = Field(
        default=("kueue",), description="Who may decide, as spec.queue.scheduler: what the cluster really has."
    )
    queue_required: bool = Field(default=False, description="Refuse a run without spec.queue.")
    max_gpus: int | None = Field(default=None, ge=0, description="GPUs of one run at most. Absent: no bound.")
    max_nodes: int | None = Field(default=None, ge=1, description="Nodes of one run at most. Absent: no bound.")
    max_run_seconds: int | None = Field(
        default=None, ge=1, description="Training time of one run at most, also of one that sets no deadline."
    )
    max_keep_cluster_seconds: int | None = Field(
        default=None, ge=0, description="How long a cluster may be kept after its run, at most."
    )
    host_network: bool = Field(
        default=False, description="Allow podTemplate.spec.hostNetwork; no NetworkPolicy guards such pods."
    )
    sidecars: bool = Field(default=False, description="Allow podTemplate.spec.containers beside Ray's own.")
    init_containers: bool = Field(default=False, description="Allow podTemplate.spec.initContainers.")


def allows(patterns: Sequence[str], value: str, namespace: str) -> bool:
    """Whether the last pattern that matches a value lets it pass; one that no pattern matches does not."""
    return _last_word(patterns, (value,), namespace)


def allows_uri(patterns: Sequence[str], uri: str, namespace: str) -> bool:
    """The same for a URI, which is also the folder that it names: s3://BUCKET/PREFIX/* speaks of s3://BUCKET/PREFIX too."""
    return _last_word([_folded(pattern) for pattern in patterns], (_folded(uri), f"{_folded(uri)}/"), namespace)


def _last_word(patterns: Sequence[str], spellings: Sequence[str], namespace: str) -> bool:
    allowed = False
    for pattern in patterns:
        body = pattern.removeprefix("!").replace("{namespace}", namespace)
        if any(fnmatchcase(spelled, body) for spelled in spellings):
            allowed = not pattern.startswith("!")
    return allowed


def _folded(uri: str) -> str:
    """The Hub takes a name in any case."""
    return uri.lower() if uri.removeprefix("!").lower().startswith("hf://") else uri


def whole_name(image: str) -> str:
    """An image with the registry that container runtimes add: `python:3` is `docker.io/library/python:3`."""
    first, slash, rest = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return f"{first.lower().removesuffix(':443')}/{rest}"
    return f"docker.io/{image}" if slash else f"docker.io/library/{image}"


def policy_for(namespace: str, policies: Sequence[TenantPolicy]) -> TenantPolicy | None:
    """The first row for a namespace. Without any rows, the defaults; None where there are rows, and none for it."""
    if not policies:
        return TenantPolicy()
    return next((row for row in policies if allows(row.namespaces, namespace, namespace)), None)
