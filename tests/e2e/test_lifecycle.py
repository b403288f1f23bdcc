"""One run on (fake) GPUs through a checkpoint on request, suspend, resume and delete, each while it trains."""

import time
from typing import Any

from dsft_api import CHECKPOINT_REQUEST
from dsft_api.conditions import ConditionType, ExitCode, Phase
from dsft_api.status import CheckpointRef, FineTuneStatus
from tests.e2e.followed import dsft
from tests.e2e.manifests import ENDLESS, Assets, pool, tiny_run
from tests.e2e.tenant import Tenant, condition_of

# What the issue allows between `kubectl delete` and a resource that is gone.
RELEASE_SECONDS = 60.0
GPU = "nvidia.com/gpu"
NAME = "endless"


def on_gpus(assets: Assets) -> dict[str, Any]:
    """Pods that ask for GPUs, and a trainer that uses the CPUs there: the node's GPUs are not real."""
    pools = [pool("gpu", 2, gpusPerNode=1)]
    policy = {"everySteps": ENDLESS, "drainSeconds": 60}
    return tiny_run(NAME, assets, steps=ENDLESS, edits={"spec.nodePools": pools, "spec.checkpoint": policy})


def test_saved_suspended_resumed_and_deleted_while_it_trains(tenant: Tenant, assets: Assets) -> None:
    tenant.apply(on_gpus(assets))
    before = tenant.until_step(NAME, 20)
    assert before.progress is not None
    assert _gpus(tenant) == 2

    saved = dsft(tenant, "save", NAME)
    assert saved.returncode == ExitCode.OK, saved.stderr
    asked = tenant.status(NAME)
    assert f"step {_latest(asked).step}: s3://" in saved.stdout
    assert _latest(asked).step >= before.progress.step
    assert asked.checkpoint_request == tenant.resource(NAME)["metadata"]["annotations"][CHECKPOINT_REQUEST]
    tenant.until_step(NAME, _latest(asked).step + 1)

    tenant.patch(NAME, suspend=True)
    suspended = tenant.until_phase(NAME, Phase.SUSPENDED)
    tenant.until_nothing_left()
    latest = _latest(suspended)
    assert latest.step > _latest(asked).step, "nothing was lost: the step in which it was told to stop is committed"
    (attempt,) = suspended.attempts
    assert attempt.to_step == latest.step
    assert suspended.usage is not None
    assert suspended.usage.gpu_seconds
    ready = condition_of(suspended, ConditionType.READY)
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "Suspended")

    tenant.patch(NAME, suspend=False)
    tenant.until("it is taken up again", lambda: tenant.status(NAME).attempt == 2)
    resumed = tenant.until_step(NAME, latest.step + 1)
    assert resumed.attempts[-1].from_step == latest.step
    assert resumed.ray_cluster is not None
    assert resumed.ray_cluster.incarnation == 2

    began = time.monotonic()
    tenant.delete(NAME)
    tenant.until("the resource is gone", lambda: not tenant.exists(NAME), RELEASE_SECONDS)
    assert time.monotonic() - began < RELEASE_SECONDS
    tenant.until_nothing_left()


def _latest(status: FineTuneStatus) -> CheckpointRef:
    assert status.checkpoints is not None
    assert status.checkpoints.latest is not None
    return status.checkpoints.latest


def _gpus(tenant: Tenant) -> int:
    """GPUs that the namespace's pods hold."""
    containers = [container for pod in tenant.pods() for container in pod["spec"]["containers"]]
    return sum(int((container["resources"].get("limits") or {}).get(GPU, 0)) for container in containers)
