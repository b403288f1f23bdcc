"""What KubeRay makes of a RayCluster: head pod, worker pods, head Service, token Secret. Pure.

Follows `BuildPod` and `BuildServiceForHeadPod` of KubeRay 1.7 for a cluster of single-host groups without autoscaler,
GCS fault tolerance, mTLS and history server, which no RayCluster of ours asks for.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

from tests.cluster.kuberay.start_command import AGENT_PORT, GCS_PORT, METRICS_PORT, start_command, start_params

KUBERAY_VERSION = "v1.7.0"
CLUSTER = "ray.io/cluster"
NODE_TYPE = "ray.io/node-type"
GROUP = "ray.io/group"
REPLICA_INDEX = "ray.io/worker-group-replica-index"
HEAD_GROUP = "headgroup"
CREATED_BY = ("app.kubernetes.io/created-by", "kuberay-operator")

_SHELL = ["/bin/bash", "-c", "--"]
_PROTECTED_LABELS = (NODE_TYPE, GROUP, CLUSTER)
_SERVICE_PORTS = {"client": 10001, "dashboard": 8265, "gcs-server": GCS_PORT, "metrics": METRICS_PORT, "serve": 8000}
_WAIT_RESOURCES = {"cpu": "200m", "memory": "256Mi"}

Object = dict[str, Any]


def head_service_name(cluster: Mapping[str, Any]) -> str:
    own = (cluster["spec"]["headGroupSpec"].get("headService") or {}).get("metadata", {}).get("name")
    return own or f"{cluster['metadata']['name']}-head-svc"


def head_fqdn(cluster: Mapping[str, Any]) -> str:
    return f"{head_service_name(cluster)}.{cluster['metadata']['namespace']}.svc.cluster.local"


def auth_secret_name(cluster: Mapping[str, Any]) -> str | None:
    """The Secret that KubeRay itself makes for token authentication, or None when it makes none.

    KubeRay's own trap: with `authOptions: {}` it makes the Secret although the pods then do not use it.
    """
    options = cluster["spec"].get("authOptions")
    if options is None or options.get("mode") == "disabled":
        return None
    if options.get("enableK8sTokenAuth") or options.get("secretName"):
        return None
    return _checked_name(cluster["metadata"]["name"])


def auth_secret(cluster: Mapping[str, Any], token: str) -> Object:
    """The token Secret of a cluster that names none (`auth_secret_name`)."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": auth_secret_name(cluster),
            "namespace": cluster["metadata"]["namespace"],
            "labels": {CLUSTER: cluster["metadata"]["name"]},
            "ownerReferences": [_owner(cluster)],
        },
        "stringData": {"auth_token": token},
    }


def head_service(cluster: Mapping[str, Any]) -> Object:
    """Headless, so that the name leads to the head pod even before it is ready."""
    meta, head = cluster["metadata"], cluster["spec"]["headGroupSpec"]
    labels = {key: value for key, value in _labels(cluster, "head", HEAD_GROUP).items() if key != GROUP}
    del labels["ray.io/is-ray-node"]
    declared = {
        port.get("name") or f"{port['containerPort']}-port": port["containerPort"]
        for port in head["template"]["spec"]["containers"][0].get("ports") or []
    }
    ports = {"metrics": METRICS_PORT, **declared} if declared else _SERVICE_PORTS
    kind = head.get("serviceType") or "ClusterIP"
    spec: Object = {
        "type": kind,
        "selector": labels,
        "ports": [{"name": name, "port": ports[name], "appProtocol": "tcp"} for name in sorted(ports)],
    }
    if kind == "ClusterIP":
        spec |= {"clusterIP": "None", "publishNotReadyAddresses": True}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": head_service_name(cluster),
            "namespace": meta["namespace"],
            "labels": labels,
            "annotations": dict(cluster["spec"].get("headServiceAnnotations") or {}),
            "ownerReferences": [_owner(cluster)],
        },
        "spec": spec,
    }


def head_pod(cluster: Mapping[str, Any]) -> Object:
    group = copy.deepcopy(cluster["spec"]["headGroupSpec"])
    pod = _from_template(cluster, group, "head", HEAD_GROUP, cluster["metadata"]["name"])
    pod["metadata"]["annotations"] |= {"ray.io/ft-enabled": "false", "ray.io/kuberay-version": KUBERAY_VERSION}
    _finish(cluster, group, pod, head=True)
    return pod


