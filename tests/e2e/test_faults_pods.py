"""Pods and processes of a run, or the operator's own, are lost while it trains."""

import pytest

from dsft_api.conditions import FailureClass
from tests.cluster.operator_install import NAME as OPERATOR
from tests.cluster.operator_install import Install
from tests.e2e.breaking import eat_memory, hold, stop_a_rank, workers
from tests.e2e.manifests import pool
from tests.e2e.test_host_memory import WAYS
from tests.e2e.trial import NAME, STEPS, Lines, Trial, classes, losses

pytestmark = pytest.mark.fault

AT_ONCE = ("--force", "--grace-period=0", "--wait=false")
# Longer than what a start of a rank does in one piece on a busy machine.
STALL_SECONDS = 60
# A rank with torch needs 1 GiB; the rest is for what eats it.
MEMORY = "3Gi"


def test_a_worker_pod_is_deleted(trial: Trial, reference: Lines) -> None:
    """It commits before it goes: no step is lost, and the next attempt is another pod's."""
    trial.begin()
    trial.hit()
    trial.tenant.kubectl("delete", "pod", workers(trial.tenant)[0], "--wait=false")
    status = trial.finish("worker pod deleted")
    assert classes(status) == [FailureClass.PREEMPTED, None]
    assert trial.steps_lost() == 0
    assert status.ray_cluster is not None
    assert status.ray_cluster.incarnation == 1
    trial.assert_same_training(reference)


def test_a_worker_pod_is_killed(trial: Trial, reference: Lines) -> None:
    """Without its farewell: the ranks start again inside the attempt."""
    trial.begin()
    trial.hit()
    trial.tenant.kubectl("delete", "pod", workers(trial.tenant)[0], *AT_ONCE)
    status = trial.finish("worker pod killed (no grace)")
    assert classes(status) == [None]
    assert losses(status.attempts[0]) == [FailureClass.WORKER_LOST]
    trial.assert_lost_little()
    trial.assert_same_training(reference)


def test_the_head_pod_is_deleted(trial: Trial, reference: Lines) -> None:
    """It commits too, though driver and Ray go with it: Preempted if the driver's last word was heard, else the head is lost."""
    trial.begin()
    trial.hit()
    trial.tenant.kubectl("delete", "pod", trial.tenant.head(NAME), "--wait=false")
    status = trial.finish("head pod deleted")
    first, second = classes(status)
    assert first in (FailureClass.PREEMPTED, FailureClass.HEAD_LOST)
    assert second is None
    assert trial.steps_lost() == 0
    assert status.ray_cluster is not None
    assert status.ray_cluster.incarnation == 1
    trial.assert_same_training(reference)


def test_the_head_pod_is_killed(trial: Trial, reference: Lines) -> None:
    """Driver, Ray and the last words are gone: the next attempt is on the same RayCluster, with another session."""
    trial.begin()
    trial.hit()
    trial.tenant.kubectl("delete", "pod", trial.tenant.head(NAME), *AT_ONCE)
    status = trial.finish("head pod killed (no grace)")
    assert classes(status) == [FailureClass.HEAD_LOST, None]
    trial.assert_lost_little()
    assert status.ray_cluster is not None
    assert status.ray_cluster.incarnation == 1
    trial.assert_same_training(reference)


def test_the_operator_pod_is_deleted(trial: Trial, reference: Lines, operator: Install) -> None:
    """Nobody who trains notices."""
    trial.begin()
    trial.hit()
    operator.kubectl("delete", "pod", f"--selector=app.kubernetes.io/name={OPERATOR}")
    operator.wait_ready()
    status = trial.finish("operator pod deleted")
    assert classes(status) == [None]
    assert losses(status.attempts[0]) == []
    assert trial.steps_lost() == 0
    trial.assert_same_training(reference)


def test_a_rank_hangs(trial: Trial, reference: Lines) -> None:
    """SIGSTOP: its peer waits in vain, says so, and the ranks start again inside the attempt."""
    trial.begin(edits={"spec.deadlines": {"stallSeconds": STALL_SECONDS}})
    trial.hit()
    stop_a_rank(trial.tenant, workers(trial.tenant)[1])
    status = trial.finish(f"a rank stopped (SIGSTOP), stallSeconds {STALL_SECONDS}")
    assert classes(status) == [None]
    assert losses(status.attempts[0]) == [FailureClass.HANG]
    trial.assert_lost_little()
    trial.assert_same_training(reference)


@pytest.mark.parametrize("way", WAYS)
def test_memory_runs_out_in_a_worker_pod(trial: Trial, reference: Lines, way: str) -> None:
    """Something else in the pod takes it, once. Ray's monitor or the kernel kills the rank: one more attempt, which ends well."""
    pools = [pool("cpu", 2, resources={"requests": {"cpu": "250m"}, "limits": {"memory": MEMORY}})]
    # Eating takes half a minute.
    trial.begin(steps=4 * STEPS, edits={"spec.nodePools": pools, **WAYS[way]})
    trial.hit()
    eat_memory(trial.tenant, workers(trial.tenant)[0])
    status = trial.finish(f"memory ran out in a worker pod ({way})")
    assert classes(status) == [FailureClass.HOST_OOM, None]
    trial.assert_lost_little()
    trial.assert_same_training(reference)


def test_a_node_dies_and_its_pod_never_ends(trial: Trial, reference: Lines) -> None:
    """The run goes on with another RayCluster, since KubeRay makes no pod in place of one that still terminates.

    There is one node, so a finalizer has the pod stay: as with a kubelet that is gone, no one confirms its end.
    """
    trial.begin()
    pod = workers(trial.tenant)[0]
    hold(trial.tenant, pod, held=True)
    try:
        trial.hit()
        trial.tenant.kubectl("delete", "pod", pod, *AT_ONCE)
        trial.until_started_again()
        assert pod in [each["metadata"]["name"] for each in trial.tenant.pods()]
    finally:
        hold(trial.tenant, pod, held=False)
    status = trial.finish("dead node: worker pod never ends")
    assert classes(status) == [FailureClass.WORKER_LOST, None]
    assert status.ray_cluster is not None
    assert status.ray_cluster.incarnation == 2
    trial.assert_lost_little()
    trial.assert_same_training(reference)
