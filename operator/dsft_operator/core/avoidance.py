"""Which nodes a run keeps away from: those with a GPU fault, and those that lost it twice. Pure: all from the status.

A node that was drained, reclaimed or preempted has done nothing wrong, and is gone anyway.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dsft_api.conditions import FailureClass
from dsft_api.spec import FineTuneSpec
from dsft_api.status import MAX_AVOIDED, FineTuneStatus
from dsft_operator.core.observed import Ended, Pod

Json = dict[str, Any]

ENOUGH = 2
"""Losses on one node after which it is no accident."""
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_COUNTED = (FailureClass.WORKER_LOST, FailureClass.HOST_OOM, FailureClass.UNKNOWN)


def blamed(kind: FailureClass, ends: Sequence[Ended], pods: Sequence[Pod], host: str | None) -> tuple[str, ...]:
    """The nodes on which an attempt failed so, where that says something about them. `host`: the pod of the rank that told."""
    if kind is FailureClass.GPU_FAULT:
        nodes = {pod.node for pod in pods if pod.name == host}
    elif kind in _COUNTED:
        # A worker whose head is gone ends with an error as well.
        alone = not any(end.role == "head" for end in ends)
        nodes = {end.node for end in ends if alone and end.role == "worker" and not end.disrupted and end.exit_code}
    else:
        nodes = set[str | None]()
    return tuple(sorted(node for node in nodes if node))[:MAX_AVOIDED]


def avoided(status: FineTuneStatus, spec: FineTuneSpec | None) -> tuple[str, ...]:
    """The nodes to keep away from after the last attempt, oldest first; of many, the last ones."""
    if spec is None or not any(pool.avoid_failed_nodes for pool in spec.node_pools):
        return status.avoided_nodes
    times = Counter(node for attempt in status.attempts for node in attempt.failed_nodes)
    faulty = [n for a in status.attempts if a.failure_class is FailureClass.GPU_FAULT for n in a.failed_nodes]
    often = [node for node, count in times.items() if count >= ENOUGH]
    return tuple(dict.fromkeys((*status.avoided_nodes, *faulty, *often)))[-MAX_AVOIDED:]


def forgiven(status: FineTuneStatus) -> Json:
    """Changes of status that let all nodes be used again, with no count kept against them."""
    innocent = tuple(attempt.model_copy(update={"failed_nodes": ()}) for attempt in status.attempts)
    return {"avoided_nodes": (), "attempts": innocent}


def kept_away(template: Json, nodes: Sequence[str]) -> Json:
    """A pod template whose pods go to none of these nodes, whatever else its affinity asks for."""
    if not nodes:
        return template
    # By name, which the label kubernetes.io/hostname need not be; the API server takes one value per requirement.
    rules: list[Json] = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    affinity: Json = template["spec"].get("affinity") or {}
    node: Json = affinity.get("nodeAffinity") or {}
    required: Json = node.get(_REQUIRED) or {}
    terms: list[Json] = required.get("nodeSelectorTerms") or [{}]
    # Terms are alternatives: each has to keep away.
    kept: list[Json] = [{**term, "matchFields": [*term.get("matchFields", ()), *rules]} for term in terms]
    wanted: Json = {**node, _REQUIRED: {**required, "nodeSelectorTerms": kept}}
    return {**template, "spec": {**template["spec"], "affinity": {**affinity, "nodeAffinity": wanted}}}


def words(nodes: Sequence[str]) -> str:
    """What a wait says of them; empty without any."""
    if not nodes:
        return ""
    return f"; kept away from nodes that failed: {', '.join(nodes)} (a new spec.retry.token lets them be used again)"