def worker_pod(cluster: Mapping[str, Any], group: Mapping[str, Any], replica_index: int) -> Object:
    group = copy.deepcopy(dict(group))
    name = group["groupName"]
    pod = _from_template(cluster, group, "worker", name, f"{cluster['metadata']['name']}-{name}")
    pod["metadata"]["labels"][REPLICA_INDEX] = str(replica_index)
    pod["spec"].setdefault("initContainers", []).append(_wait_gcs_ready(cluster, pod["spec"]["containers"][0]))
    _finish(cluster, group, pod, head=False)
    return pod


def _from_template(cluster: Mapping[str, Any], group: Object, node_type: str, group_name: str, prefix: str) -> Object:
    template = group["template"]
    meta = template.get("metadata") or {}
    own = {**(meta.get("labels") or {}), **(group.get("labels") or {})}
    labels = _labels(cluster, node_type, group_name)
    labels |= {key: value for key, value in own.items() if key not in _PROTECTED_LABELS}
    annotations = dict(meta.get("annotations") or {})
    if _keeps_command(cluster):
        annotations["ray.io/overwrite-container-cmd"] = "true"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"{prefix[:50]}-{node_type}-".lower(),
            "namespace": cluster["metadata"]["namespace"],
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [_owner(cluster)],
        },
        "spec": template["spec"],
    }


def _finish(cluster: Mapping[str, Any], group: Object, pod: Object, head: bool) -> None:
    """What head and workers have in common: metrics port, token, /dev/shm, start command, environment, probes."""
    container, fqdn = pod["spec"]["containers"][0], head_fqdn(cluster)
    address = f"{fqdn}:{_gcs_port(cluster)}"
    ports = container.setdefault("ports", [])
    if not any(port.get("name") == "metrics" for port in ports):
        ports.append({"name": "metrics", "containerPort": METRICS_PORT})
    waiting = [c for c in pod["spec"].get("initContainers") or [] if c["name"] == "wait-gcs-ready"]
    if (cluster["spec"].get("authOptions") or {}).get("mode") == "token":
        for target in (container, *waiting):
            _add_token(cluster, target)

    params = start_params(group, container.get("resources") or {}, None if head else address)
    if "plasma-directory" not in params:
        _add_shared_memory(pod["spec"], container)
    command = start_command(params, head)
    _set_command(cluster, container, command)
    for target in pod["spec"].get("initContainers") or []:
        target.setdefault("env", []).extend(_head_address(cluster))
    _set_environment(cluster, container, command, head)
    for kind, delay, failures in (("livenessProbe", 30, 120), ("readinessProbe", 10, 10)):
        container.setdefault(kind, _probe(cluster, params, head, delay, failures))


def _wait_gcs_ready(cluster: Mapping[str, Any], container: Mapping[str, Any]) -> Object:
    """Same image, environment and mounts as the Ray container, as they are before KubeRay adds its own."""
    address = f"{head_fqdn(cluster)}:{_gcs_port(cluster)}"
    copied = ("image", "imagePullPolicy", "securityContext", "env", "volumeMounts")
    return {
        "name": "wait-gcs-ready",
        "command": _SHELL,
        "args": [
            "SECONDS=0\n"
            f"until ray health-check --address {address} > /dev/null 2>&1; do\n"
            '  echo "$SECONDS seconds elapsed: Waiting for GCS to be ready."\n'
            "  sleep 5\n"
            "done\n"
            'echo "GCS is ready."\n'
        ],
        "resources": {"limits": dict(_WAIT_RESOURCES), "requests": dict(_WAIT_RESOURCES)},
        **{key: copy.deepcopy(container[key]) for key in copied if key in container},
    }


def _add_token(cluster: Mapping[str, Any], container: Object) -> None:
    options = cluster["spec"]["authOptions"]
    secret = options.get("secretName") or _checked_name(cluster["metadata"]["name"])
    reference = {"secretKeyRef": {"name": secret, "key": "auth_token"}}
    _add_env(container, {"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": reference})


def _add_shared_memory(spec: Object, container: Object) -> None:
    mounts = container.setdefault("volumeMounts", [])
    if any(mount["mountPath"] == "/dev/shm" for mount in mounts):
        return
    resources = container.get("resources") or {}
    size = (resources.get("limits") or {}).get("memory") or (resources.get("requests") or {}).get("memory")
    volumes = spec.setdefault("volumes", [])
    if not any(volume["name"] == "shared-mem" for volume in volumes):
        empty_dir = {"medium": "Memory", **({"sizeLimit": size} if size else {})}
        volumes.append({"name": "shared-mem", "emptyDir": empty_dir})
    mounts.append({"name": "shared-mem", "mountPath": "/dev/shm"})


