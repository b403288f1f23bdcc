"""The RayCluster beside its pods: queues, what calls for another one, and who reaches it."""

from typing import Any

import pytest

from dsft_operator.adapters.reading import run_of
from dsft_operator.core.raycluster import network_policy, template_digest
from tests.unit.operator.built import allowing, manifest, pool
from tests.unit.operator.situations import CONFIG, resource

Json = dict[str, Any]


def test_a_queue_is_a_label_and_a_suspended_start() -> None:
    made = manifest({"queue": {"name": "team-a", "priorityClass": "high"}})
    assert made["spec"]["suspend"] is True
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert made["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert "suspend" not in manifest()["spec"]


# The labels by which KubeRay's batch schedulers know queue and priority, and with YuniKorn also the gang.
SCHEDULERS: dict[str, Json] = {
    "volcano": {"volcano.sh/queue-name": "team-a", "ray.io/priority-class-name": "high"},
    "kai": {"kai.scheduler/queue": "team-a", "priorityClassName": "high"},
    "yunikorn": {
        "yunikorn.apache.org/queue": "team-a",
        "yunikorn.apache.org/app-id": "chat-0a1b2",
        "ray.io/gang-scheduling-enabled": "true",
    },
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_batch_scheduler_is_told_by_labels_alone(scheduler: str) -> None:
    priority = {} if scheduler == "yunikorn" else {"priorityClass": "high"}
    made = manifest({"queue": {"name": "team-a", "scheduler": scheduler, **priority}}, allowing(queueSchedulers=["*"]))
    assert "suspend" not in made["spec"]
    labels = made["metadata"]["labels"].items()
    assert labels - manifest()["metadata"]["labels"].items() == SCHEDULERS[scheduler].items()


# what is changed, whether it takes other pods
CHANGES: dict[str, tuple[Json, bool]] = {
    "another node selector": (pool(nodeSelector={"a": "b"}), True),
    "another image": ({"image": {"trainer": "x:2"}}, True),
    "another queue": ({"queue": {"name": "team-b"}}, True),
    "a longer drain": ({"checkpoint": {"drainSeconds": 61}}, True),
    "more retries": ({"retry": {"limit": 9}}, False),
    "another micro batch": ({"execution": {"microBatchSize": 2}}, False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_takes_another_cluster(name: str) -> None:
    spec, other = CHANGES[name]
    digests: set[str] = set()
    for written in (None, spec):
        run = run_of(resource(written), CONFIG)
        assert run.spec is not None
        digests.add(template_digest(run, run.spec, CONFIG))
    assert (len(digests) == 2) is other


def test_only_the_run_and_the_operator_reach_ray() -> None:
    run = run_of(resource(), CONFIG)
    policy = network_policy(run, CONFIG, "chat-1", "uid-1")
    own, operator = policy["spec"]["ingress"]
    assert (
        policy["spec"]["podSelector"] == own["from"][0]["podSelector"] == {"matchLabels": {"ray.io/cluster": "chat-1"}}
    )
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert operator["from"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] == "dsft-system"
    assert policy["metadata"]["ownerReferences"][0]["uid"] == "uid-1"


def test_prometheus_reads_metrics_and_nothing_else() -> None:
    config = CONFIG.model_copy(update={"monitoring_namespaces": ("monitoring",)})
    *_, prometheus = network_policy(run_of(resource(), config), config, "chat-1", "uid-1")["spec"]["ingress"]
    assert prometheus == {
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "ports": [{"protocol": "TCP", "port": 8080}],
    }
