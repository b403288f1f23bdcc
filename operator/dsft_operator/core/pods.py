"""The Ray pods of a run, head and workers: pure builders from the spec and the admin's defaults.

What a tenant may add is an allow-list (`pod_template`); everything else of a pod is ours. System variables come after the
user's, and win.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from dsft_api.job import CHAT_TEMPLATE_ENV, JOB_ENV
from dsft_api.problem import Path, Problem, field_name
from dsft_api.quantity import quantity
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.placement import EnvVar, NodePool, ResourceRequirements, Toleration
from dsft_operator.config import OperatorConfig
from dsft_operator.core import naming
from dsft_operator.core.interconnect import connected, profile_of
from dsft_operator.core.pod_template import CONFINED, merged, pod_template, template_problems

Manifest = dict[str, Any]

# Autoscalers must not move a rank to save a node, and a mesh's proxy must not sit between ranks.
_ANNOTATIONS = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
    "sidecar.istio.io/inject": "false",
    "linkerd.io/inject": "disabled",
}
_HEAD_RESOURCES: Mapping[str, Mapping[str, int | str]] = {
    "requests": {"cpu": "500m", "memory": "3Gi"},
    "limits": {"memory": "6Gi"},
}
TRAINER_UID = 1000
# KubeRay's own, where the head and each worker export Ray's metrics.
METRICS_PORT = 8080
# The tokenizer, the first rows, and the imports of torch and transformers.
_PREFLIGHT_RESOURCES: Mapping[str, Mapping[str, int | str]] = {
    "requests": {"cpu": "200m", "memory": "512Mi"},
    "limits": {"memory": "2Gi"},
}
PREFLIGHT_CONTAINER = "preflight"
_HUB_CACHE = "HF_HOME"
# Room for the last upload after the commit was asked for, and for Ray to go down.
_GRACE_SECONDS = 30
_SHM_WITHOUT_LIMIT = "2Gi"
# KubeRay's own probe waits 10 s before it asks: here a pod is ready as soon as it is. After that it may be silent as long
# as with KubeRay's, 50 s. The endpoint is that of KubeRay 1.6 and later for Ray 2.53 and later.
_HEALTH_SINCE = (2, 53)
_READINESS: Manifest = {
    "httpGet": {"path": "/api/healthz", "port": 52365},
    "initialDelaySeconds": 1,
    "periodSeconds": 2,
    "timeoutSeconds": 5,
    "failureThreshold": 25,
}
_HEAD_GROUPS = ("head", "headgroup")
# Whoever could set these could switch off the token that guards the head, speak to the trainer as the operator, put code before
# ours, or send the storage's keys to another server.
_RESERVED_PREFIXES = ("RAY_", "DSFT_", "KUBERAY_", "LD_", "AWS_", "PYTHON")
_RESERVED = {"FQ_RAY_IP", "PATH", "HOME", "BASH_ENV", "BROWSER", "OPENSSL_CONF", "GCONV_PATH"}
_NOT_RESERVED = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
    "AWS_RETRY_MODE",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_STS_REGIONAL_ENDPOINTS",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "RAY_memory_monitor_refresh_ms",
    "RAY_memory_usage_threshold",
}
# What a Secret or ConfigMap holds is not known here; a variable of its own beats theirs.
_EMPTIED = ("LD_PRELOAD", "LD_AUDIT", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONWARNINGS", "BASH_ENV")
# Of the image, the kernel and Ray, and our own volumes: a claim over them would put its code in the place of ours.
_OUR_FOLDERS = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/home",
    "/lib",
    "/lib32",
    "/lib64",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/sys",
    "/usr",
    "/var",
    "/scratch",
    "/model-cache",
    "/tmp/ray",  # noqa: S108
)
PREFLIGHT_COMMAND = ["python", "-m", "dsft_trainer", "preflight"]
DRAIN_COMMAND = ["python", "-m", "dsft_trainer", "drain"]


def head_pod(spec: FineTuneSpec, config: OperatorConfig, labels: Mapping[str, str]) -> Manifest:
    """The pod template of the head: the driver and Ray's bookkeeping, no rank."""
    resources = _resources(spec.head.resources) or dict(_HEAD_RESOURCES)
    container = _container(spec, config, "ray-head", resources, _head_environment(spec)) | {
        "ports": [
            # With the protocol, which Kubernetes adds elsewhere: Kueue compares the pods of the Workload with these.
            {"name": name, "containerPort": port, "protocol": "TCP"}
            for name, port in (
                ("gcs-server", 6379),
                ("dashboard", config.ray.dashboard_port),
                ("client", 10001),
                ("metrics", METRICS_PORT),
            )
        ],
    }
    pod = _pod(spec, config, container, labels)
    # The head outlives the workers' drain: they commit through it.
    pod["spec"]["terminationGracePeriodSeconds"] = spec.checkpoint.drain_seconds + 2 * _GRACE_SECONDS
    pod["spec"] |= _placed(spec.head.node_selector, spec.head.tolerations)
    if spec.node_pools and (priority := spec.node_pools[0].priority_class_name):
        # Whoever preempts the head ends the attempt of all workers.
        pod["spec"]["priorityClassName"] = priority
    return pod


