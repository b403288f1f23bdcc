"""The `ray start` command that KubeRay generates from a group's rayStartParams, resources and labels.

Follows `generateRayStartCommand` of KubeRay 1.7, flag by flag: sorted names, switches without a value.
"""

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from kubernetes.utils.quantity import parse_quantity

GCS_PORT = 6379
AGENT_PORT = 52365
METRICS_PORT = 8080

_BOOLEAN_VALUES = ("log-color", "include-dashboard", "include-log-monitor")  # these flags take "false" as a value
_GPU_KEY = re.compile(r"gpu$|^nvidia\.com/mig-\d+g\.\d+gb$")


def is_gpu(key: str) -> bool:
    """Whether a resource name counts as GPUs."""
    return bool(_GPU_KEY.search(key))


def amount(quantity: Any) -> Decimal:
    """The number behind a Kubernetes quantity such as `500m` or `4Gi`."""
    return Decimal(parse_quantity(quantity))


def start_params(group: Mapping[str, Any], resources: Mapping[str, Any], head_address: str | None) -> dict[str, str]:
    """All flags of one group's `ray start`; `head_address` is None for the head itself."""
    params = {**(group.get("rayStartParams") or {}), **_from_resources(group.get("resources") or {})}
    if labels := group.get("labels"):
        params["labels"] = ",".join(f"{key}={labels[key]}" for key in sorted(labels))
    if head_address is None:
        params.setdefault("dashboard-host", "0.0.0.0")
    else:
        params.setdefault("address", head_address)
    params.setdefault("metrics-export-port", str(METRICS_PORT))
    params["block"] = "true"
    params.setdefault("dashboard-agent-listen-port", str(AGENT_PORT))

    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    if cpu := _whole(limits.get("cpu")) or _whole(requests.get("cpu")):
        params.setdefault("num-cpus", str(cpu))
    if memory := _whole(limits.get("memory")):
        params.setdefault("memory", str(memory))
    for key in sorted(limits):
        if is_gpu(key) and _whole(limits[key]):
            params.setdefault("num-gpus", str(_whole(limits[key])))
    return params


def start_command(params: Mapping[str, str], head: bool) -> str:
    """The shell command; the spaces are KubeRay's."""
    flags = ""
    for name in sorted(params):
        value = params[name]
        if value.lower() in ("true", "false") and name not in _BOOLEAN_VALUES:
            flags += f" --{name} " if value.lower() == "true" else ""
        else:
            flags += f" --{name}={value} "
    return f"ray start {'--head ' if head else ''}{flags}"


def _from_resources(resources: Mapping[str, Any]) -> dict[str, str]:
    """The group's own `resources` field, in place of rayStartParams."""
    params: dict[str, str] = {}
    custom: dict[str, float] = {}
    for name, quantity in resources.items():
        if name.lower() == "cpu":
            params["num-cpus"] = str(_whole(quantity))
        elif name.lower() == "memory":
            params["memory"] = str(_whole(quantity))
        elif is_gpu(name.lower()):
            params["num-gpus"] = str(_whole(quantity))
        else:
            custom[name] = float(amount(quantity))
    if custom:
        params["resources"] = f"'{json.dumps(custom, separators=(',', ':'), sort_keys=True)}'"
    return params


def _whole(quantity: Any) -> int:
    """Rounded up, as Go's Quantity.Value() does; 0 where there is none."""
    return math.ceil(amount(quantity)) if quantity is not None else 0
