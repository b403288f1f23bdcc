"""What can be wrong with a run: each ends in the right phase, class and message, in time, and lets its pods go.

All are applied at once, since most of what they do is wait; each test then looks at one of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from dsft_api.conditions import ConditionType, FailureClass, Phase, Reason
from dsft_api.not_supported import NOT_BUILT
from dsft_api.status import Condition, FineTuneStatus
from tests.cluster.operator_install import s3_secret
from tests.e2e.manifests import Assets, tiny_run
from tests.e2e.s3 import Bucket
from tests.e2e.tenant import START_SECONDS, Tenant, condition_of, seconds_between

PROVISION_SECONDS = 60
# Beyond the deadline: looks of the operator, and a machine whose cores are busy.
MARGIN_SECONDS = 60
WRONG_KEY_SECRET = "wrong-key"


@dataclass(frozen=True)
class Never:
    """A run whose pods never start. `waits` is why, by ClusterReady; the words are those of whoever says no."""

    name: str
    waits: str
    words: tuple[str, ...]
    edits: Mapping[str, Any]


@dataclass(frozen=True)
class Fails:
    """A run whose trainer gives up. The words are in the message."""

    name: str
    failure: FailureClass
    words: tuple[str, ...]
    edits: Mapping[str, Any] = field(default_factory=dict[str, Any])
    removes: tuple[str, ...] = ()


NEVER = (
    Never(
        "no-image",
        FailureClass.IMAGE_PULL,
        ("the head is not ready", "registry.invalid/dsft-trainer:none"),
        {"spec.image": {"trainer": "registry.invalid/dsft-trainer:none"}},
    ),
    Never(
        "no-node",
        FailureClass.UNSCHEDULABLE,
        ("pool far has 0 of 1 pods ready", "node affinity/selector"),
        {"spec.nodePools": [{"name": "far", "nodes": 1, "nodeSelector": {"dsft.dev/planet": "mars"}}]},
    ),
    Never(
        "no-secret",
        Reason.POD_CONFIG_INVALID,
        ('secret "nobody-made-it" not found',),
        {"spec.storage": {"credentials": {"secretName": "nobody-made-it"}}},
    ),
)


def failing(bucket: Bucket) -> tuple[Fails, ...]:
    """The rows that need the bucket's address."""
    nowhere = {
        "uri": "s3://dsft-no-such-bucket/runs",
        "endpointUrl": bucket.storage.endpoint,
        "credentials": {"secretName": "s3"},
    }
    return (
        Fails(
            "wrong-key",
            FailureClass.STORAGE_DENIED,
            ("InvalidAccessKeyId", bucket.uri),
            {"spec.storage": {"credentials": {"secretName": WRONG_KEY_SECRET}}},
        ),
        Fails("no-bucket", FailureClass.STORAGE_DENIED, ("dsft-no-such-bucket",), {"spec.storage": nowhere}),
        Fails(
            "no-data",
            FailureClass.DATA_INVALID,
            (f"{bucket.uri}/assets/missing.jsonl",),
            {"spec.data.train.uri": f"{bucket.uri}/assets/missing.jsonl"},
        ),
        Fails(
            "user-code",
            FailureClass.USER_CODE,
            ("the JSON object must be str, bytes or bytearray",),
            {"spec.program": {"entrypoint": "json:loads", "config": {}}},
            removes=("model", "data", "training"),
        ),
    )


FAILS = ("wrong-key", "no-bucket", "no-data", "user-code")
PROGRAM_IS_BUILT = all(row.path != "program" for row in NOT_BUILT)


