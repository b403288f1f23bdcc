"""What a pod without GPUs finds before there is a RayCluster: each fault ends its run, named, and no worker pod ever existed.

All runs are applied first: their pods look side by side.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client import CoreV1Api

from dsft_api.conditions import ConditionType, FailureClass, Phase, Reason
from dsft_api.layout import PREFLIGHT_FILE
from tests.cluster.operator_install import S3_SECRET, s3_secret
from tests.e2e.conftest import Tenants
from tests.e2e.followed import dsft
from tests.e2e.manifests import Assets, pool, tiny_run
from tests.e2e.s3 import Bucket
from tests.e2e.tenant import JOB_LABEL, LIST_LIMIT, Tenant, condition_of
from tests.s3_server import READER

NOBODY, READS = "nobody", "reads-only"
NOWHERE = {"dsft.dev/planet": "mars"}
PROVISION_SECONDS = 60
BUILT_IN = ("model", "data", "training", "evaluation", "checkpoint", "tracking")
# Says what was said, and trains on none of it.
NOTHING_TRAINED = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"


@dataclass(frozen=True)
class Found:
    """A run that something is wrong with. The words are in its message, with what to do."""

    name: str
    failure: FailureClass
    words: tuple[str, ...]
    edits: Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A causal-lm and conversations, where pods find them."""

    model: str
    data: str


