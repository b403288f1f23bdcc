"""Kubernetes JSON -> what the core speaks of. Pure, and lenient: an object of a newer schema must not stop the operator."""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from dsft_api import CHECKPOINT_REQUEST
from dsft_api.checks import check
from dsft_api.problem import Problem, field_name
from dsft_api.resource import DeepSpeedFineTune, spec_hash
from dsft_api.spec import IDENTITY_FIELDS, FineTuneSpec
from dsft_api.status import FineTuneStatus
from dsft_operator.config import OperatorConfig
from dsft_operator.core import naming
from dsft_operator.core.confinement import bounded, confinement_problems
from dsft_operator.core.interconnect import profile_problems, with_floor
from dsft_operator.core.observed import Cluster, Ended, Pod, Run, Warned
from dsft_operator.core.pods import pod_problems
from dsft_operator.core.submission import too_large
from dsft_operator.tenant_policy import policy_for

Json = Mapping[str, Any]

# Those that run are few; those that have ended are looked at once per resync.
MAX_JUDGED = 512
MAX_DEPTH = 64

# What spec.managedBy of a RayCluster says where KubeRay itself looks after it.
KUBERAY = "ray.io/kuberay-operator"
RAY_CONTAINERS = ("ray-head", "ray-worker")
# Reasons of a failed pod, by the kubelet, that are not the pod's own doing (Kubernetes 1.29 and later add DisruptionTarget).
_DISRUPTIONS = ("Evicted", "Preempting", "Terminated", "NodeShutdown", "Shutdown", "NodeLost")
# KubeRay's init container of workers.
WAIT_CONTAINER = "wait-gcs-ready"
# The head needs minutes to be ready, so its own words (an image, a crash) count before its condition.
_WAITS = ("ContainerCreating", "PodInitializing")


@dataclass(frozen=True)
class Judgement:
    """What a spec says, as `Run` has it, whatever became of the run."""

    spec: FineTuneSpec | None
    identity: str | None
    problems: tuple[Problem, ...]
    ignored: tuple[str, ...] = ()


class Judge:
    """Judges specs, each generation of a resource once: it costs milliseconds, and a run is looked at every few seconds."""

    def __init__(self, config: OperatorConfig) -> None:
        self._config = config
        self._judged: OrderedDict[tuple[str, int], Judgement] = OrderedDict()

    def __call__(self, raw: Json) -> Judgement:
        """The spec with the admin's defaults, and all that is wrong with it."""
        key = (raw["metadata"]["uid"], raw["metadata"].get("generation", 1))
        if key not in self._judged:
            self._judged[key] = _judged(raw, self._config)
            if len(self._judged) > MAX_JUDGED:
                self._judged.popitem(last=False)
        self._judged.move_to_end(key)
        return self._judged[key]


def run_of(raw: Json, config: OperatorConfig, judge: Judge | None = None) -> Run:
    """The resource with the admin's defaults, and every problem it has."""
    meta: Json = raw["metadata"]
    judged = judge(raw) if judge is not None else _judged(raw, config)
    status = _status(raw)
    deleted = meta.get("deletionTimestamp")
    return Run(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        generation=meta.get("generation", 1),
        resource_version=meta["resourceVersion"],
        spec=judged.spec,
        status=status,
        identity=judged.identity,
        problems=(*judged.problems, *_thawed(judged.identity, status)),
        ignored=judged.ignored,
        deleting=datetime.fromisoformat(deleted) if deleted else None,
        finalizers=tuple(meta.get("finalizers", ())),
        labels=meta.get("labels", {}),
        checkpoint_request=meta.get("annotations", {}).get(CHECKPOINT_REQUEST),
    )


def _judged(raw: Json, config: OperatorConfig) -> Judgement:
    if _is_deep(raw.get("spec")):
        return Judgement(
            None, None, (Problem("spec", f"is nested deeper than {MAX_DEPTH} levels", "write it flatter"),)
        )
    try:
        resource = DeepSpeedFineTune.model_validate({k: v for k, v in raw.items() if k != "status"})
    except ValidationError as error:
        problems = tuple(
            Problem(field_name(tuple(item["loc"])), item["msg"], "correct it and apply the resource again")
            for item in error.errors(include_url=False, include_input=False)
        )
        return Judgement(None, None, problems)
    given = resource.spec
    namespace = raw["metadata"]["namespace"]
    policy = policy_for(namespace, config.policies)
    # What is too large is not looked at any further: that takes time from all others.
    problems = tuple(too_large(given)) or (
        *check(resource),
        *pod_problems(given),
        *confinement_problems(given, policy, namespace, config.gpu_resource),
        *profile_problems(given, config),
        *_lacking(given, config),
    )
    spec = with_floor(bounded(with_defaults(given, config), policy), config)
    return Judgement(spec, spec_hash(given), problems, tuple(_unknown_fields(raw["spec"])))