@pytest.fixture(scope="module")
def applied(shared_tenant: Tenant, assets: Assets, bucket: Bucket) -> Iterator[dict[str, Fails]]:
    """All of them, at once. One worker each: the machine is small."""
    tenant = shared_tenant
    tenant.own_secrets.append(WRONG_KEY_SECRET)
    tenant.apply(s3_secret(WRONG_KEY_SECRET, "nobody", "nobody-secret"))
    rows = {row.name: row for row in failing(bucket)}
    for row in rows.values():
        if row.name == "user-code" and not PROGRAM_IS_BUILT:
            continue
        manifest = tiny_run(row.name, assets, steps=6, nodes=1, edits=row.edits)
        for part in row.removes:
            del manifest["spec"][part]
        tenant.apply(manifest)
    for never in NEVER:
        deadline = {"spec.deadlines": {"provisionSeconds": PROVISION_SECONDS}}
        tenant.apply(tiny_run(never.name, assets, steps=6, nodes=1, edits={**never.edits, **deadline}))
    return rows


@pytest.mark.parametrize("row", NEVER, ids=lambda row: row.name)
def test_pods_that_never_start(shared_tenant: Tenant, applied: dict[str, Fails], row: Never) -> None:
    """The wait is explained in the words of who says no; the deadline ends it, and the words stay."""
    tenant, name = shared_tenant, row.name
    waits: set[str] = set()

    def failed() -> bool:
        status = tenant.status(name)
        ready = condition_of(status, ConditionType.CLUSTER_READY)
        waits.update({ready.reason} if ready else ())
        return status.phase is Phase.FAILED

    tenant.until(f"{name} is Failed", failed)
    status = tenant.status(name)
    assert row.waits in waits
    succeeded = _why(status)
    assert succeeded.reason == FailureClass.PROVISION_TIMEOUT
    for word in (f"not provisioned within {PROVISION_SECONDS} s", row.waits, *row.words):
        assert word in succeeded.message
    created = tenant.resource(name)["metadata"]["creationTimestamp"]
    took = seconds_between(created, status.completion_time)
    assert PROVISION_SECONDS <= took <= PROVISION_SECONDS + MARGIN_SECONDS
    _assert_let_go(tenant, name)


@pytest.mark.parametrize("name", FAILS)
def test_trainers_that_give_up(shared_tenant: Tenant, applied: dict[str, Fails], name: str) -> None:
    """Not retried, since it would be the same again: Failed at once, with what happened and what to do."""
    if name == "user-code" and not PROGRAM_IS_BUILT:
        pytest.skip("spec.program is not built")
    tenant, row = shared_tenant, applied[name]
    tenant.until(f"{name} is Failed", lambda: tenant.status(name).phase is Phase.FAILED)
    status = tenant.status(name)
    why = _why(status)
    assert why.reason == row.failure
    for word in (*row.words, row.failure.failure.remedy.partition(":")[0]):
        assert word in why.message
    (attempt,) = status.attempts
    assert attempt.failure_class is row.failure
    assert attempt.exit_code == row.failure.failure.exit_code
    assert attempt.message
    _assert_let_go(tenant, name)


def test_a_new_token_goes_on_once_the_key_is_right(shared_tenant: Tenant, applied: dict[str, Fails]) -> None:
    """retry.token after Failed: the corrected Secret reaches new pods, and the run ends well at its second attempt."""
    tenant, name = shared_tenant, "wrong-key"
    tenant.until("wrong-key is Failed", lambda: tenant.status(name).phase is Phase.FAILED)
    storage = tenant.storage
    tenant.apply(s3_secret(WRONG_KEY_SECRET, storage.access_key, storage.secret_key))
    tenant.patch(name, retry={"token": "the key is right now"})
    tenant.until("the token is seen", lambda: tenant.status(name).retry_token == "the key is right now")
    status = tenant.until_phase(name, Phase.SUCCEEDED, START_SECONDS)
    assert [(a.number, a.failure_class) for a in status.attempts] == [(1, FailureClass.STORAGE_DENIED), (2, None)]
    assert status.ray_cluster is not None
    assert status.ray_cluster.incarnation == 2


def _why(status: FineTuneStatus) -> Condition:
    """The condition Succeeded of a run that failed; the others and the message say the same."""
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
    assert tenant.status(name).phase is Phase.FAILED
    warnings = [event for event in tenant.events(name) if event["type"] == "Warning"]
    assert [event["reason"] for event in warnings] == ["Failed"]
    assert warnings[0]["message"] == _why(tenant.status(name)).message[:1024]