def preflight_pod(spec: FineTuneSpec, config: OperatorConfig, labels: Mapping[str, str], job: str) -> Manifest:
    """The pod template of the preflight: image, identity, secrets, volumes and place of the head, and nothing of Ray.

    `job` is what DSFT_JOB holds.
    """
    # Kubernetes takes $(NAME) for a reference to a variable, and $$ for a dollar.
    environment = {JOB_ENV: job.replace("$", "$$"), "DSFT_SCRATCH": "/scratch"}
    container = _container(spec, config, PREFLIGHT_CONTAINER, dict(_PREFLIGHT_RESOURCES), environment)
    for of_ray in ("lifecycle", "readinessProbe"):
        container.pop(of_ray, None)
    container["command"] = PREFLIGHT_COMMAND
    container["volumeMounts"].append({"name": "scratch", "mountPath": "/scratch"})
    _put_hub_cache_on_scratch(container)
    pod = _pod(spec, config, container, labels)
    # What is mounted there is as large as the smallest worker's.
    sizes = [_shm_size(_with_gpus(pool, config)) for pool in spec.node_pools]
    shm: Manifest = {"medium": "Memory", "sizeLimit": min(sizes, key=quantity, default=_SHM_WITHOUT_LIMIT)}
    others = [volume for volume in pod["spec"]["volumes"] if volume["name"] != "shm"]
    volumes: list[Manifest] = [{"name": "shm", "emptyDir": shm}, *others, {"name": "scratch", "emptyDir": {}}]
    pod["spec"] |= {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "volumes": volumes}
    pod["spec"] |= _placed(spec.head.node_selector, spec.head.tolerations)
    return pod


def worker_pod(spec: FineTuneSpec, pool: NodePool, config: OperatorConfig, labels: Mapping[str, str]) -> Manifest:
    """The pod template of one pool."""
    resources = _with_gpus(pool, config)
    container = _container(spec, config, "ray-worker", resources, _worker_environment(pool))
    _put_hub_cache_on_scratch(container)
    pod = _pod(spec, config, container, labels)
    body = pod["spec"] | _placed(pool.node_selector, pool.tolerations)
    if pool.runtime_class_name:
        body["runtimeClassName"] = pool.runtime_class_name
    if pool.priority_class_name:
        body["priorityClassName"] = pool.priority_class_name
    container["volumeMounts"].append({"name": "scratch", "mountPath": "/scratch"})
    body["volumes"] = [*body["volumes"], {"name": "scratch", **_scratch(pool)}]
    if pool.model_cache:
        container["volumeMounts"].append({"name": "model-cache", "mountPath": "/model-cache"})
        claim = {"persistentVolumeClaim": {"claimName": pool.model_cache.claim_name}}
        body["volumes"] = [*body["volumes"], {"name": "model-cache", **claim}]
    return merged(connected({**pod, "spec": body}, profile_of(spec, config)), pool)


def _put_hub_cache_on_scratch(container: Manifest) -> None:
    """Models are large: not into the container's own layer, which is the node's disk. Unless somebody says where."""
    if not any(variable["name"] == _HUB_CACHE for variable in container["env"]):
        container["env"].append({"name": _HUB_CACHE, "value": "/scratch/huggingface"})


