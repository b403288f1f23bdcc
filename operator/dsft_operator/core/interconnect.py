"""What the admin's rows of `interconnects` add to the pods of workers: variables, devices, volumes and sidecars of a network."""

from collections.abc import Iterator
from typing import Any

from dsft_api.problem import Problem
from dsft_api.spec import FineTuneSpec
from dsft_operator.config import Interconnect, OperatorConfig

Manifest = dict[str, Any]

PLAIN = Interconnect(name="tcp")
"""What is known without a row: nothing is added."""


def profile_of(spec: FineTuneSpec, config: OperatorConfig) -> Interconnect | None:
    """The row that the run names; None if it names none, or one that is not there."""
    asked = spec.execution.interconnect
    if asked is None:
        return None
    return next((row for row in (*config.interconnects, PLAIN) if row.name == asked.profile), None)


def profile_problems(spec: FineTuneSpec, config: OperatorConfig) -> Iterator[Problem]:
    """A profile that the settings do not have."""
    asked = spec.execution.interconnect
    if asked is not None and profile_of(spec, config) is None:
        known = ", ".join(dict.fromkeys(row.name for row in (*config.interconnects, PLAIN)))
        remedy = f"use one of {known}, or have the admin write a row: interconnects[].name of the operator's settings"
        yield Problem("spec.execution.interconnect.profile", "is not known here", remedy, asked.profile)


def with_floor(spec: FineTuneSpec, config: OperatorConfig) -> FineTuneSpec:
    """The spec with the profile's least rate where it names none."""
    asked, row = spec.execution.interconnect, profile_of(spec, config)
    if asked is None or row is None or row.min_all_gather_gbps is None or asked.min_all_gather_gbps is not None:
        return spec
    demand = asked.model_copy(update={"min_all_gather_gbps": row.min_all_gather_gbps})
    return spec.model_copy(update={"execution": spec.execution.model_copy(update={"interconnect": demand})})


def connected(pod: Manifest, row: Interconnect | None) -> Manifest:
    """A worker's pod with what its network needs. A variable that the run sets itself stays."""
    if row is None:
        return pod
    ray, *others = pod["spec"]["containers"]
    names = {variable["name"] for variable in ray["env"]}
    limits = {**ray["resources"].get("limits", {}), **row.resources}
    ray = {
        **ray,
        "env": [*ray["env"], *({"name": name, "value": row.env[name]} for name in row.env if name not in names)],
        "resources": {**ray["resources"], **({"limits": limits} if limits else {})},
        "volumeMounts": [*ray["volumeMounts"], *row.volume_mounts],
    }
    metadata = {**pod["metadata"], "annotations": {**row.annotations, **pod["metadata"]["annotations"]}}
    body = {
        **pod["spec"],
        "containers": [ray, *others, *row.sidecars],
        "volumes": [*pod["spec"]["volumes"], *row.volumes],
    }
    return {**pod, "metadata": metadata, "spec": body}
