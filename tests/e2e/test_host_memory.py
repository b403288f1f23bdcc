"""Pods whose memory is too small for the trainer, killed in Ray's way and in the kernel's."""

import pytest

from dsft_api.conditions import ConditionType, FailureClass, Phase
from tests.e2e.manifests import Assets, pool, tiny_run
from tests.e2e.tenant import START_SECONDS, Tenant, condition_of

pytestmark = pytest.mark.long

# Ray's own processes fit in; a rank with torch in it does not.
TOO_SMALL = "700Mi"
NAME = "hungry"
# Ray's memory monitor looks four times a second; 0 leaves the matter to the kernel.
WAYS = {"memory-monitor": {}, "kernel": {"spec.env": [{"name": "RAY_memory_monitor_refresh_ms", "value": "0"}]}}


@pytest.mark.parametrize("way", WAYS)
def test_out_of_host_memory(tenant: Tenant, assets: Assets, way: str) -> None:
    """Tried once more, since a neighbour may have been the cause; then Failed, with where to give more."""
    pools = [pool("small", 1, resources={"limits": {"memory": TOO_SMALL}})]
    tenant.apply(tiny_run(NAME, assets, steps=6, nodes=1, edits={"spec.nodePools": pools, **WAYS[way]}))
    status = tenant.until_phase(NAME, Phase.FAILED, 2 * START_SECONDS)
    assert [attempt.failure_class for attempt in status.attempts] == [FailureClass.HOST_OOM] * 2
    succeeded = condition_of(status, ConditionType.SUCCEEDED)
    assert succeeded is not None
    assert succeeded.reason == FailureClass.HOST_OOM
    assert "2 attempts in a row without a new checkpoint" in succeeded.message
    assert "spec.nodePools[].resources" in succeeded.message
    assert "spec.retry.token" in succeeded.message
    tenant.until_nothing_left()
    assert tenant.status(NAME).attempts == status.attempts
