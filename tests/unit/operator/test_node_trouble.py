"""What Kubernetes says of the nodes on which an attempt ended: read, kept with the attempt, and held against nobody."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dsft_api.conditions import Phase
from dsft_operator.adapters.reading import trouble_of
from dsft_operator.core.failures import suspect_nodes
from dsft_operator.core.observed import Ended, Pod
from tests.unit.operator.fake_ports import operator_in
from tests.unit.operator.situations import NOW, submitted
from tests.unit.operator.world import KEY, World

READY = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status"}
CALM = {"type": "MemoryPressure", "status": "False", "reason": "KubeletHasSufficientMemory", "message": "enough"}
SILENT = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": "Kubelet stopped posting"}
FAULTY = {"type": "GpuUnhealthy", "status": "True", "reason": "Xid79", "message": "fell off the bus"}
UNHEARD = {**CALM, "status": "Unknown", "reason": "NodeStatusUnknown", "message": "Kubelet stopped posting"}
SILENCE = "Ready=Unknown (NodeStatusUnknown: Kubelet stopped posting)"
FAULT = "GpuUnhealthy=True (Xid79: fell off the bus)"


@pytest.mark.parametrize(
    ("conditions", "trouble"),
    [
        ([READY, CALM], None),
        ([], None),
        ([UNHEARD, SILENT], SILENCE),
        ([READY, FAULTY], FAULT),
        ([FAULTY, SILENT], f"{FAULT}; {SILENCE}"),
    ],
    ids=["all is well", "nothing is told", "a silent kubelet", "a complaint of the cluster's own", "both"],
)
def test_what_is_wrong_with_a_node_is_read(conditions: list[dict[str, Any]], trouble: str | None) -> None:
    assert trouble_of({"metadata": {"name": "node-1"}, "status": {"conditions": conditions}}) == trouble


def message_of_a_lost_attempt(world: World) -> str:
    """A worker ends on node-1, and the driver says so."""
    operator = operator_in(world)

    def settle(fact: Callable[[], bool]) -> None:
        for _ in range(100):
            if fact():
                return
            if asyncio.run(operator.reconcile(KEY)) != 0.0:
                world.tick()
        pytest.fail(f"still {world.seen_status.phase}")

    settle(lambda: world.seen_status.phase is Phase.RUNNING)
    end = Ended("gpu-1", "worker", "node-1", "Error", 139, at=world.now)
    world.pods = (Pod("gpu-1", "worker", "gpu", node="node-1", ended=(end,)),)
    asyncio.run(operator.reconcile(KEY))
    world.pods = ()
    world.lose_worker()
    settle(lambda: world.seen_status.attempts[-1].end_time is not None)
    return world.seen_status.attempts[0].message or ""


def test_the_node_of_a_lost_pod_is_asked_what_is_wrong_with_it() -> None:
    message = message_of_a_lost_attempt(World(troubles={"node-1": SILENCE, "node-2": "is another's"}))
    assert f"(seen: worker gpu-1 on node-1: Error, exit code 139; node node-1: {SILENCE})" in message
    assert "node-2" not in message


def test_of_a_node_that_is_well_nothing_is_said() -> None:
    assert "node node-1" not in message_of_a_lost_attempt(World())


def test_a_node_that_may_not_be_read_holds_nothing_up() -> None:
    message = message_of_a_lost_attempt(World(refused={"Node": "nodes is forbidden"}, troubles={"node-1": SILENCE}))
    assert "exit code 139" in message
    assert "node node-1" not in message


def test_a_node_whose_pod_does_not_end_is_suspect() -> None:
    stranded = Pod("chat-gpu-1", "worker", "gpu", node="node-2", gone_by=NOW)
    late = replace(submitted(), pods=(stranded,))
    assert suspect_nodes(late, NOW) == ()
    assert suspect_nodes(late, NOW + timedelta(seconds=1)) == ("node-2",)
