"""Before there is a RayCluster: the Job that looks, what is read of it, and what each of its ends decides."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dsft_api.conditions import ConditionType, FailureClass, Phase, Reason
from dsft_api.job import JOB_ENV, Job
from dsft_api.preflight import Finding, PreflightResult
from dsft_operator.adapters.preflights import preflight_of
from dsft_operator.config import OperatorConfig
from dsft_operator.core.decision import CreateJob, Decision, DeleteJob
from dsft_operator.core.observed import Observed, Pod, PreflightJob, Warned
from dsft_operator.core.preflight_job import SECONDS, preflight_job, preflight_name
from dsft_operator.core.refusals import refusal
from dsft_operator.core.summary import condition_of
from tests.unit.operator.built import head, pool
from tests.unit.operator.situations import CONFIG, NOW, UID, advance, after, begin, names, the

Json = dict[str, Any]
LOOKS: Json = {"preflight": {"enabled": True}}
CA: Json = {"configMapName": "ca", "key": "ca.crt"}


def built(spec: Json | None = None, config: OperatorConfig = CONFIG) -> Json:
    run = begin({**LOOKS, **(spec or {})}).run
    assert run.spec is not None
    return preflight_job(run, run.spec, config)


def pod_of(job: Json) -> Json:
    return job["spec"]["template"]["spec"]


def container_of(job: Json) -> Json:
    (container,) = pod_of(job)["containers"]
    return container


def name_of(spec: Json | None = None) -> str:
    return built(spec)["metadata"]["name"]


# --- the Job


SECRETS: Json = {
    "storage": {"uri": "s3://bucket/runs", "credentials": {"secretName": "s3"}, "caBundle": CA},
    "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
    "envFrom": [{"secretRef": {"name": "more"}}],
    "serviceAccountName": "default",
    "image": {"pullSecrets": [{"name": "registry"}]},
    "head": {"nodeSelector": {"pool": "cpu"}, "tolerations": [{"key": "cpu", "operator": "Exists"}]},
}


def test_its_pod_has_image_identity_secrets_and_place_of_the_head() -> None:
    """A step before the head, so nothing that a policy of the admin would not let the head have."""
    job, like = built(SECRETS), head({**LOOKS, **SECRETS})["spec"]
    pod, container, (ray,) = pod_of(job), container_of(job), like["containers"]
    alike = ("serviceAccountName", "imagePullSecrets", "nodeSelector", "tolerations", "securityContext")
    assert {part: pod[part] for part in alike} == {part: like[part] for part in alike}
    assert pod["automountServiceAccountToken"] is False
    of_container = ("image", "securityContext", "envFrom", "terminationMessagePolicy")
    assert {part: container[part] for part in of_container} == {part: ray[part] for part in of_container}
    variables = {variable["name"]: variable for variable in container["env"]}
    assert {"HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_CA_BUNDLE"} <= set(variables)
    assert {mount["mountPath"] for mount in ray["volumeMounts"]} < {m["mountPath"] for m in container["volumeMounts"]}
    assert set(pod) - set(like) == set()


def test_it_is_one_short_pod_without_gpus_that_queues_leave_alone() -> None:
    job = built({"queue": {"name": "team-a"}})
    assert {**job["spec"], "template": None} == {
        "backoffLimit": 0,
        "activeDeadlineSeconds": SECONDS,
        "ttlSecondsAfterFinished": 3600,
        "template": None,
    }
    assert pod_of(job)["restartPolicy"] == "Never"
    container = container_of(job)
    assert container["command"] == ["python", "-m", "dsft_trainer", "preflight"]
    assert set(container["resources"]["limits"]) == {"memory"}
    assert not {"ports", "lifecycle", "readinessProbe"} & set(container)
    labels = {**job["metadata"]["labels"], **job["spec"]["template"]["metadata"]["labels"]}
    assert set(labels) == {"app.kubernetes.io/managed-by", "dsft.dev/run", "dsft.dev/run-uid"}
    assert job["metadata"]["ownerReferences"][0]["uid"] == UID


def test_it_is_told_what_the_first_attempt_will_be() -> None:
    """Kubernetes would take $(NAME) for a variable's value."""
    job = built({"data": {"train": {"uri": "s3://b/a-$(HF_TOKEN)-$.jsonl", "format": "classification"}}})
    (text,) = [variable["value"] for variable in container_of(job)["env"] if variable["name"] == JOB_ENV]
    told = Job.model_validate_json(text.replace("$$", "$"))
    assert "$(" not in text.replace("$$", "")
    assert (told.attempt, told.run.uid, told.storage_prefix) == (1, UID, f"s3://bucket/runs/ml/chat-{UID[:8]}")
    assert told.spec.data is not None
    assert told.spec.data.train is not None
    assert told.spec.data.train.uri == "s3://b/a-$(HF_TOKEN)-$.jsonl"


