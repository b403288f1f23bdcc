"""What a run stands on breaks while it trains: node, API server, S3, image registry, namespace."""

import time

import pytest

from dsft_api.conditions import ConditionType, FailureClass
from tests.cluster.kubectl import KubectlError
from tests.cluster.node_layout import NODE
from tests.cluster.operator_install import Install
from tests.e2e.breaking import drain_node, pause, s3_behind_proxy, without_api_server, without_registry, workers
from tests.e2e.conftest import World
from tests.e2e.tenant import Tenant
from tests.e2e.trial import NAME, STEPS, Lines, Trial, classes, losses
from tests.s3_faults import Line

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("disposable")]

OUTAGE_SECONDS = 120.0
# What an overseas bucket may be like.
SLOW = Line(seconds=0.2, bytes_per_second=5e6)
# Enough for the whole outage, in which nothing holds the training up.
LONG_STEPS = 5 * STEPS
AWAY_SECONDS = 15.0
NAMESPACE_SECONDS = 180.0


@pytest.fixture(scope="module")
def disposable(world: World) -> None:
    if not world.cluster.disposable:
        pytest.skip("breaks the cluster itself, which is not ours: unset KUBECONFIG to use the disposable one")


def test_the_node_is_drained_and_comes_back(trial: Trial, reference: Lines, operator: Install) -> None:
    """The run commits before its pods go, waits, says for what, and goes on.

    The operator's pod is evicted as well: Preempted if it heard the driver's last word, else it finds that the head is another.
    """
    trial.begin()
    trial.hit()
    try:
        drain_node(trial.tenant)
        pause(AWAY_SECONDS)
    finally:
        trial.tenant.kubectl("uncordon", NODE)
    operator.wait_ready()
    status = trial.finish("node drained, and back")
    first, second = classes(status)
    assert first in (FailureClass.PREEMPTED, FailureClass.HEAD_LOST)
    assert second is None
    assert trial.steps_lost() == 0
    trial.assert_same_training(reference)


def test_s3_is_down_for_two_minutes(trial: Trial, reference: Lines) -> None:
    """Training goes on until the next save but one, waits for S3, and goes on: nothing is trained twice."""
    with s3_behind_proxy(trial.tenant) as s3:
        trial.begin(edits={"spec.storage": {"endpointUrl": s3.endpoint}})
        trial.hit()
        s3.down_until = time.monotonic() + OUTAGE_SECONDS
        status = trial.finish(f"S3 down for {OUTAGE_SECONDS:.0f} s")
    told = [look.status.message or "" for look in trial.watcher.looks]
    assert any("training waits for a checkpoint to be saved" in message for message in told)
    assert classes(status) == [None]
    assert losses(status.attempts[0]) == []
    assert trial.steps_lost() == 0
    trial.assert_same_training(reference)


def test_s3_is_slow(trial: Trial, reference: Lines) -> None:
    """It takes longer."""
    with s3_behind_proxy(trial.tenant) as s3:
        trial.begin(edits={"spec.storage": {"endpointUrl": s3.endpoint}})
        trial.hit()
        s3.line = SLOW
        status = trial.finish("S3 slow (200 ms, 5 MB/s)")
    assert classes(status) == [None]
    assert losses(status.attempts[0]) == []
    assert trial.steps_lost() == 0
    trial.assert_same_training(reference)


def test_the_api_server_is_down_for_two_minutes(trial: Trial, reference: Lines) -> None:
    """Training goes on, unseen, and is told again afterwards."""
    trial.begin(steps=LONG_STEPS)
    trial.hit()
    without_api_server(lambda: pause(OUTAGE_SECONDS))
    status = trial.finish(f"API server down for {OUTAGE_SECONDS:.0f} s")
    assert classes(status) == [None]
    assert losses(status.attempts[0]) == []
    assert trial.steps_lost() == 0
    trial.assert_same_training(reference)


def test_the_registry_is_down_and_the_image_is_on_the_node(trial: Trial, reference: Lines) -> None:
    """A pod that is lost then comes back as if nothing were."""

    def lose_a_worker() -> None:
        trial.hit()
        trial.tenant.kubectl("delete", "pod", workers(trial.tenant)[0], "--force", "--grace-period=0", "--wait=false")
        trial.until_started_again()

    trial.begin()
    without_registry(lose_a_worker)
    status = trial.finish("registry down, worker pod killed, IfNotPresent")
    assert classes(status) == [None]
    assert losses(status.attempts[0]) == [FailureClass.WORKER_LOST]
    trial.assert_lost_little()
    trial.assert_same_training(reference)


def test_the_registry_is_down_and_must_be_asked(trial: Trial, reference: Lines) -> None:
    """The wait for the image is told with its reason, and ends by itself when the registry is back."""

    def lose_a_worker() -> None:
        trial.hit()
        trial.tenant.kubectl("delete", "pod", workers(trial.tenant)[0], "--force", "--grace-period=0", "--wait=false")
        trial.tenant.until("the wait is told", lambda: _waits_for(trial.tenant) == FailureClass.IMAGE_PULL)
        pause(AWAY_SECONDS)

    trial.begin(edits={"spec.image": {"pullPolicy": "Always"}})
    without_registry(lose_a_worker)
    status = trial.finish("registry down, worker pod killed, Always")
    assert classes(status) == [None]
    assert losses(status.attempts[0]) == [FailureClass.WORKER_LOST]
    trial.assert_lost_little()
    trial.assert_same_training(reference)


def test_the_namespace_is_deleted(trial: Trial) -> None:
    """Everything goes with it; no finalizer of ours keeps it."""
    trial.begin()
    trial.hit()
    trial.tenant.kubectl("delete", "namespace", trial.tenant.namespace, "--wait=false")
    trial.tenant.until("the namespace is gone", lambda: not _exists(trial.tenant), NAMESPACE_SECONDS)
    trial.enter_gone("namespace deleted")


def _waits_for(tenant: Tenant) -> str | None:
    """Why the nodes of the run are not whole; None if they are."""
    ready = tenant.condition(NAME, ConditionType.CLUSTER_READY)
    return None if ready is None or ready.status == "True" else ready.reason


def _exists(tenant: Tenant) -> bool:
    try:
        tenant.kubectl("get", "namespace", tenant.namespace)
    except KubectlError as error:
        if "NotFound" in str(error):
            return False
        raise
    return True
