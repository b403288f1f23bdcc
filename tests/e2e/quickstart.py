"""The quickstart on the cluster, once for all tests that look at it: applied by kubectl, watched by kubectl, to its end."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft_api import PLURAL
from dsft_api.conditions import Phase
from dsft_api.status import FineTuneStatus
from tests.e2e.manifests import QUICKSTART, QUICKSTART_NAME
from tests.e2e.tenant import GONE_SECONDS, JOB_LABEL, Tenant

# 100 steps, four commits and three evaluations of a BERT with 22 M parameters.
SECONDS = 1200


@dataclass(frozen=True)
class Finished:
    """A run that ended well, as it was seen."""

    tenant: Tenant
    name: str
    resource: dict[str, Any]
    status: FineTuneStatus
    commits: tuple[str, ...]
    most_pods: frozenset[str]
    table: str


def run_quickstart(tenant: Tenant, folder: Path) -> Finished:
    """Apply the file, wait as a user does, and note what was there meanwhile."""
    tenant.apply(QUICKSTART)
    commits: set[str] = set()
    roles: set[str] = set()
    with watched(tenant, QUICKSTART_NAME, folder / "watch.log"), _waiting(tenant) as waiting:

        def over() -> bool:
            status = tenant.status(QUICKSTART_NAME)
            assert status.phase is not Phase.FAILED, status.message
            roles.update(f"{_role(pod)}/{pod['metadata']['name']}" for pod in tenant.pods())
            commits.update(ref.uri for ref in (status.checkpoints.retained if status.checkpoints else ()))
            return waiting.poll() is not None

        tenant.until("kubectl wait --for=condition=Succeeded returns", over, SECONDS)
        assert waiting.returncode == 0, waiting.communicate()
        resource = tenant.resource(QUICKSTART_NAME)
    return Finished(
        tenant,
        QUICKSTART_NAME,
        resource,
        FineTuneStatus.model_validate(resource["status"]),
        tuple(sorted(commits)),
        frozenset(roles),
        (folder / "watch.log").read_text(),
    )


@contextmanager
def watched(tenant: Tenant, name: str, log: Path) -> Iterator[None]:
    """`kubectl get dsft NAME -w` meanwhile, into a file."""
    with log.open("wb") as stream:
        process = subprocess.Popen(tenant.kubectl.argv("get", "dsft", name, "--watch"), stdout=stream, stderr=stream)
        try:
            yield
        finally:
            process.terminate()
            process.wait(GONE_SECONDS)


@contextmanager
def _waiting(tenant: Tenant) -> Iterator["subprocess.Popen[str]"]:
    argv = tenant.kubectl.argv(
        "wait", "--for=condition=Succeeded", f"{PLURAL}/{QUICKSTART_NAME}", f"--timeout={SECONDS}s"
    )
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _role(pod: dict[str, Any]) -> str:
    """Its group in the RayCluster, or that it looked before there was one."""
    labels = pod["metadata"].get("labels") or {}
    return "preflight" if JOB_LABEL in labels else labels.get("ray.io/group", "")
