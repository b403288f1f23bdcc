"""What can be wrong with a run: each ends in the right phase, class and message, in time, and lets its pods go.

All are applied first, at once: some wait for their deadline while the trainers of the others fail.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from dsft_api.conditions import ConditionType, FailureClass, Phase, Reason
from dsft_api.status import Condition, FineTuneStatus
from tests.cluster.operator_install import S3_SECRET, s3_secret
from tests.e2e.manifests import Assets, pool, tiny_run
from tests.e2e.s3 import Bucket
from tests.e2e.tenant import Tenant, condition_of, seconds_between

PROVISION_SECONDS = 60
# Beyond the deadline: looks of the operator, and a machine whose cores are busy.
MARGIN_SECONDS = 60
MINE = "mine"
WRONG_KEY = "wrong-key"
NOWHERE = {"dsft.dev/planet": "mars"}


@dataclass(frozen=True)
class Never:
    """A run whose pods never start. `waits` is why, by ClusterReady; the words are those of whoever says no."""

    name: str
    waits: str
    words: tuple[str, ...]
    edits: Mapping[str, Any]


@dataclass(frozen=True)
class Fails:
    """A run whose trainer gives up. The words are in the message, with what to do."""

    name: str
    failure: FailureClass
    words: tuple[str, ...]
    edits: Mapping[str, Any]


NEVER = (
    Never(
        "no-image",
        FailureClass.IMAGE_PULL,
        ("the head is not ready", "registry.invalid/dsft-trainer:none", "check spec.image.trainer"),
        {"spec.image": {"trainer": "registry.invalid/dsft-trainer:none"}},
    ),
    Never(
        "no-node",
        FailureClass.UNSCHEDULABLE,
        ("pool far has 0 of 2 pods ready", "node affinity/selector", "check spec.nodePools"),
        {
            "spec.nodePools": [pool("far", 2, nodeSelector=NOWHERE)],
            "spec.head.nodeSelector": NOWHERE,
        },
    ),
    Never(
        "no-secret",
        Reason.POD_CONFIG_INVALID,
        ('secret "nobody-made-it" not found', "make the Secret"),
        {"spec.storage": {"credentials": {"secretName": "nobody-made-it"}}},
    ),
)


def failing(bucket: Bucket) -> dict[str, Fails]:
    """The rows that need the bucket's address, by name."""
    nowhere = {
        "uri": "s3://dsft-no-such-bucket/runs",
        "endpointUrl": bucket.storage.endpoint,
        "credentials": {"secretName": S3_SECRET},
    }
    missing = f"{bucket.uri}/assets/missing.jsonl"
    rows = (
        Fails(
            "no-bucket",
            FailureClass.STORAGE_DENIED,
            ("s3://dsft-no-such-bucket/runs", "NoSuchBucket", "create the bucket"),
            {"spec.storage": nowhere},
        ),
        Fails("no-data", FailureClass.DATA_INVALID, (missing, "check the URI"), {"spec.data.train.uri": missing}),
        Fails(
            "user-code",
            FailureClass.USER_CODE,
            ("the JSON object must be str, bytes or bytearray", "correct the program"),
            {
                "spec.program": {"entrypoint": "json:loads", "config": {}},
                "spec.execution": {"device": "cpu"},
                **dict.fromkeys(
                    f"spec.{part}" for part in ("model", "data", "training", "evaluation", "checkpoint", "tracking")
                ),
            },
        ),
        Fails(
            WRONG_KEY,
            FailureClass.STORAGE_DENIED,
            ("InvalidAccessKeyId", bucket.uri, "correct AWS_ACCESS_KEY_ID"),
            {"spec.storage": {"credentials": {"secretName": MINE}}},
        ),
    )
    return {row.name: row for row in rows}


@pytest.fixture(scope="module", autouse=True)
def applied(shared_tenant: Tenant, assets: Assets, bucket: Bucket) -> dict[str, Fails]:
    """All of them, at once; those whose trainers give up."""
    shared_tenant.own_secrets.append(MINE)
    shared_tenant.apply(s3_secret(MINE, "nobody", "nobody-secret"))
    deadline = {"spec.deadlines": {"provisionSeconds": PROVISION_SECONDS}}
    for row in NEVER:
        shared_tenant.apply(tiny_run(row.name, assets, steps=6, nodes=1, edits={**row.edits, **deadline}))
    rows = failing(bucket)
    for row in rows.values():
        shared_tenant.apply(tiny_run(row.name, assets, steps=6, nodes=1, edits=row.edits))
    return rows