def _is_deep(value: object) -> bool:
    """Whether it nests deeper than anything that anybody means. Without recursion, which is what it is there for."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inner(outer)]
    return bool(level)


def _inner(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from cast("dict[str, object]", value).values()
    elif isinstance(value, list):
        yield from cast("list[object]", value)


def _unknown_fields(spec: Json) -> Iterator[str]:
    try:
        FineTuneSpec.model_validate(spec, extra="forbid")
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False):
            yield field_name(("spec", *item["loc"]))


def _thawed(identity: str | None, status: FineTuneStatus) -> Iterator[Problem]:
    """What is frozen once the run began changed all the same: CEL cannot see into free-form parts."""
    if identity is not None and status.attempt and status.spec_hash not in (None, identity):
        fields = ", ".join(to_camel(name) for name in IDENTITY_FIELDS)
        yield Problem(
            "spec",
            f"its identity ({fields}) is another than the one the run began with",
            "change it back, or make a new resource",
        )


def with_defaults(spec: FineTuneSpec, config: OperatorConfig) -> FineTuneSpec:
    """The spec with the admin's storage where it names none, and the admin's image."""
    changes: dict[str, Any] = {}
    if spec.storage.uri is None:
        given = {name: getattr(spec.storage, name) for name in spec.storage.model_fields_set}
        changes["storage"] = config.storage.model_copy(update=given)
    if spec.image.trainer is None:
        changes["image"] = spec.image.model_copy(update={"trainer": config.image.trainer})
    return spec.model_copy(update=changes)


def _lacking(spec: FineTuneSpec, config: OperatorConfig) -> Iterator[Problem]:
    """What a run on a cluster needs and neither the spec nor the admin gives."""
    if not spec.node_pools:
        yield Problem("spec.nodePools", "is empty", "name at least one pool: name, nodes, gpusPerNode")
    if spec.storage.uri is None and config.storage.uri is None:
        yield Problem("spec.storage.uri", "is missing, and the operator has no default", "write s3://BUCKET/PREFIX")
    if spec.image.trainer is None and config.image.trainer is None:
        yield Problem("spec.image.trainer", "is missing, and the operator has no default", "name the trainer image")
    uri = spec.storage.uri or config.storage.uri or ""
    if uri.startswith("file://") and spec.storage.volume is None:
        remedy = "name a ReadWriteMany claim and its mountPath, or use s3://"
        yield Problem("spec.storage.volume", "is missing: file:// storage must outlive the pods", remedy)


def _status(raw: Json) -> FineTuneStatus:
    """The status without what cannot be read: a newer operator wrote it, or somebody else.

    What is left out is a condition or a number more or less; the attempt and the cluster must not be forgotten for it.
    """
    try:
        return FineTuneStatus.model_validate(raw.get("status") or {})
    except ValidationError:
        status: dict[str, Any] = copy.deepcopy(raw["status"])
    while True:
        try:
            return FineTuneStatus.model_validate(status)
        except ValidationError as error:
            for name, *place in {item["loc"][:2] for item in error.errors()}:
                listed = status.get(str(name))
                if place and isinstance(place[0], int) and isinstance(listed, list):
                    cast("list[Any]", listed)[place[0]] = None
                else:
                    status.pop(str(name), None)
            status = {name: _present(value) for name, value in status.items()}


def _present(value: Any) -> Any:
    return [item for item in cast("list[Any]", value) if item is not None] if isinstance(value, list) else value


def cluster_of(raw: Json, run_uid: str) -> Cluster:
    """A RayCluster as KubeRay keeps it."""
    meta: Json = raw["metadata"]
    spec: Json = raw.get("spec") or {}
    status: Json = raw.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
    head: Json = conditions.get("HeadPodReady", {})
    failure: Json = conditions.get("ReplicaFailure", {})
    pod: Json = status.get("head") or {}
    owners = [owner for owner in meta.get("ownerReferences", ()) if owner.get("controller")]
    return Cluster(
        name=meta["name"],
        uid=meta["uid"],
        owned=any(owner.get("uid") == run_uid for owner in owners),
        deleting="deletionTimestamp" in meta,
        template_digest=meta.get("annotations", {}).get(naming.TEMPLATE_ANNOTATION),
        suspended=bool(spec.get("suspend")),
        head_ready=head.get("status") == "True",
        head_message=": ".join(filter(None, (head.get("reason"), head.get("message")))),
        ready_workers=status.get("readyWorkerReplicas", 0),
        desired_workers=status.get("desiredWorkerReplicas", 0),
        head_address=pod.get("podIP") or None,
        problem=": ".join(filter(None, (failure.get("reason"), failure.get("message"))))
        if failure.get("status") == "True"
        else None,
        created=time_of(meta.get("creationTimestamp")),
        seen_by_kuberay=bool(status),
        managed_by=manager if (manager := spec.get("managedBy") or KUBERAY) != KUBERAY else None,
    )


def warnings_of(events: list[Json]) -> tuple[Warned, ...]:
    """Events of core/v1 as warnings, oldest first."""
    ordered = sorted(events, key=_last_seen)
    return tuple(Warned(event.get("reason") or "", (event.get("message") or "")[:1000]) for event in ordered)


def _last_seen(event: Json) -> str:
    series: Json = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((time for time in times if time), event["metadata"].get("creationTimestamp") or "")


def trouble_of(node: Json) -> str | None:
    """What a node's conditions complain of: Ready where it is not true, all others where they are.

    Of a node that is silent all are Unknown, of which Ready says enough.
    """
    status: Json = node.get("status") or {}
    conditions: list[Json] = status.get("conditions", [])
    wrong = [c for c in conditions if (c.get("status") == "True") != (c["type"] == "Ready")]
    words = [f"{c['type']}={c.get('status')} ({c.get('reason', '')}: {c.get('message', '')[:150]})" for c in wrong]
    return "; ".join(words) or None


def pod_of(raw: Json) -> Pod:
    """A Ray pod: where it is, whether it is ready, and what keeps it from it."""
    meta: Json = raw["metadata"]
    status: Json = raw.get("status") or {}
    labels: Json = meta.get("labels", {})
    role: Literal["head", "worker"] = "head" if labels.get("ray.io/node-type") == "head" else "worker"
    conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
    scheduled: Json = conditions.get("PodScheduled", {})
    containers: list[Json] = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    waits = [_state(c)["waiting"] for c in containers if "waiting" in _state(c)]
    told = [wait for wait in waits if wait.get("reason") not in _WAITS]
    node = raw.get("spec", {}).get("nodeName")
    preparing = scheduled.get("status") == "True" and not any(
        {"running", "terminated"} & set(_state(c)) for c in containers
    )
    return Pod(
        name=meta["name"],
        uid=meta.get("uid", ""),
        role=role,
        pool=labels.get("ray.io/group", ""),
        node=node,
        ready=conditions.get("Ready", {}).get("status") == "True",
        deleting="deletionTimestamp" in meta,
        gone_by=time_of(meta.get("deletionTimestamp")),
        unscheduled=scheduled.get("message", "") if scheduled.get("status") == "False" else None,
        waiting=(told[0].get("reason", ""), told[0].get("message", "")) if told else None,
        waits_for_head=any(c["name"] == WAIT_CONTAINER and "running" in _state(c) for c in containers),
        preparing_since=time_of(scheduled.get("lastTransitionTime")) if preparing else None,
        image_id=next((c["imageID"] for c in containers if c["name"] in RAY_CONTAINERS and c.get("imageID")), None),
        ended=(*_ended(meta["name"], role, node, containers), *_pod_ended(meta["name"], role, node, status)),
    )


def _state(container: Json) -> Json:
    return container.get("state") or {}


def time_of(text: str | None) -> datetime | None:
    """A time as Kubernetes writes it."""
    return datetime.fromisoformat(text) if text else None


def _ended(pod: str, role: Literal["head", "worker"], node: str | None, containers: list[Json]) -> Iterator[Ended]:
    for container in containers:
        if container["name"] not in RAY_CONTAINERS:
            continue
        for state in (container.get("lastState", {}), container.get("state", {})):
            if end := state.get("terminated"):
                yield Ended(
                    pod=pod,
                    role=role,
                    node=node,
                    reason=end.get("reason", ""),
                    exit_code=end.get("exitCode", 0),
                    message=end.get("message", "")[-1000:],
                    at=time_of(end.get("finishedAt")),
                )


def _pod_ended(pod: str, role: Literal["head", "worker"], node: str | None, status: Json) -> Iterator[Ended]:
    """Why a pod as a whole has to go: what no container of it says."""
    for condition in status.get("conditions", ()):
        if condition["type"] == "DisruptionTarget" and condition.get("status") == "True":
            reason, message = condition.get("reason", ""), condition.get("message", "")[-1000:]
            at = time_of(condition.get("lastTransitionTime"))
            yield Ended(pod, role, node, reason, message=message, at=at, disrupted=True)
            return
    if status.get("phase") == "Failed" and status.get("reason"):
        disrupted = status["reason"] in _DISRUPTIONS
        yield Ended(pod, role, node, status["reason"], message=status.get("message", "")[-1000:], disrupted=disrupted)