def test_shared_memory_is_that_of_the_smallest_worker() -> None:
    small = pool(resources={"limits": {"memory": "256Mi"}})["nodePools"][0]
    large = {**small, "name": "large", "resources": {"limits": {"memory": "64Gi"}}}
    (shm,) = [v for v in pod_of(built({"nodePools": [large, small]}))["volumes"] if v["name"] == "shm"]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "256Mi"}


@pytest.mark.parametrize(
    ("spec", "is_other"),
    [
        ({"suspend": True}, False),
        ({"retry": {"token": "2"}}, True),
        (pool(nodeSelector={"a": "b"}), True),
        ({"checkpoint": {"drainSeconds": 61}}, True),
    ],
    ids=["suspended", "another token", "another placement", "another policy"],
)
def test_another_spec_is_another_job(spec: Json, is_other: bool) -> None:
    assert (name_of(spec) != name_of()) is is_other
    assert len(name_of()) < 64


def test_the_longest_name_is_that_of_a_label() -> None:
    run = replace(begin(LOOKS).run, name="a" * 40)
    assert run.spec is not None
    assert len(preflight_name(run, run.spec)) == 63


# --- what is read


FINDING = Finding(
    failure_class=FailureClass.STORAGE_DENIED, field="spec.storage", message="NoSuchBucket", remedy="create it"
)
FOUND = PreflightResult(run_uid=UID, findings=(FINDING,))
OWNED = [{"uid": UID, "controller": True}]


def raw_job(owners: list[Json] | None = None, **status: Any) -> Json:
    named: Json = {"name": "chat-p", "uid": "job-1", "ownerReferences": OWNED if owners is None else owners}
    return {"metadata": {**named, "creationTimestamp": "2026-01-01T12:00:00Z"}, "spec": {}, "status": status}


def raw_pod(message: str | None = None, code: int = 0, reason: str = "Completed", owner: str = "job-1") -> Json:
    end = {"terminated": {"exitCode": code, "reason": reason, "message": message}}
    statuses = [{"name": "preflight", "state": {"running": {}} if message is None else end}]
    return {
        "metadata": {"name": "chat-p-x", "ownerReferences": [{"uid": owner}]},
        "status": {"containerStatuses": statuses},
    }


