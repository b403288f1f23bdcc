"""Runs in every situation, built from a few words, for the tables of the plan."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from dsft_api.conditions import FailureClass
from dsft_api.progress import Progress, TrainerFailure, TrainerPhase
from dsft_api.status import CheckpointRef, Checkpoints, FineTuneStatus, Output, ProgressStatus
from dsft_operator.adapters.reading import run_of
from dsft_operator.config import OperatorConfig
from dsft_operator.core.decision import Action, Decision
from dsft_operator.core.naming import FINALIZER
from dsft_operator.core.observed import Cluster, Head, Observed, Pod, RayJob
from dsft_operator.core.plan import plan
from dsft_operator.core.raycluster import template_digest

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
UID = "0a1b2c3d-0000-4000-8000-000000000000"
CONFIG = OperatorConfig.model_validate({"image": {"trainer": "registry.example/dsft-trainer:1"}})

SPEC: dict[str, Any] = {
    "model": {"uri": "hf://org/model", "task": "sequence-classification"},
    "data": {"train": {"uri": "hf://org/data", "format": "classification"}},
    "training": {"epochs": 1, "globalBatchSize": 8, "optimizer": {"learningRate": 1e-4}},
    "storage": {"uri": "s3://bucket/runs", "credentials": {"secretName": "s3"}},
    "nodePools": [{"name": "gpu", "nodes": 2, "gpusPerNode": 1}],
    "checkpoint": {"drainSeconds": 60},
    # A step before all others, which its own tests take.
    "preflight": {"enabled": False},
}


def resource(spec: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """The resource as the API server gives it."""
    return {
        "apiVersion": "dsft.dev/v1alpha1",
        "kind": "DeepSpeedFineTune",
        "metadata": {
            "name": "chat",
            "namespace": "ml",
            "uid": UID,
            "generation": 1,
            "resourceVersion": "1",
            "finalizers": [FINALIZER],
            **metadata,
        },
        "spec": {**SPEC, **(spec or {})},
    }


def begin(spec: dict[str, Any] | None = None, **metadata: Any) -> Observed:
    """A run that was just applied."""
    return Observed(run_of(resource(spec, **metadata), CONFIG))


def after(seen: Observed, seconds: float = 0, **changes: Any) -> tuple[Observed, Decision]:
    """Decide, and give what is seen next: the status that was wished, with what changed in the world."""
    decision = plan(seen, NOW + timedelta(seconds=seconds), CONFIG)
    return advance(seen, decision, **changes), decision


def advance(seen: Observed, decision: Decision, **changes: Any) -> Observed:
    """What is seen after a decision's status was written."""
    status = decision.status or seen.run.status
    wire = FineTuneStatus.model_validate(status.to_wire())
    return replace(seen, run=replace(seen.run, status=wire), **changes)


def cluster(seen: Observed, **facts: Any) -> Cluster:
    """Our RayCluster: two workers wanted, nothing ready."""
    assert seen.run.spec is not None
    known = {
        "name": f"chat-{UID[:5]}",
        "uid": "cluster-1",
        "owned": True,
        "template_digest": template_digest(seen.run, seen.run.spec, CONFIG),
        "desired_workers": 2,
        "head_address": "10.0.0.1",
    }
    return Cluster(**{**known, **facts})


WHOLE = {"head_ready": True, "ready_workers": 2}


def provisioning(spec: dict[str, Any] | None = None, **facts: Any) -> Observed:
    """Its RayCluster exists, is prepared, and has the given facts."""
    seen, _ = after(begin(spec))
    seen = replace(seen, cluster=cluster(seen, **facts))
    seen, _ = after(seen)
    return seen


def whole(spec: dict[str, Any] | None = None, session: str = "session-1") -> Observed:
    """All pods are ready, and the head answers."""
    return replace(provisioning(spec, **WHOLE), head=Head(session, "2.60.0"), pods=pods())


def pods() -> tuple[Pod, ...]:
    """Head and two workers, all ready."""
    return (
        Pod("chat-head", "head", "headgroup", node="node-0", ready=True),
        Pod("chat-gpu-1", "worker", "gpu", node="node-1", ready=True),
        Pod("chat-gpu-2", "worker", "gpu", node="node-2", ready=True),
    )


def submitted(spec: dict[str, Any] | None = None) -> Observed:
    """The intent of attempt 1 is in the status, and Ray runs its driver."""
    seen, _ = after(whole(spec))
    seen, _ = after(replace(seen, job=job("RUNNING")))
    return seen


def job(state: Any, attempt: int = 1, **facts: Any) -> RayJob:
    """The submission of an attempt."""
    return RayJob(f"{UID[:8]}-a{attempt}", state, **facts)


def told(phase: TrainerPhase, attempt: int = 1, step: int = 0, committed: int = 0, **facts: Any) -> Progress:
    """The trainer's document."""
    latest = CheckpointRef(uri="s3://c", step=committed, world_size=2, bytes=1, time=NOW, digest="sha256:0")
    given = {
        "seq": 1,
        "run_uid": UID,
        "attempt": attempt,
        "phase": phase,
        "progress": ProgressStatus(step=step, total_steps=100),
        "checkpoints": Checkpoints(latest=latest if committed else None),
        "updated_at": NOW,
    }
    return Progress(**{**given, **facts})


OUTPUT = Output(uri="s3://bucket/runs/export", format="safetensors", bytes=1, digest="sha256:1")


def names(decision: Decision) -> list[str]:
    """The actions of a decision, by kind."""
    return [type(action).__name__ for action in decision.actions]


def the(kind: type, decision: Decision) -> Action:
    """The one action of a kind."""
    (found,) = (action for action in decision.actions if isinstance(action, kind))
    return found


def failure(kind: FailureClass, code: int = 1) -> TrainerFailure:
    """What a trainer reports at its end."""
    return TrainerFailure(failure_class=kind, message="it broke", remedy="mend it", exit_code=code)


def submitted_and(spec: dict[str, Any]) -> Observed:
    """A running one whose spec was changed."""
    seen = submitted()
    changed = begin(spec)
    assert changed.run.spec is not None
    return replace(seen, run=replace(seen.run, spec=changed.run.spec))


def deleted(seen: Observed) -> Observed:
    """The user deleted it just now."""
    return replace(seen, run=replace(seen.run, deleting=NOW))


def edited(seen: Observed, spec: dict[str, Any], generation: int = 2) -> Observed:
    """The user changed the spec."""
    run = begin(spec).run
    return replace(seen, run=replace(seen.run, spec=run.spec, problems=run.problems, generation=generation))


def done() -> Observed:
    """The run has succeeded, and its cluster is gone."""
    seen = replace(submitted(), job=job("SUCCEEDED"), progress=told(TrainerPhase.SUCCEEDED, output=OUTPUT))
    return replace(after(seen)[0], cluster=None, job=None, progress=None, head=None)


def changed(seen: Observed, **status: Any) -> Observed:
    """Its status has these fields, in wire names, besides."""
    wire = {**seen.run.status.to_wire(), **status}
    known = FineTuneStatus.model_validate({name: value for name, value in wire.items() if value is not None})
    return replace(seen, run=replace(seen.run, status=known))


def next_attempt() -> Observed:
    """The first attempt has ended, and the cluster is whole."""
    seen, _ = after(replace(submitted(), head=Head("session-2", "2.60.0"), job=None))
    return replace(seen, job=None)
