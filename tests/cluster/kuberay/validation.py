"""What KubeRay 1.7 refuses in a RayCluster. It is no admission: the answer is a Warning Event, and nothing else happens."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_NAME = 53
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def metadata_problem(cluster: Mapping[str, Any]) -> str | None:
    """For the Event `InvalidRayClusterMetadata`."""
    name = cluster["metadata"]["name"]
    if len(name) > MAX_NAME:
        return f"RayCluster name should be no more than {MAX_NAME} characters"
    if not _DNS_1035.fullmatch(name):
        return "RayCluster name should be a valid DNS1035 label"
    return None


def spec_problem(cluster: Mapping[str, Any]) -> str | None:
    """For the Event `InvalidRayClusterSpec`: the first problem."""
    return next(_spec_problems(cluster["spec"]), None)


def _spec_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    head = spec["headGroupSpec"]
    if not head["template"]["spec"].get("containers"):
        yield "headGroupSpec should have at least one container"
    yield from _group_problems("Head", head)
    for group in spec.get("workerGroupSpecs") or []:
        name = group["groupName"]
        if not group["template"]["spec"].get("containers"):
            yield "workerGroupSpec should have at least one container"
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if low is None or high is None:
            yield f"worker group {name} must set both minReplicas and maxReplicas when autoscaling is disabled"
        elif low > high:
            yield f"worker group {name} has minReplicas {low} greater than maxReplicas {high}"
        yield from _group_problems(name, group)
    yield from _auth_problems(spec)


def _group_problems(name: str, group: Mapping[str, Any]) -> Iterator[str]:
    params = group.get("rayStartParams") or {}
    if group.get("resources") and any(params.get(key) for key in ("num-cpus", "num-gpus", "memory", "resources")):
        yield f"resource fields should not be set in both rayStartParams and Resources for {name} group; please use only one"
    if "labels" in params:
        yield f"rayStartParams['labels'] is not supported for {name} group; please use the top-level Labels field instead"


def _auth_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    options = spec.get("authOptions") or {}
    if options.get("mode") != "token":
        return
    version = spec.get("rayVersion") or ""
    if not version:
        yield "authOptions.mode is 'token' but RayVersion was not specified. Ray version 2.52.0 or later is required"
        return
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if not found:
        yield f"authOptions.mode is 'token' but RayVersion format is invalid: {version}"
    elif (int(found[1]), int(found[2])) < (2, 52):
        yield f"authOptions.mode is 'token' but minimum Ray version is 2.52.0, got {version}"
