"""A refusal of the API server that stays, and what an edit in between makes of what the status says."""

import asyncio
from typing import Any

import pytest

from dsft_api.conditions import ConditionType, Phase
from dsft_operator.core.preflight_job import SECONDS
from dsft_operator.core.summary import condition_of
from tests.unit.operator.fake_ports import operator_in
from tests.unit.operator.settling import settle
from tests.unit.operator.world import KEY, World

QUOTA = 'the API server answered 403: "chat" is forbidden: exceeded quota: used 9, limited 9'
LOOKS = {"preflight": {"enabled": True}}
POOLS: dict[str, Any] = {"nodePools": [{"name": "gpu", "nodes": 2, "gpusPerNode": 1}]}


@pytest.mark.parametrize("kind", ["Job", "RayCluster"])
def test_an_edit_that_is_taken_back_leaves_no_trace(kind: str) -> None:
    """The words of the refusal are the same as before it, and not all that the status has to say."""
    looks = {"preflight": {"enabled": kind == "Job"}}
    world = World({**looks, **POOLS, "deadlines": {"provisionSeconds": 300}}, refused={kind: QUOTA})
    operator = operator_in(world)
    for _ in range(2):
        asyncio.run(operator.reconcile(KEY))
    world.edit(nodePools=[])
    asyncio.run(operator.reconcile(KEY))
    assert world.seen_status.phase is Phase.FAILED
    world.tick(301)
    world.edit(**POOLS)
    asyncio.run(operator.reconcile(KEY))
    status = world.seen_status
    accepted = condition_of(status, ConditionType.ACCEPTED)
    assert (status.phase, status.observed_generation) == (Phase.PROVISIONING, 3)
    assert QUOTA in str(status.message)
    assert accepted is not None
    assert accepted.status == "True"
    assert (status.preflight is not None) is (kind == "Job")
    version = world.version
    asyncio.run(operator.reconcile(KEY))
    assert world.version == version
    world.refused.clear()
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED


def test_a_job_that_is_refused_again_after_an_edit_is_given_up() -> None:
    world = World(LOOKS, refused={"Job": QUOTA})
    operator = operator_in(world)
    asyncio.run(operator.reconcile(KEY))
    for pools in ([], POOLS["nodePools"]):
        world.edit(nodePools=pools)
        asyncio.run(operator.reconcile(KEY))
    world.tick(SECONDS)
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED
    assert world.looked == 0


def test_words_of_another_step_do_not_stay_beside_a_refusal() -> None:
    """A new token told that all nodes may be used again; what is waited for is the quota still."""
    world = World(refused={"RayCluster": QUOTA})
    asyncio.run(operator_in(world).reconcile(KEY))
    told = world.seen_status.message
    world.status = {**world.status, "message": "retry.token is new: all nodes may be used again"}
    world.version += 1
    asyncio.run(operator_in(world).reconcile(KEY))
    assert world.seen_status.message == told


@pytest.mark.parametrize("kind", ["Job", "RayCluster"])
def test_an_edit_that_mends_nothing_is_acknowledged(kind: str) -> None:
    """Else a GitOps tool would wait for ever for the status of what it applied."""
    world = World({"preflight": {"enabled": kind == "Job"}}, refused={kind: QUOTA})
    operator = operator_in(world)
    asyncio.run(operator.reconcile(KEY))
    world.edit(suspend=False)
    asyncio.run(operator.reconcile(KEY))
    assert world.seen_status.observed_generation == 2


def test_since_when_a_job_is_tried_is_in_the_book_before_its_words_are_old_news() -> None:
    world = World(LOOKS, refused={"Job": QUOTA})
    operator = operator_in(world)
    asyncio.run(operator.reconcile(KEY))
    world.status = {name: value for name, value in world.status.items() if name != "preflight"}
    world.version += 1
    asyncio.run(operator.reconcile(KEY))
    assert world.seen_status.preflight is not None
