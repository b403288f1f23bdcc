"""Runs under Kueue on a whole cluster: they take turns, and give their nodes to a higher priority without losing a step."""

from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes.client import ApiClient

from dsft_api.conditions import ConditionType, FailureClass, Phase, Reason
from dsft_api.status import FineTuneStatus
from tests.cluster.kueue.manager import Kueue, start_kueue
from tests.cluster.kueue.queues import Flavor, Queues
from tests.e2e.conftest import World
from tests.e2e.manifests import Assets, pool, tiny_run
from tests.e2e.tenant import Tenant, seconds_between
from tests.e2e.trial import NAME, Lines, Trial, classes

pytestmark = pytest.mark.fault

# Two runs of a head and two workers want 1.4.
ANY_NODE = Flavor("any-node", {"cpu": "1"})
SHORT_STEPS = 60


@pytest.fixture(scope="module")
def kueue(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kueue]:
    if not world.cluster.disposable:
        pytest.skip("starts a Kueue of its own on this machine: unset KUBECONFIG to use the disposable cluster")
    kueue = start_kueue(world.kubectl, tmp_path_factory.mktemp("kueue"))
    yield kueue
    kueue.stop()


@pytest.fixture
def queues(kueue: Kueue, client: ApiClient, tenant: Tenant) -> Queues:
    queues = Queues(client, tenant.namespace)
    queues.prepare(ANY_NODE)
    return queues


def in_queue(priority: str | None = None) -> dict[str, Any]:
    """The edit that puts a run into the queue."""
    return {"spec.queue": {"name": "team-a", **({"priorityClass": priority} if priority else {})}}


def waits(tenant: Tenant, name: str) -> str:
    """Why it waits, and its words."""
    ready = tenant.condition(name, ConditionType.CLUSTER_READY)
    return f"{ready.reason}: {ready.message}" if ready is not None and ready.status == "False" else ""


def test_two_runs_take_turns_and_a_third_never_fits(tenant: Tenant, queues: Queues, assets: Assets) -> None:
    tenant.apply(tiny_run("first", assets, steps=SHORT_STEPS, edits=in_queue()))
    tenant.until_step("first", 1)
    tenant.apply(tiny_run("second", assets, steps=SHORT_STEPS, edits=in_queue()))
    pools = [pool("cpu", 2, resources={"requests": {"cpu": "4"}})]
    tenant.apply(tiny_run("huge", assets, steps=SHORT_STEPS, edits={**in_queue(), "spec.nodePools": pools}))
    tenant.until("the second waits", lambda: "insufficient unused quota for cpu" in waits(tenant, "second"))
    tenant.until("the third waits in vain", lambda: waits(tenant, "huge").startswith(Reason.NEVER_FITS))
    told = {name: waits(tenant, name) for name in ("second", "huge")}
    assert tenant.status("second").phase is Phase.QUEUED
    assert told["second"].startswith(Reason.QUEUED)
    print("\n".join(told.values()))

    first = tenant.until_phase("first", Phase.SUCCEEDED)
    tenant.until("the second is admitted", lambda: tenant.status("second").phase is not Phase.QUEUED)
    admitted = tenant.status("second").phase_time
    second = tenant.until_phase("second", Phase.SUCCEEDED)
    for status in (first, second):
        assert classes(status) == [None]
    print(f"admitted {seconds_between(ended(first), admitted):.0f} s after the first had ended")
    assert seconds_between(ended(first), second.attempts[0].start_time) > 0
    tenant.delete("huge")
    tenant.until_nothing_left()
    tenant.until("the quota is free", lambda: queues.used("cpu") == "0")


def test_a_higher_priority_takes_the_nodes_for_a_while(
    trial: Trial, queues: Queues, assets: Assets, reference: Lines
) -> None:
    """The run commits before its pods go, waits, and goes on with the next step on the same RayCluster."""
    tenant = trial.tenant
    # Nothing failed, so no retry is needed.
    trial.begin(edits={**in_queue("low"), "spec.retry": {"limit": 0}})
    before = tenant.status(NAME).ray_cluster
    trial.hit()
    tenant.apply(tiny_run("urgent", assets, steps=SHORT_STEPS, edits=in_queue("high")))
    tenant.until("the run is queued", lambda: tenant.status(NAME).phase is Phase.QUEUED)
    tenant.until("it is told why", lambda: "waiting here: Preempted" in waits(tenant, NAME))
    print(waits(tenant, NAME))
    urgent = tenant.until_phase("urgent", Phase.SUCCEEDED)
    status = trial.finish("preempted by a higher priority (Kueue)")
    assert classes(urgent) == [None]
    assert classes(status) == [FailureClass.PREEMPTED, None]
    assert trial.steps_lost() == 0
    assert status.retries == 0
    after = status.ray_cluster
    assert before is not None
    assert after is not None
    assert (after.uid, after.incarnation) == (before.uid, 1)
    assert after.session != before.session
    assert status.attempts[1].from_step == status.attempts[0].to_step
    print(f"{status.attempts[0].message}\nwaited {status.usage.waiting_seconds if status.usage else None} s in all")
    trial.assert_same_training(reference)


def ended(status: FineTuneStatus) -> Any:
    assert status.completion_time is not None
    return status.completion_time
