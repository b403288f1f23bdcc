"""Two replicas as processes on a real API server: the one that acts is killed, frozen, cut off, or ended cleanly.

With the times that users have: another one acts within 20 s, and nothing is done twice.
"""

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from kubernetes.client import ApiException, CoordinationV1Api, CoreV1Api

from dsft_api import KIND
from dsft_operator.config import OperatorConfig
from dsft_operator.install import NAMESPACE
from tests.apiserver.blackhole import Way
from tests.apiserver.scene import Operator, Scene

pytestmark = pytest.mark.timeout(300)

LEASE = OperatorConfig().leader_election.lease_name
FAILOVER_SECONDS = 20.0


@dataclass
class Replicas:
    """`a` acts, `b` stands by. `a` has a way of its own to the API server."""

    scene: Scene
    a: Operator
    b: Operator
    way: Way

    def holder(self) -> str:
        try:
            lease = CoordinationV1Api(self.scene.api.client).read_namespaced_lease(LEASE, NAMESPACE)
        except ApiException as answer:
            if answer.status != 404:
                raise
            return ""
        return lease.spec.holder_identity or ""

    def until_b_acts(self) -> float:
        """Seconds until `b` holds the Lease, and has answered a run that was made meanwhile."""
        began = time.monotonic()
        other = replace(self.scene, name="other")
        other.apply(suspend=True)
        other.until("b acts", lambda: other.status().get("phase") == "Suspended")
        assert self.holder() == "b"
        return time.monotonic() - began

    def assert_nothing_was_done_twice(self) -> None:
        """The run that was under way ends with one submission, one attempt, one RayCluster, and each Event once."""
        self.scene.head.hold = False
        self.scene.until_phase("Succeeded")
        assert self.scene.status()["attempt"] == 1
        assert self.scene.status()["rayCluster"]["incarnation"] == 1
        assert len(self.scene.head.posts) == 1
        events = CoreV1Api(self.scene.api.client).list_namespaced_event(self.scene.runs.namespace).items
        about = [event for event in events if event.involved_object.kind == KIND]
        told = Counter((event.involved_object.name, event.reason) for event in about)
        assert set(told.values()) == {1}, told


@pytest.fixture
def replicas(scene: Scene, kuberay: None, tmp_path: Path) -> Iterator[Replicas]:
    way = Way.to(scene.operator.kubeconfig, tmp_path)
    a, b = _replica(scene, "a", way.kubeconfig, tmp_path), _replica(scene, "b", scene.operator.kubeconfig, tmp_path)
    pair = Replicas(scene, a, b, way)
    scene.operator = pair.b  # whose log a failure shows
    pair.a.start()
    scene.until("a leads", lambda: pair.holder() == "a")
    pair.b.start()
    scene.until("b is up", lambda: "serving" in pair.b.log())
    yield pair
    way.mend()
    for operator in (a, b):
        assert operator.process is not None
        operator.process.send_signal(signal.SIGCONT)
        operator.kill()
    way.close()
    CoordinationV1Api(scene.api.client).delete_namespaced_lease(LEASE, NAMESPACE)


def _replica(scene: Scene, name: str, kubeconfig: Path, folder: Path) -> Operator:
    (folder / name).mkdir()
    options, environment = {"leaderElection": {"enabled": True}}, {"POD_NAME": name}
    return replace(
        scene.operator, folder=folder / name, kubeconfig=kubeconfig, options=options, environment=environment
    )


def begin(replicas: Replicas) -> None:
    """A run under way."""
    scene = replicas.scene
    scene.head.hold = True
    scene.apply()
    scene.until("running", lambda: (scene.status().get("job") or {}).get("state") == "RUNNING")


def send(operator: Operator, number: signal.Signals) -> None:
    assert operator.process is not None
    operator.process.send_signal(number)


FAULTS: dict[str, Callable[[Replicas], None]] = {
    "killed": lambda replicas: send(replicas.a, signal.SIGKILL),
    "frozen": lambda replicas: send(replicas.a, signal.SIGSTOP),
    "cut off": lambda replicas: replicas.way.cut(),
}
MENDS: dict[str, Callable[[Replicas], None]] = {
    "killed": lambda replicas: replicas.a.start(),
    "frozen": lambda replicas: send(replicas.a, signal.SIGCONT),
    "cut off": lambda replicas: replicas.way.mend(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_standby_takes_over(replicas: Replicas, fault: str) -> None:
    begin(replicas)
    FAULTS[fault](replicas)
    assert replicas.until_b_acts() < FAILOVER_SECONDS
    MENDS[fault](replicas)
    replicas.assert_nothing_was_done_twice()
    assert replicas.holder() == "b"
    if fault != "killed":
        replicas.scene.until("a stands by", lambda: "does not lead any more" in replicas.a.log())


def test_a_clean_end_hands_over_at_once(replicas: Replicas) -> None:
    begin(replicas)
    send(replicas.a, signal.SIGTERM)
    assert replicas.until_b_acts() < 10.0
    assert replicas.a.process is not None
    assert replicas.a.process.wait(30) == 0
    replicas.assert_nothing_was_done_twice()


def test_a_leader_that_was_cut_off_can_lead_again(replicas: Replicas) -> None:
    begin(replicas)
    replicas.way.cut()
    replicas.until_b_acts()
    replicas.way.mend()
    replicas.scene.until("a stands by", lambda: "does not lead any more" in replicas.a.log())
    send(replicas.b, signal.SIGTERM)
    replicas.scene.until("a leads again", lambda: replicas.holder() == "a")
    replicas.assert_nothing_was_done_twice()