@pytest.mark.parametrize("name", ["no-bucket", "no-data", "user-code"])
def test_a_trainer_that_gives_up(shared_tenant: Tenant, applied: dict[str, Fails], name: str) -> None:
    """Not retried, since it would be the same again: Failed at once, with what happened and what to do."""
    _assert_failed(shared_tenant, applied[name])


def test_a_new_token_goes_on_once_the_key_is_right(shared_tenant: Tenant, applied: dict[str, Fails]) -> None:
    """A wrong S3 key is Failed; the corrected Secret reaches new pods by retry.token, and the run ends well."""
    tenant, name = shared_tenant, WRONG_KEY
    _assert_failed(tenant, applied[name])

    tenant.apply(s3_secret(MINE, tenant.storage.access_key, tenant.storage.secret_key))
    tenant.patch(name, retry={"token": "the key is right now"})
    tenant.until("the token is seen", lambda: tenant.status(name).retry_token == "the key is right now")
    status = tenant.until_phase(name, Phase.SUCCEEDED)
    assert [(a.number, a.failure_class) for a in status.attempts] == [(1, FailureClass.STORAGE_DENIED), (2, None)]
    assert status.ray_cluster is not None
    assert status.ray_cluster.incarnation == 2


@pytest.mark.parametrize("row", NEVER, ids=lambda row: row.name)
def test_pods_that_never_start(shared_tenant: Tenant, row: Never) -> None:
    """The wait is explained in the words of who says no; the deadline ends it, and the words stay."""
    tenant, name = shared_tenant, row.name
    status = tenant.until_phase(name, Phase.FAILED)
    ready, why = condition_of(status, ConditionType.CLUSTER_READY), _why(status)
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", row.waits)
    assert why.reason == FailureClass.PROVISION_TIMEOUT
    for words in (f"not provisioned within {PROVISION_SECONDS} s", row.waits, *row.words):
        assert words in why.message
    assert status.attempts == (), "nothing was submitted"
    created = tenant.resource(name)["metadata"]["creationTimestamp"]
    assert PROVISION_SECONDS <= seconds_between(created, status.completion_time) <= PROVISION_SECONDS + MARGIN_SECONDS
    _assert_let_go(tenant, name)
    told = {event["reason"] for event in tenant.events(name) if event["type"] == "Warning"}
    assert {row.waits, "Failed"} <= told, "the wait was told while it lasted"


def _assert_failed(tenant: Tenant, row: Fails) -> None:
    status = tenant.until_phase(row.name, Phase.FAILED)
    why = _why(status)
    assert why.reason == row.failure
    for words in row.words:
        assert words in why.message
    (attempt,) = status.attempts
    assert attempt.failure_class is row.failure
    assert attempt.exit_code == row.failure.failure.exit_code
    assert attempt.message is not None
    assert row.words[0] in attempt.message
    _assert_let_go(tenant, row.name)


def _why(status: FineTuneStatus) -> Condition:
    """The condition Succeeded of a run that failed; Stalled and the message say the same."""
    succeeded = condition_of(status, ConditionType.SUCCEEDED)
    stalled = condition_of(status, ConditionType.STALLED)
    assert succeeded is not None
    assert succeeded.status == "False"
    assert stalled is not None
    assert (stalled.status, stalled.reason) == ("True", succeeded.reason)
    assert status.message == succeeded.message
    return succeeded


def _assert_let_go(tenant: Tenant, name: str) -> None:
    """Nothing of the run is there any more; that it failed, and why, still is: in the status and as an Event."""
    cluster = tenant.status(name).ray_cluster
    assert cluster is not None
    tenant.until(f"{cluster.name} is gone", lambda: not any(cluster.name in left for left in tenant.left()))
    status = tenant.status(name)
    assert status.phase is Phase.FAILED
    (failed,) = [event for event in tenant.events(name) if event["reason"] == "Failed"]
    assert (failed["type"], failed["message"]) == ("Warning", _why(status).message[:1024])