@pytest.fixture(scope="module")
def chat(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    from tests.trainer import tiny

    folder = tmp_path_factory.mktemp("chat")
    model, data = tiny.llama(folder / "model"), tiny.dataset(folder, "messages", 8)
    return Chat(bucket.upload(model, "assets/chat-model"), bucket.upload(data, "assets/chat.jsonl"))


def rows(bucket: Bucket, chat: Chat) -> dict[str, Found]:
    """Every fault, by name."""
    endpoint = bucket.storage.endpoint

    def keys(secret: str) -> dict[str, Any]:
        return {"uri": bucket.uri, "endpointUrl": endpoint, "credentials": {"secretName": secret}}

    nowhere = {
        "uri": "s3://dsft-no-such-bucket/runs",
        "endpointUrl": endpoint,
        "credentials": {"secretName": S3_SECRET},
    }
    missing = f"{bucket.uri}/assets/missing"
    template = {
        "spec.model": {"uri": chat.model, "task": "causal-lm"},
        "spec.data.train": {"uri": chat.data, "format": "messages"},
        "spec.data.chatTemplate": {"template": NOTHING_TRAINED},
    }
    module = {
        "spec.program": {"entrypoint": "no_such_package.train:main", "config": {}},
        "spec.execution": {"device": "cpu"},
        **dict.fromkeys(f"spec.{part}" for part in BUILT_IN),
    }
    little = {"requests": {"cpu": "100m"}, "limits": {"memory": "32Mi"}}
    denied, data, config = FailureClass.STORAGE_DENIED, FailureClass.DATA_INVALID, FailureClass.CONFIG_INVALID
    all_rows = (
        Found("wrong-key", denied, ("InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"), {"spec.storage": keys(NOBODY)}),
        Found("no-bucket", denied, ("NoSuchBucket", "create the bucket"), {"spec.storage": nowhere}),
        Found("reads-only", denied, ("AccessDenied", "s3:PutObject"), {"spec.storage": keys(READS)}),
        Found("no-model", FailureClass.MODEL_DENIED, (f"{missing} holds no objects",), {"spec.model.uri": missing}),
        Found("no-data", data, (f"{missing} holds no objects",), {"spec.data.train.uri": missing}),
        Found("no-column", data, ("has no column class",), {"spec.data.train.columns": {"label": "class"}}),
        Found("no-target", data, ("nothing to train on",), template),
        Found(
            "small-disk",
            config,
            ("scratch.size is 0.1 MB",),
            {"spec.nodePools": [pool("cpu", 1, scratch={"size": "100Ki"})]},
        ),
        Found(
            "small-shm", config, ("/dev/shm has 33.6 MB",), {"spec.nodePools": [pool("cpu", 1) | {"resources": little}]}
        ),
        Found("no-module", config, ("there is no module no_such_package",), module),
    )
    return {row.name: row for row in all_rows}


NAMES = (
    "wrong-key",
    "no-bucket",
    "reads-only",
    "no-model",
    "no-data",
    "no-column",
    "no-target",
    "small-disk",
    "small-shm",
    "no-module",
)


@pytest.fixture(scope="module", autouse=True)
def looked_at(shared_tenant: Tenant, assets: Assets, bucket: Bucket, chat: Chat) -> dict[str, Found]:
    """All of them, at once."""
    shared_tenant.own_secrets.extend([NOBODY, READS])
    shared_tenant.apply(s3_secret(NOBODY, "nobody", "nobody-secret"))
    shared_tenant.apply(s3_secret(READS, READER.access_key, READER.secret_key))
    found = rows(bucket, chat)
    for row in found.values():
        shared_tenant.apply(_run(row.name, assets, row.edits))
    return found


@pytest.fixture(scope="module", autouse=True)
def waiting(tenants: Tenants, assets: Assets) -> Iterator[Tenant]:
    """A namespace with a run whose pod finds no node: it waits for its deadline while the others look."""
    deadline = {"provisionSeconds": PROVISION_SECONDS}
    with tenants() as tenant:
        tenant.apply(_run("no-node", assets, {"spec.head.nodeSelector": NOWHERE, "spec.deadlines": deadline}))
        tenant.until("it is explained", lambda: "node affinity/selector" in (tenant.status("no-node").message or ""))
        assert [pod["metadata"]["labels"].get(JOB_LABEL, "").startswith("no-node-") for pod in tenant.pods()] == [True]
        yield tenant


def _run(name: str, assets: Assets, edits: Mapping[str, Any]) -> dict[str, Any]:
    return tiny_run(name, assets, steps=6, nodes=1, edits={"spec.preflight": {"enabled": True}, **edits})


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_found_before_there_is_a_worker_pod(
    shared_tenant: Tenant, looked_at: dict[str, Found], name: str
) -> None:
    tenant, row = shared_tenant, looked_at[name]
    status = tenant.until_phase(name, Phase.FAILED)
    told = condition_of(status, ConditionType.PREFLIGHTED)
    assert told is not None
    assert (told.status, told.reason) == ("False", row.failure)
    succeeded = condition_of(status, ConditionType.SUCCEEDED)
    assert succeeded is not None
    assert (succeeded.status, succeeded.reason) == ("False", row.failure)
    assert status.message is not None
    # A wrong key keeps it from the model and the data too: then there are several, numbered.
    for words in ("preflight: ", "spec.", *row.words, "set a new spec.retry.token"):
        assert words in status.message
    assert (status.attempts, status.ray_cluster) == ((), None)
    assert dsft(tenant, "watch", name).returncode == row.failure.failure.exit_code
    (failed,) = [event for event in tenant.events(name) if event["reason"] == "Failed"]
    assert failed["type"] == "Warning"
    tenant.until("nothing of it is left", lambda: not any(name in left for left in tenant.left()))


def test_no_ray_pod_ever_existed(shared_tenant: Tenant, looked_at: dict[str, Found]) -> None:
    """By the Events of the namespace, which tell of every object that was scheduled or pulled an image."""
    for name in looked_at:
        shared_tenant.until_phase(name, Phase.FAILED)
    events = CoreV1Api(shared_tenant.client).list_namespaced_event(shared_tenant.namespace, limit=LIST_LIMIT).items
    about = {(event.involved_object.kind, event.involved_object.name) for event in events}
    assert not [name for kind, name in about if kind == "RayCluster"]
    pods = [name for kind, name in about if kind == "Pod"]
    assert len(pods) == len(looked_at), "one each: a preflight is not tried again"
    assert all("-preflight-" in name for name in pods)


def test_what_was_found_is_mended(tenant: Tenant, assets: Assets, bucket: Bucket, tmp_path: Path) -> None:
    """The corrected Secret is looked at again by retry.token, and the run ends well."""
    name, edits = "mended", {"spec.storage": {"credentials": {"secretName": NOBODY}}}
    tenant.own_secrets.append(NOBODY)
    tenant.apply(s3_secret(NOBODY, "nobody", "nobody-secret"))
    tenant.apply(_run(name, assets, edits))
    tenant.until_phase(name, Phase.FAILED)
    tenant.apply(s3_secret(NOBODY, tenant.storage.access_key, tenant.storage.secret_key))
    tenant.patch(name, retry={"token": "the key is right now"})
    tenant.until("the token is seen", lambda: tenant.status(name).retry_token == "the key is right now")
    status = tenant.until_phase(name, Phase.SUCCEEDED)
    told = condition_of(status, ConditionType.PREFLIGHTED)
    assert told is not None
    assert (told.status, told.reason) == ("True", Reason.PREFLIGHT_PASSED)
    assert [(a.number, a.failure_class) for a in status.attempts] == [(1, None)]
    assert b'"sample": "' in (tenant.store(name).get_bytes(PREFLIGHT_FILE) or b"")
    tenant.until_nothing_left()


def test_a_pod_that_finds_no_node_is_explained(waiting: Tenant) -> None:
    """Like every other wait, and within the same deadline."""
    tenant = waiting
    status = tenant.until_phase("no-node", Phase.FAILED)
    assert "ProvisionTimeout" in (status.message or "")
    assert "Unschedulable: preflight: no-node-" in (status.message or "")
    assert status.ray_cluster is None
    tenant.until_nothing_left()