READ: dict[str, tuple[Json, list[Json], Any]] = {
    "no pod yet": (raw_job(), [], (None, None)),
    "it runs": (raw_job(), [raw_pod()], (None, None)),
    "its result": (raw_job(), [raw_pod(FOUND.to_message(), 3)], (FOUND, None)),
    "of another run": (
        raw_job(),
        [raw_pod(FOUND.model_copy(update={"run_uid": "x"}).to_message())],
        (None, "its container ended: Completed, exit code 0"),
    ),
    "somebody else's pod": (raw_job(), [raw_pod(FOUND.to_message(), owner="job-2")], (None, None)),
    "no JSON": (
        raw_job(),
        [raw_pod("Traceback\nMemoryError", 1, "Error")],
        (None, "its container ended: Error, exit code 1: MemoryError"),
    ),
    "killed": (raw_job(), [raw_pod("", 137, "OOMKilled")], (None, "its container ended: OOMKilled, exit code 137")),
    "a class that may pass": (
        raw_job(),
        [raw_pod(FOUND.to_message().replace("StorageDenied", "Preempted"), 1)],
        (None, "its container ended"),
    ),
    "late": (
        raw_job(conditions=[{"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "too long"}]),
        [],
        (None, "its Job is over: DeadlineExceeded: too long"),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read_of_a_job(case: str) -> None:
    job, pods, (result, failed) = READ[case]
    read = preflight_of(job, pods, UID)
    assert read.owned
    assert read.result == result
    assert (read.failed or "").startswith(failed or "")
    assert (read.failed is None) is (failed is None)


def test_of_a_job_that_is_not_ours_nothing_counts() -> None:
    read = preflight_of(raw_job(owners=[]), [raw_pod(FOUND.to_message())], UID)
    assert (read.owned, read.result, read.failed, read.pod) == (False, None, None, None)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", json.dumps({"runUid": UID, "findings": [{}] * 17}), "[" * 5000, "\ud800", "9" * 5000]
)
def test_a_hostile_message_is_no_result(text: str) -> None:
    assert preflight_of(raw_job(), [raw_pod(text)], UID).result is None


# --- what is decided


def looked_at(spec: Json | None = None, **facts: Any) -> Observed:
    """The Job was made, and has the given facts."""
    seen, decision = after(begin({**LOOKS, **(spec or {})}))
    made = the(CreateJob, decision)
    assert isinstance(made, CreateJob)
    job = PreflightJob(made.manifest["metadata"]["name"], "job-1", owned=True, created=NOW)
    return replace(seen, preflight=replace(job, **facts))


def reason_of(decision: Decision, kind: ConditionType) -> tuple[str, str] | None:
    assert decision.status is not None
    found = condition_of(decision.status, kind)
    return (found.status, found.reason) if found is not None else None


def test_the_job_comes_before_the_cluster() -> None:
    seen, decision = after(begin(LOOKS))
    assert names(decision) == ["AddFinalizer", "CreateJob"]
    assert seen.run.status.phase is Phase.PROVISIONING
    assert seen.run.status.preflight is not None
    assert reason_of(decision, ConditionType.CLUSTER_READY) == ("False", Reason.PREFLIGHT)
    assert reason_of(decision, ConditionType.PREFLIGHTED) == ("Unknown", Reason.PREFLIGHT)


def test_nothing_found_goes_on_and_is_not_looked_at_again() -> None:
    note = "spec.model.uri: the Hub cannot be asked"
    seen, decision = after(looked_at(result=PreflightResult(run_uid=UID, unchecked=(note,))))
    assert names(decision) == ["DeleteJob"]
    assert the(DeleteJob, decision) == DeleteJob(name_of(), "job-1")
    assert reason_of(decision, ConditionType.PREFLIGHTED) == ("True", Reason.PREFLIGHT_PASSED)
    assert note in str(seen.run.status.message)
    seen, decision = after(replace(seen, preflight=None), seconds=10)
    assert names(decision) == ["AddFinalizer", "CreateCluster"]
    assert reason_of(decision, ConditionType.PREFLIGHTED) == ("True", Reason.PREFLIGHT_PASSED)


def test_a_finding_ends_the_run_before_there_is_a_cluster() -> None:
    seen, decision = after(looked_at(result=FOUND))
    assert names(decision) == ["DeleteJob"]
    status = seen.run.status
    assert status.phase is Phase.FAILED
    assert status.message == (
        "StorageDenied: preflight: spec.storage: NoSuchBucket -> create it; then set a new spec.retry.token"
    )
    assert status.attempts == ()
    assert status.completion_time == NOW
    assert reason_of(decision, ConditionType.PREFLIGHTED) == ("False", "StorageDenied")
    assert reason_of(decision, ConditionType.SUCCEEDED) == ("False", "StorageDenied")
    assert reason_of(decision, ConditionType.CLUSTER_READY) is None
    assert names(after(replace(seen, preflight=None))[1]) == []


def test_all_findings_are_told() -> None:
    other = FINDING.model_copy(update={"field": "spec.data.train", "failure_class": FailureClass.DATA_INVALID})
    seen, _ = after(looked_at(result=PreflightResult(run_uid=UID, findings=(FINDING, other))))
    message = str(seen.run.status.message)
    assert "1. spec.storage: NoSuchBucket -> create it; 2. spec.data.train: NoSuchBucket -> create it" in message
    assert message.endswith("correct all of it; then set a new spec.retry.token")


def test_a_new_token_looks_again() -> None:
    seen, _ = after(looked_at(result=FOUND))
    mended = begin({**LOOKS, "retry": {"token": "2"}}).run.spec
    seen = replace(seen, run=replace(seen.run, spec=mended), preflight=None)
    seen, _ = after(seen)
    assert seen.run.status.phase is Phase.PENDING
    _, decision = after(seen)
    made = the(CreateJob, decision)
    assert isinstance(made, CreateJob)
    assert made.manifest["metadata"]["name"] == name_of({"retry": {"token": "2"}}) != name_of()


IMAGE = Pod("chat-p-x", "worker", "", waiting=("ErrImagePull", "no such image"))
NO_NODE = Pod("chat-p-x", "worker", "", unscheduled="0/3 nodes are available")
WAITS: dict[str, tuple[Json, str, str]] = {
    "no pod yet": ({}, Reason.PREFLIGHT, "has no pod yet"),
    "no quota": (
        {"warning": Warned("FailedCreate", "exceeded quota: pods")},
        Reason.PREFLIGHT,
        "FailedCreate: exceeded quota",
    ),
    "held by a queue": ({"suspended": True}, Reason.PREFLIGHT, "is suspended, by a queue perhaps"),
    "it runs": ({"pod": Pod("chat-p-x", "worker", "", ready=True)}, Reason.PREFLIGHT, "looks at storage"),
    "no image": ({"pod": IMAGE}, FailureClass.IMAGE_PULL, "preflight: chat-p-x: ErrImagePull: no such image"),
    "no node": ({"pod": NO_NODE}, FailureClass.UNSCHEDULABLE, "preflight: chat-p-x: 0/3 nodes"),
    "not ours": ({"owned": False}, Reason.PREFLIGHT, "does not belong to this resource"),
}


@pytest.mark.parametrize("case", WAITS)
def test_its_wait_is_told_and_holds_the_run_for_a_time_only(case: str) -> None:
    facts, reason, words = WAITS[case]
    waiting = looked_at(**facts)
    seen, decision = after(waiting, seconds=SECONDS - 1)
    assert reason_of(decision, ConditionType.CLUSTER_READY) == ("False", reason)
    assert reason_of(decision, ConditionType.READY) == ("False", reason)
    assert words in str(seen.run.status.message)
    seen, decision = after(seen, seconds=SECONDS)
    assert names(decision) == ([] if case == "not ours" else ["DeleteJob"])
    assert reason_of(decision, ConditionType.PREFLIGHTED) == ("Unknown", Reason.PREFLIGHT_INCOMPLETE)
    assert words in str(seen.run.status.message)
    assert names(after(replace(seen, preflight=None))[1]) == ["AddFinalizer", "CreateCluster"]


def test_the_time_for_nodes_counts_from_the_preflight_on() -> None:
    seen = looked_at({"deadlines": {"provisionSeconds": 60}}, pod=IMAGE)
    seen, _ = after(seen, seconds=59)
    assert seen.run.status.phase is Phase.PROVISIONING
    seen, decision = after(seen, seconds=60)
    assert names(decision) == ["DeleteJob"]
    assert seen.run.status.phase is Phase.FAILED
    assert "ProvisionTimeout: not provisioned within 60 s (ImagePull: preflight: chat-p-x" in str(
        seen.run.status.message
    )


def test_without_a_result_it_goes_on() -> None:
    seen, decision = after(looked_at(failed="its container ended: OOMKilled, exit code 137: "))
    assert names(decision) == ["DeleteJob"]
    assert "OOMKilled" in str(seen.run.status.message)
    assert names(after(replace(seen, preflight=None))[1]) == ["AddFinalizer", "CreateCluster"]


def test_a_job_that_is_refused_is_given_up_in_the_end() -> None:
    """No right to make one, say: an operator that was upgraded without its roles."""
    seen, decision = after(begin(LOOKS))
    seen = begin(LOOKS)
    instead = refusal(seen, the(CreateJob, decision), "the API server answered 403: no jobs", NOW, CONFIG)
    assert instead is not None
    assert reason_of(instead, ConditionType.CLUSTER_READY) == ("False", Reason.CLUSTER_REFUSED)
    seen = advance(seen, instead)
    seen, decision = after(seen, seconds=SECONDS - 1)
    assert names(decision) == ["AddFinalizer", "CreateJob"]
    seen, decision = after(advance(begin(LOOKS), instead), seconds=SECONDS)
    assert reason_of(decision, ConditionType.PREFLIGHTED) == ("Unknown", Reason.PREFLIGHT_INCOMPLETE)


@pytest.mark.parametrize(
    "spec",
    [{"preflight": {"enabled": False}}, {"checkpoint": {"drainSeconds": 61}}, {"suspend": True}, {"nodePools": []}],
    ids=["switched off", "edited", "suspended", "not valid any more"],
)
def test_a_job_that_nobody_waits_for_is_deleted(spec: Json) -> None:
    seen = looked_at()
    changed = begin({**LOOKS, **spec}).run
    seen = replace(seen, run=replace(seen.run, spec=changed.spec, problems=changed.problems, generation=2))
    seen, decision = after(seen)
    assert names(decision) == ["DeleteJob"]
    seen, _ = after(replace(seen, preflight=None))
    assert seen.run.status.preflight is None


def test_a_run_that_trained_is_not_looked_at_again() -> None:
    """Its cluster was lost: the next one is made at once."""
    seen, _ = after(looked_at(result=PreflightResult(run_uid=UID)))
    known = seen.run.status.model_copy(update={"attempt": 3})
    seen = replace(seen, run=replace(seen.run, status=known), preflight=None)
    assert names(after(seen)[1]) == ["AddFinalizer", "CreateCluster"]