def pod_problems(spec: FineTuneSpec) -> Iterator[Problem]:
    """What a user may not say about pods, since the operator, Ray or KubeRay says it."""
    yield from template_problems(spec)
    for index, pool in enumerate(spec.node_pools):
        if pool.name in _HEAD_GROUPS:
            field = field_name(("spec", "nodePools", index, "name"))
            yield Problem(field, "is the name of the head's group", "give the pool another name", pool.name)
        template = pod_template(pool)
        for place, containers in template.containers():
            for number, container in enumerate(containers):
                above = ("spec", "nodePools", index, "podTemplate", "spec", place, number)
                yield from _variable_problems(spec, (*above, "env"), container.env)
    yield from _variable_problems(spec, ("spec", "env"), spec.env)
    if spec.storage.volume is not None:
        yield from _mount_problems(spec.storage.volume.mount_path)


def _variable_problems(spec: FineTuneSpec, above: Path, variables: Sequence[EnvVar]) -> Iterator[Problem]:
    ours = {variable["name"] for variable in _system_environment(spec)} | _RESERVED
    ours |= {name for extra in (_head_environment(spec), *map(_worker_environment, spec.node_pools)) for name in extra}
    for index, variable in enumerate(variables):
        is_reserved = variable.name.startswith(_RESERVED_PREFIXES) and variable.name not in _NOT_RESERVED
        if variable.name in ours or is_reserved:
            remedy = "remove it; storage, checkpoint, execution and nodePools set what may be chosen of it, the image the rest"
            yield Problem(field_name((*above, index, "name")), "is set by the operator", remedy, variable.name)


def _mount_problems(mount_path: str) -> Iterator[Problem]:
    asked = PurePosixPath(posixpath.normpath(f"/{mount_path.lstrip('/')}"))
    if any(asked.is_relative_to(ours) or PurePosixPath(ours).is_relative_to(asked) for ours in _OUR_FOLDERS):
        field, remedy = "spec.storage.volume.mountPath", "mount it at /data, or another folder of its own"
        yield Problem(field, "is, or holds, a folder of the system", remedy, mount_path)


def _pod(spec: FineTuneSpec, config: OperatorConfig, container: Manifest, labels: Mapping[str, str]) -> Manifest:
    volumes: list[Manifest] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _shm_size(container["resources"])}}
    ]
    if spec.storage.volume:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": spec.storage.volume.claim_name}})
    if spec.storage.ca_bundle:
        volumes.append({"name": "ca", "configMap": {"name": spec.storage.ca_bundle.config_map_name}})
    secrets = [*config.image.pull_secrets, *spec.image.pull_secrets]
    body: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": spec.checkpoint.drain_seconds + _GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": TRAINER_UID,
            "runAsGroup": TRAINER_UID,
            "fsGroup": TRAINER_UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": volumes,
        "containers": [container],
    }
    if secrets:
        body["imagePullSecrets"] = [{"name": name} for name in dict.fromkeys(secret.name for secret in secrets)]
    if spec.service_account_name:
        body["serviceAccountName"] = spec.service_account_name
    return {"metadata": {"labels": dict(labels), "annotations": dict(_ANNOTATIONS)}, "spec": body}