def _set_command(cluster: Mapping[str, Any], container: Object, start: str) -> None:
    own = "".join(f" {word} " for word in [*(container.get("command") or []), *(container.get("args") or [])])
    if _keeps_command(cluster) or "ray start" in own:
        return
    generated = f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"
    container["command"] = _SHELL
    container["args"] = [f"{own} && {generated}" if own else generated]


def _set_environment(cluster: Mapping[str, Any], container: Object, command: str, head: bool) -> None:
    env = container.setdefault("env", [])
    host = "127.0.0.1" if head else head_fqdn(cluster)
    if not head:
        env.extend(_head_address(cluster))
    env.extend(
        [
            _from_field("RAY_CLUSTER_NAME", f"metadata.labels['{CLUSTER}']"),
            _from_field("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
            _from_field("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
            _from_field("RAY_NODE_TYPE_NAME", f"metadata.labels['{GROUP}']"),
            {"name": "KUBERAY_GEN_RAY_START_CMD", "value": command},
        ]
    )
    port = _gcs_port(cluster)
    _add_env(
        container,
        {"name": "RAY_PORT", "value": port},
        {"name": "RAY_ADDRESS", "value": f"{host}:{port}"},
        {"name": "RAY_USAGE_STATS_KUBERAY_IN_USE", "value": "1"},
    )
    if head:
        tags = f"kuberay_version={KUBERAY_VERSION};kuberay_crd=RayCluster"
        env.append({"name": "RAY_USAGE_STATS_EXTRA_TAGS", "value": tags})
    _add_env(container, {"name": "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "value": "1"})


def _probe(cluster: Mapping[str, Any], params: Mapping[str, str], head: bool, delay: int, failures: int) -> Object:
    port = int(params.get("dashboard-agent-listen-port", AGENT_PORT))
    common = {
        "initialDelaySeconds": delay,
        "timeoutSeconds": 5 if head else 2,
        "periodSeconds": 5,
        "successThreshold": 1,
        "failureThreshold": failures,
    }
    if _version(cluster) >= (2, 53):
        return {"httpGet": {"path": "/api/healthz", "port": port}, **common}
    check = "wget --tries 1 -T {} -q -O- http://localhost:{}/{} | grep success"
    checks = [check.format(2, port, "api/local_raylet_healthz")]
    if head:
        checks.append(check.format(10, 8265, "api/gcs_healthz"))
    return {"exec": {"command": ["bash", "-c", " && ".join(checks)]}, **common}


def _labels(cluster: Mapping[str, Any], node_type: str, group: str) -> dict[str, str]:
    name = cluster["metadata"]["name"]
    return {
        "ray.io/is-ray-node": "yes",
        CLUSTER: name,
        NODE_TYPE: node_type,
        GROUP: group,
        "ray.io/identifier": f"{name}-{node_type}"[-63:],
        "app.kubernetes.io/name": "kuberay",
        CREATED_BY[0]: CREATED_BY[1],
    }


def _owner(cluster: Mapping[str, Any]) -> Object:
    meta = cluster["metadata"]
    identity = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": meta["name"], "uid": meta["uid"]}
    return {**identity, "controller": True, "blockOwnerDeletion": True}


def _head_address(cluster: Mapping[str, Any]) -> list[Object]:
    fqdn = head_fqdn(cluster)
    return [{"name": "FQ_RAY_IP", "value": fqdn}, {"name": "RAY_IP", "value": fqdn.split(".")[0]}]


def _from_field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _add_env(container: Object, *variables: Object) -> None:
    """Add what the user has not set."""
    env = container.setdefault("env", [])
    env.extend(new for new in variables if all(new["name"] != old["name"] for old in env))


def _keeps_command(cluster: Mapping[str, Any]) -> bool:
    annotations = cluster["metadata"].get("annotations") or {}
    return str(annotations.get("ray.io/overwrite-container-cmd", "")).lower() == "true"


def _gcs_port(cluster: Mapping[str, Any]) -> str:
    return (cluster["spec"]["headGroupSpec"].get("rayStartParams") or {}).get("port", str(GCS_PORT))


def _version(cluster: Mapping[str, Any]) -> tuple[int, int]:
    """Ray's major and minor version; (0, 0) where it is unset or can't be read."""
    found = re.match(r"v?(\d+)\.(\d+)", cluster["spec"].get("rayVersion") or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _checked_name(name: str) -> str:
    """At most the last 50 characters, never starting with a digit or a dash."""
    name = name[-50:]
    return name if name[0].isalpha() else f"r{name[1:]}"
