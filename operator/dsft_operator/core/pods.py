"""The Ray pods of a run, head and workers: pure builders from the spec and the admin's defaults.

What a tenant may add is an allow-list (`POD_TEMPLATE_FIELDS`); everything else of a pod is ours. System variables come
after the user's, and win.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from dsft_api.problem import Problem, field_name
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.placement import NodePool, ResourceRequirements, Toleration
from dsft_operator.config import OperatorConfig
from dsft_operator.core import naming

Manifest = dict[str, Any]

POD_TEMPLATE_FIELDS = {
    "metadata": ("labels", "annotations"),
    "spec": ("affinity", "topologySpreadConstraints", "schedulerName", "dnsConfig", "hostAliases"),
}
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
# Whoever could set these could switch off the token that guards the head, or speak to the trainer as the operator.
_RESERVED_PREFIXES = ("RAY_AUTH_", "DSFT_", "KUBERAY_")
_RESERVED = {"RAY_ADDRESS", "RAY_PORT", "RAY_IP", "FQ_RAY_IP", "RAY_CLUSTER_NAME"}
DRAIN_COMMAND = ["python", "-m", "dsft_trainer", "drain"]


def head_pod(spec: FineTuneSpec, config: OperatorConfig, labels: Mapping[str, str]) -> Manifest:
    """The pod template of the head: the driver and Ray's bookkeeping, no rank."""
    resources = _resources(spec.head.resources) or dict(_HEAD_RESOURCES)
    container = _container(spec, config, "ray-head", resources, _head_environment(spec)) | {
        "ports": [
            {"name": "gcs-server", "containerPort": 6379},
            {"name": "dashboard", "containerPort": config.ray.dashboard_port},
            {"name": "client", "containerPort": 10001},
            {"name": "metrics", "containerPort": 8080},
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


def worker_pod(spec: FineTuneSpec, pool: NodePool, config: OperatorConfig, labels: Mapping[str, str]) -> Manifest:
    """The pod template of one pool."""
    resources = _with_gpus(pool, config)
    container = _container(spec, config, "ray-worker", resources, _worker_environment(pool))
    if not any(variable["name"] == _HUB_CACHE for variable in container["env"]):
        # Models are large: not into the container's own layer, which is the node's disk.
        container["env"].append({"name": _HUB_CACHE, "value": "/scratch/huggingface"})
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
    return _merged({**pod, "spec": body}, pool.pod_template or {})


def pod_problems(spec: FineTuneSpec) -> Iterator[Problem]:
    """What a user may not say about pods, since the operator, Ray or KubeRay says it."""
    yield from _template_problems(spec)
    for index, pool in enumerate(spec.node_pools):
        if pool.name in _HEAD_GROUPS:
            field = field_name(("spec", "nodePools", index, "name"))
            yield Problem(field, "is the name of the head's group", "give the pool another name", pool.name)
    ours = {variable["name"] for variable in _system_environment(spec)} | _RESERVED
    ours |= {name for extra in (_head_environment(spec), *map(_worker_environment, spec.node_pools)) for name in extra}
    for index, variable in enumerate(spec.env):
        if variable.name in ours or variable.name.startswith(_RESERVED_PREFIXES):
            field = field_name(("spec", "env", index, "name"))
            remedy = "remove it; storage, checkpoint, execution and nodePools set what may be chosen of it"
            yield Problem(field, "is set by the operator", remedy, variable.name)


def _template_problems(spec: FineTuneSpec) -> Iterator[Problem]:
    """A problem for each field of a pod template that is not on the allow-list."""
    for index, pool in enumerate(spec.node_pools):
        for part, value in (pool.pod_template or {}).items():
            path = ("spec", "nodePools", index, "podTemplate", part)
            if part not in POD_TEMPLATE_FIELDS or not isinstance(value, dict):
                yield Problem(field_name(path), "may not be set", f"use {' and '.join(POD_TEMPLATE_FIELDS)} only")
                continue
            for name, given in cast("dict[str, Any]", value).items():
                if name not in POD_TEMPLATE_FIELDS[part]:
                    allowed = ", ".join(POD_TEMPLATE_FIELDS[part])
                    yield Problem(field_name((*path, name)), "may not be set", f"remove it; allowed: {allowed}")
                elif part == "metadata" and not _is_string_map(given):
                    yield Problem(field_name((*path, name)), "is no mapping of strings", 'write name: "value"')


def _is_string_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in cast("dict[str, object]", value).values())


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
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
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
        yield {"name": "AWS_ENDPOINT_URL", "value": storage.endpoint_url}
    if storage.region:
        yield {"name": "AWS_DEFAULT_REGION", "value": storage.region}
    if storage.ca_bundle:
        yield {"name": "AWS_CA_BUNDLE", "value": f"/etc/dsft/ca/{storage.ca_bundle.key}"}
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


def _merged(pod: Manifest, template: Mapping[str, Any]) -> Manifest:
    """The allowed fields of a template under ours: what we set stays."""
    result = dict(pod)
    for part, names in POD_TEMPLATE_FIELDS.items():
        given: Mapping[str, Any] = template.get(part) or {}
        ours: Manifest = pod[part]
        merged = dict(ours)
        for name in names:
            if name in given:
                value = given[name]
                merged[name] = {**value, **ours[name]} if name in ours else value
        result[part] = merged
    return result


def run_labels(name: str, uid: str) -> dict[str, str]:
    """Labels of everything that belongs to a run."""
    return {naming.GROUP_LABEL: naming.MANAGED_BY, naming.RUN_LABEL: name, naming.RUN_UID_LABEL: uid}