def _container(
    spec: FineTuneSpec, config: OperatorConfig, name: str, resources: Manifest, environment: Mapping[str, str]
) -> Manifest:
    mounts: list[Manifest] = [{"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
    if spec.storage.volume:
        mounts.append({"name": "storage", "mountPath": spec.storage.volume.mount_path})
    if spec.storage.ca_bundle:
        mounts.append({"name": "ca", "mountPath": "/etc/dsft/ca", "readOnly": True})
    container: Manifest = {
        "name": name,
        "image": spec.image.trainer or config.image.trainer,
        "resources": resources,
        "env": _environment(spec, environment),
        "envFrom": [source.to_wire() for source in spec.env_from],
        "volumeMounts": mounts,
        "lifecycle": {"preStop": {"exec": {"command": DRAIN_COMMAND}}},
        "securityContext": dict(CONFINED),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if _has_health_endpoint(config.ray.version):
        container["readinessProbe"] = dict(_READINESS)
    policy = spec.image.pull_policy or config.image.pull_policy
    return container | {"imagePullPolicy": policy} if policy else container


def _has_health_endpoint(ray_version: str) -> bool:
    found = re.match(r"v?(\d+)\.(\d+)", ray_version)
    return found is not None and (int(found[1]), int(found[2])) >= _HEALTH_SINCE


def _environment(spec: FineTuneSpec, environment: Mapping[str, str]) -> list[Manifest]:
    system = [*_system_environment(spec), *({"name": name, "value": value} for name, value in environment.items())]
    if spec.env_from:
        system += [{"name": name, "value": ""} for name in _EMPTIED]
    names = {variable["name"] for variable in system}
    return [*(v.to_wire() for v in spec.env if v.name not in names), *system]


def _head_environment(spec: FineTuneSpec) -> dict[str, str]:
    # A job is stopped as a user would stop it, and has the time of a drain: SIGINT is commit and exit.
    wait = str(spec.checkpoint.drain_seconds + _GRACE_SECONDS)
    return {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": wait}


def _worker_environment(pool: NodePool) -> dict[str, str]:
    return {"DSFT_SCRATCH": "/scratch"} | ({_HUB_CACHE: "/model-cache"} if pool.model_cache else {})


def _system_environment(spec: FineTuneSpec) -> Iterator[Manifest]:
    storage = spec.storage
    if storage.credentials:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            reference: Manifest = {"name": storage.credentials.secret_name, "key": key}
            if key == "AWS_SESSION_TOKEN":
                reference["optional"] = True
            yield {"name": key, "valueFrom": {"secretKeyRef": reference}}
    if storage.endpoint_url:
        # Of S3 alone: an identity of the ServiceAccount asks AWS's STS, which is elsewhere.
        yield {"name": "AWS_ENDPOINT_URL_S3", "value": storage.endpoint_url}
    if storage.region:
        yield {"name": "AWS_DEFAULT_REGION", "value": storage.region}
    if storage.ca_bundle:
        yield {"name": "AWS_CA_BUNDLE", "value": f"/etc/dsft/ca/{storage.ca_bundle.key}"}
    template = spec.data.chat_template if spec.data else None
    if template and (key := template.config_map_ref):
        yield {"name": CHAT_TEMPLATE_ENV, "valueFrom": {"configMapKeyRef": {"name": key.name, "key": key.key}}}
    yield {"name": "DSFT_DRAIN_SECONDS", "value": str(spec.checkpoint.drain_seconds)}
    yield {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}
    # The preStop has drained the run. Ray would wait again, 30 s, for a node that nobody uses any more.
    yield {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "0"}
    if spec.execution.device == "cpu":
        yield {"name": "DS_ACCELERATOR", "value": "cpu"}


def _resources(asked: ResourceRequirements) -> Manifest:
    """As written; memory without a limit gets its request as limit, so that one pod's leak is not its neighbours' end."""
    requests, limits = dict(asked.requests), dict(asked.limits)
    if "memory" in requests:
        limits.setdefault("memory", requests["memory"])
    return {name: values for name, values in (("requests", requests), ("limits", limits)) if values}


def _with_gpus(pool: NodePool, config: OperatorConfig) -> Manifest:
    resources = _resources(pool.resources)
    if pool.gpus_per_node:
        limits = {**resources.get("limits", {}), pool.gpu_resource or config.gpu_resource: pool.gpus_per_node}
        resources["limits"] = limits
    return resources


def _shm_size(resources: Manifest) -> int | str:
    """All of the container's memory at most: tmpfs counts against its limit anyway."""
    return resources.get("limits", {}).get("memory") or _SHM_WITHOUT_LIMIT


def _scratch(pool: NodePool) -> Manifest:
    if pool.scratch is None:
        return {"emptyDir": {}}
    if pool.scratch.storage_class_name is None:
        return {"emptyDir": {"sizeLimit": pool.scratch.size}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": pool.scratch.storage_class_name,
        "resources": {"requests": {"storage": pool.scratch.size}},
    }
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _placed(node_selector: Mapping[str, str], tolerations: tuple[Toleration, ...]) -> Manifest:
    placed: Manifest = {}
    if node_selector:
        placed["nodeSelector"] = dict(node_selector)
    if tolerations:
        placed["tolerations"] = [toleration.to_wire() for toleration in tolerations]
    return placed


def run_labels(name: str, uid: str) -> dict[str, str]:
    """Labels of everything that belongs to a run."""
    return {naming.GROUP_LABEL: naming.MANAGED_BY, naming.RUN_LABEL: name, naming.RUN_UID_LABEL: uid}
