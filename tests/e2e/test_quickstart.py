"""The happy path: the quickstart's own file by `kubectl apply`, to a model that plain transformers loads, and nothing left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsft_api.conditions import ConditionType
from dsft_api.job import CONTRACT
from dsft_api.layout import CHECKPOINTS, RESULT_FILE
from dsft_demo.render import read_pairs
from dsft_demo.report import LEAST_ACCURACY, Scores, classify, disagreements, score
from dsft_trainer.checkpoint.listing import read_claims, read_commits
from tests.e2e.quickstart import Finished
from tests.e2e.s3 import Bucket
from tests.e2e.tenant import condition_of

pytestmark = pytest.mark.smoke

STEPS, EVERY = 100, 25

# Every field of the status (design, section 3) that applies to a run that succeeded on CPUs at its first attempt.
# What does not: modelRevision and dataRevision (hf://), mfu and usage (GPUs), checkpointRequest, retries and retryToken, and
# what failed attempts have.
COMPLETE: dict[str, Callable[[Any], bool]] = {
    "observedGeneration": lambda value: value == 1,
    "phase": lambda value: value == "Succeeded",
    "phaseTime": bool,
    "message": lambda value: value.startswith("done: s3://"),
    "specHash": lambda value: value.startswith("sha256:"),
    "resolved.image": lambda value: "@sha256:" in value,
    "resolved.contract": lambda value: value == CONTRACT,
    "resolved.storagePrefix": lambda value: value.startswith("s3://"),
    "resolved.dataDigest": lambda value: value.startswith("sha256:"),
    "attempt": lambda value: value == 1,
    "preflight.job": lambda value: value.startswith("verse-paraphrase-"),
    "preflight.startTime": bool,
    "preflight.endTime": bool,
    "rayCluster.name": lambda value: value.startswith("verse-paraphrase-"),
    "rayCluster.uid": bool,
    "rayCluster.incarnation": lambda value: value == 1,
    "rayCluster.session": lambda value: value.startswith("session_"),
    "job.submissionId": lambda value: value.endswith("-a1"),
    "job.state": lambda value: value == "SUCCEEDED",
    "progress.step": lambda value: value == STEPS,
    "progress.totalSteps": lambda value: value == STEPS,
    "progress.epoch": lambda value: 1 < value < 2,
    "progress.percent": lambda value: value == 100,
    "progress.loss": lambda value: 0 < value < 2,
    "progress.learningRate": lambda value: 0 <= value < 1e-4,
    "progress.tokensPerSecond": lambda value: value > 0,
    "progress.eta": bool,
    "progress.updatedAt": bool,
    "evaluation.step": lambda value: value == STEPS,
    "evaluation.metrics.accuracy": lambda value: value > LEAST_ACCURACY,
    "evaluation.metrics.f1": lambda value: value > LEAST_ACCURACY,
    "evaluation.metrics.loss": lambda value: value > 0,
    "checkpoints.latest.uri": lambda value: f"/{CHECKPOINTS}/step-{STEPS:08d}-a1.g1" in value,
    "checkpoints.latest.step": lambda value: value == STEPS,
    "checkpoints.latest.epoch": lambda value: value > 1,
    "checkpoints.latest.worldSize": lambda value: value == 2,
    "checkpoints.latest.bytes": lambda value: value > 22_000_000 * 12,
    "checkpoints.latest.time": bool,
    "checkpoints.latest.metrics.accuracy": lambda value: value > LEAST_ACCURACY,
    "checkpoints.latest.digest": lambda value: value.startswith("sha256:"),
    "checkpoints.best.step": lambda value: value in (50, STEPS),
    "checkpoints.retained": lambda value: [ref["step"] for ref in value][-2:] == [STEPS - EVERY, STEPS],
    "output.uri": lambda value: value.endswith("/export"),
    "output.format": lambda value: value == "safetensors",
    "output.bytes": lambda value: value > 22_000_000 * 2,
    "output.digest": lambda value: value.startswith("sha256:"),
    "attempts.0.number": lambda value: value == 1,
    "attempts.0.incarnation": lambda value: value == 1,
    "attempts.0.startTime": bool,
    "attempts.0.endTime": bool,
    "attempts.0.fromStep": lambda value: value == 0,
    "attempts.0.toStep": lambda value: value == STEPS,
    "attempts.0.exitCode": lambda value: value == 0,
    "attempts.0.nodes": lambda value: len(value) >= 1,
    "logs.uri": lambda value: value.startswith("s3://"),
    "startTime": bool,
    "completionTime": bool,
}
CONDITIONS = {
    ConditionType.READY: "True",
    ConditionType.SUCCEEDED: "True",
    ConditionType.ACCEPTED: "True",
    ConditionType.PREFLIGHTED: "True",
    ConditionType.CLUSTER_READY: "True",
    ConditionType.JOB_SUBMITTED: "True",
    ConditionType.CHECKPOINT_AVAILABLE: "True",
}


def test_the_whole_way(quickstart: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    """One pod looked, two workers and a head trained, committed, exported; the table is what `kubectl get dsft -w` showed."""
    with capsys.disabled():
        print(f"\n{quickstart.table}")
    pods = sorted(pod.partition("/")[0] for pod in quickstart.most_pods)
    assert pods == ["cpu", "cpu", "headgroup", "preflight"]
    for phase in ("Provisioning", "Starting", "Running", "Succeeded"):
        assert phase in quickstart.table
    reasons = [event["reason"] for event in quickstart.tenant.events(quickstart.name)]
    assert {"Provisioning", "Starting", "Running", "Succeeded"} <= set(reasons)
    assert len(reasons) == len(set(reasons)), "an Event for each transition, once"


def test_the_status_is_complete(quickstart: Finished) -> None:
    status = quickstart.resource["status"]
    wrong = {path: value for path, right in COMPLETE.items() if not _holds(right, value := _at(status, path))}
    assert wrong == {}
    assert {c.type: c.status for c in quickstart.status.conditions} == CONDITIONS
    assert all(c.observed_generation == 1 for c in quickstart.status.conditions)


def test_commits_are_in_storage(quickstart: Finished) -> None:
    """Three at least were committed, and those that the policy keeps are there, as one lineage of one claim."""
    steps = sorted(int(uri.rpartition("step-")[2][:8]) for uri in quickstart.commits)
    assert len(steps) >= 3
    assert steps[-1] == STEPS
    store = quickstart.tenant.store(quickstart.name)
    (claim,) = read_claims(store)
    assert claim.world_size == 2
    retained = quickstart.status.checkpoints.retained if quickstart.status.checkpoints else ()
    assert [commit.step for commit in read_commits(store)] == [ref.step for ref in retained]
    assert store.get_bytes(RESULT_FILE) is not None


def test_logs_are_in_storage(quickstart: Finished, bucket: Bucket, tmp_path: Path) -> None:
    """Where the status says, after the pods are gone."""
    assert quickstart.status.logs is not None
    files = [file for file in bucket.download(quickstart.status.logs.uri, tmp_path).rglob("*") if file.is_file()]
    assert f"step {STEPS}: committed s3://" in "".join(file.read_text() for file in files)


def test_the_export_predicts_as_the_evaluation_said(quickstart: Finished, bucket: Bucket, tmp_path: Path) -> None:
    """Loaded by plain transformers, without any code of ours, and scored on the held-out pairs."""
    assert quickstart.status.output is not None
    assert quickstart.status.evaluation is not None
    export = bucket.download(quickstart.status.output.uri, tmp_path)
    pairs = read_pairs("test")
    recomputed = score([int(p >= 0.5) for p in classify(export, pairs)], [pair.label for pair in pairs])
    metrics = quickstart.status.evaluation.metrics
    assert disagreements(recomputed, Scores(metrics["accuracy"], metrics["f1"]), len(pairs)) == []


def test_nothing_of_the_run_is_left(quickstart: Finished) -> None:
    """No pod, Service, Secret, NetworkPolicy or RayCluster. The resource stays, as it was applied."""
    quickstart.tenant.until_nothing_left()
    resource = quickstart.tenant.resource(quickstart.name)
    assert resource["status"] == quickstart.resource["status"], "the end is the end: nothing is written afterwards"
    assert resource["metadata"]["generation"] == 1
    assert condition_of(quickstart.status, ConditionType.RECONCILING) is None


def _at(document: Any, path: str) -> Any:
    for name in path.split("."):
        if document is None:
            return None
        document = document[int(name)] if isinstance(document, list) else document.get(name)
    return document


def _holds(right: Callable[[Any], bool], value: Any) -> bool:
    return value is not None and bool(right(value))
