"""The operator is killed at random moments of a run: one RayCluster, one submission, and the end is that of its equal.

The equal is the same run undisturbed (`followed`). The seed decides the moments; another one comes by DSFT_E2E_SEED.
"""

import json
import os
import random
import re
import threading
from typing import Any

import pytest

from dsft_api.conditions import Phase
from dsft_trainer.checkpoint.listing import read_claims
from tests.cluster.operator_install import Install
from tests.e2e.conftest import World
from tests.e2e.followed import NAME, STEPS, Followed
from tests.e2e.manifests import Assets, tiny_run
from tests.e2e.operator_kill import kill
from tests.e2e.tenant import Tenant

SEED = int(os.environ.get("DSFT_E2E_SEED", "1"))
LATEST_SECONDS = 6.0
KEEP_SECONDS = 600
# Of the status: what clocks, chance and names decide, in two runs that are otherwise the same.
_TIMES = re.compile(r"(Time|At)$")
_OTHERS = {"uid", "session", "eta", "time", "tokensPerSecond", "digest", "submissionId", "retained"}
# On the head, with the token of its environment: nothing outside the cluster needs to reach its port.
_LIST_JOBS = """
import os, urllib.request as http
request = http.Request("http://127.0.0.1:8265/api/jobs/", headers={"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]})
print(http.urlopen(request, timeout=30).read().decode())
"""


def kill_and_compare(
    world: World, operator: Install, tenant: Tenant, assets: Assets, equal: Followed, kills: int
) -> None:
    """Apply the run, kill the operator so often, let it end, and judge."""
    chance = random.Random(SEED)
    pause = threading.Event()
    # The head is kept, so that Ray can be asked what was submitted.
    keep = {"spec.keepClusterSeconds": KEEP_SECONDS}
    tenant.apply(tiny_run(NAME, assets, steps=STEPS, edits=keep))
    clusters: set[str] = set()
    moments: list[str] = []
    for _ in range(kills):
        pause.wait(chance.uniform(0, LATEST_SECONDS))
        clusters.update(cluster["metadata"]["uid"] for cluster in tenant.clusters())
        status = tenant.status(NAME)
        moments.append(f"{status.phase}, step {status.progress.step if status.progress else 0}")
        kill(operator, on_this_machine=world.cluster.disposable)
    print("killed at:", "; ".join(moments))
    status = tenant.until_phase(NAME, Phase.SUCCEEDED)
    clusters.update(cluster["metadata"]["uid"] for cluster in tenant.clusters())
    assert status.ray_cluster is not None
    assert clusters == {status.ray_cluster.uid}
    assert submissions(tenant) == [status.job.submission_id if status.job else None]
    assert [str(claim.id) for claim in read_claims(tenant.store(NAME))] == ["a1.g1"]
    assert timeless(status.to_wire(), tenant) == timeless(equal.status.to_wire(), equal.tenant)
    tenant.patch(NAME, keepClusterSeconds=0)
    tenant.until_nothing_left()


def test_killed_at_five_random_moments(
    world: World, operator: Install, tenant: Tenant, assets: Assets, followed: Followed
) -> None:
    kill_and_compare(world, operator, tenant, assets, followed, kills=5)


@pytest.mark.long
def test_killed_again_and_again(
    world: World, operator: Install, tenant: Tenant, assets: Assets, followed: Followed
) -> None:
    kill_and_compare(world, operator, tenant, assets, followed, kills=15)


def submissions(tenant: Tenant) -> list[str]:
    """What Ray was asked to run, by its own account."""
    head = tenant.head(NAME)
    answer = tenant.kubectl("exec", head, "--container=ray-head", "--", "python", "-c", _LIST_JOBS)
    return [job["submission_id"] for job in json.loads(answer) if job["type"] == "SUBMISSION"]


def timeless(part: Any, tenant: Tenant) -> Any:
    """A status without what differs between two runs of the same manifest."""
    if isinstance(part, dict):
        return {
            name: timeless(value, tenant)
            for name, value in part.items()
            if not _TIMES.search(name) and name not in _OTHERS
        }
    if isinstance(part, list):
        return [timeless(value, tenant) for value in part]
    return _nameless(part, tenant) if isinstance(part, str) else part


def _nameless(text: str, tenant: Tenant) -> str:
    """Without namespace and uid."""
    uid = tenant.resource(NAME)["metadata"]["uid"]
    for name in (uid, uid[:8], uid[:5], tenant.namespace):
        text = text.replace(name, "-")
    return text
