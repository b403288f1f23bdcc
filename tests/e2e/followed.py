"""A tiny run that nobody disturbs, followed by the `dsft` command from its beginning to its end."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsft_api.conditions import Phase
from dsft_api.status import FineTuneStatus
from tests.e2e.manifests import Assets, tiny_run
from tests.e2e.tenant import Tenant

STEPS = 480
NAME = "followed"
COMMAND_SECONDS = 120


@dataclass(frozen=True)
class Followed:
    """The run's end, and what the commands printed meanwhile."""

    tenant: Tenant
    status: FineTuneStatus
    watch: str
    watch_code: int
    log: str
    listed: str


def follow(tenant: Tenant, assets: Assets, folder: Path) -> Followed:
    """Apply it, and start `dsft watch` at once and `dsft logs -f` when there is a head."""
    tenant.apply(tiny_run(NAME, assets, steps=STEPS))
    with started(tenant, folder / "watch.log", "watch", NAME) as watch:
        tenant.until("the head runs", lambda: _head_runs(tenant))
        with started(tenant, folder / "logs.log", "logs", NAME, "--follow") as logs:
            tenant.until_step(NAME, 1)
            listed = dsft(tenant, "get").stdout
            status = tenant.until_phase(NAME, Phase.SUCCEEDED)
            code = watch.wait(COMMAND_SECONDS)
            logs.wait(COMMAND_SECONDS)
    return Followed(tenant, status, (folder / "watch.log").read_text(), code, (folder / "logs.log").read_text(), listed)


def dsft(tenant: Tenant, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command to its end, in the tenant's namespace."""
    return subprocess.run(
        _argv(tenant, *arguments),
        env=_environment(tenant),
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )


@contextmanager
def started(tenant: Tenant, log: Path, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The command in the background, with all that it prints in a file."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            _argv(tenant, *arguments), env=_environment(tenant), stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _argv(tenant: Tenant, *arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("dsft")), *arguments, "--namespace", tenant.namespace]


def _environment(tenant: Tenant) -> dict[str, str]:
    # Wide enough that no table is cut.
    return {**os.environ, "KUBECONFIG": str(tenant.kubectl.kubeconfig), "COLUMNS": "200"}


def _head_runs(tenant: Tenant) -> bool:
    heads = [pod for pod in tenant.pods() if pod["metadata"]["labels"].get("ray.io/node-type") == "head"]
    return any(pod["status"].get("phase") == "Running" for pod in heads)
