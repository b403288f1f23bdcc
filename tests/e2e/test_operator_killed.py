"""The operator is killed at random moments of a run: one RayCluster, one submission, and the end is that of its equal.

The equal is the same run undisturbed (`followed`). The seed decides the moments.
"""

import json
import random
import re
import threading
from collections.abc import Callable
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

# Seconds at most between a stage of the run and the kill: long enough to hit what follows at any point.
LATEST_SECONDS = 3.0
KEEP_SECONDS = 600
STAGES: dict[str, Callable[[Tenant], object]] = {
    "applied": lambda tenant: tenant.exists(NAME),
    "its cluster is there": lambda tenant: tenant.clusters(),
    "its job is named": lambda tenant: tenant.status(NAME).job,
    "its driver runs": lambda tenant: (job := tenant.status(NAME).job) and job.state == "RUNNING",
    # The run may well end before another operator is there.
    "it trains": lambda tenant: tenant.status(NAME).progress,
}
# Of the status: what clocks, chance and names decide, in two runs that are otherwise the same.
_TIMES = re.compile(r"(Time|At|Seconds)$")
_OTHERS = {"uid", "session", "eta", "time", "tokensPerSecond", "digest", "submissionId", "nodes", "goodput"}
# On the head, with the token of its environment: nothing outside the cluster needs to reach its port.
_LIST_JOBS = """
import os, urllib.request as http
request = http.Request("http://127.0.0.1:8265/api/jobs/", headers={"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]})
print(http.urlopen(request, timeout=30).read().decode())
"""


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_killed_at_five_random_moments(
    world: World, operator: Install, tenant: Tenant, assets: Assets, followed: Followed, seed: int
) -> None:
    """One in each stage, so that none is missed on a machine of any speed."""
    chance, pause = random.Random(seed), threading.Event()
    # The head is kept, so that Ray can be asked what was submitted.
    keep = {"spec.keepClusterSeconds": KEEP_SECONDS}
    tenant.apply(tiny_run(NAME, assets, steps=STEPS, edits=keep))
    clusters: set[str] = set()
    for stage, reached in STAGES.items():
        tenant.until(stage, lambda reached=reached: reached(tenant))
        pause.wait(chance.uniform(0, LATEST_SECONDS))
        clusters.update(cluster["metadata"]["uid"] for cluster in tenant.clusters())
        status = tenant.status(NAME)
        assert status.completion_time is None, f"over before the kill: {stage}"
        print(f"{stage}: killed at {status.phase}, step {status.progress.step if status.progress else 0}")
        kill(operator, on_this_machine=world.cluster.disposable)
    status = tenant.until_phase(NAME, Phase.SUCCEEDED)
    clusters.update(cluster["metadata"]["uid"] for cluster in tenant.clusters())
    assert status.ray_cluster is not None
    assert status.job is not None
    assert clusters == {status.ray_cluster.uid}
    assert submissions(tenant) == [status.job.submission_id]
    assert [str(claim.id) for claim in read_claims(tenant.store(NAME))] == ["a1.g1"]
    assert timeless(status.to_wire(), tenant) == timeless(followed.status.to_wire(), followed.tenant)
    tenant.patch(NAME, keepClusterSeconds=0)
    tenant.until_nothing_left()


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
