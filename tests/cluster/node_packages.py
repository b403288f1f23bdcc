"""The Debian packages of the node half. They are installed once, by apt-get, and their services are not started."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What is looked for: package.
_NEEDED = {
    "/usr/bin/containerd": "containerd",
    "/usr/sbin/runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/usr/sbin/iptables": "iptables",
    "/usr/sbin/conntrack": "conntrack",
    "/usr/sbin/ipset": "ipset",
    "/usr/bin/socat": "socat",
    "/usr/bin/docker-registry": "docker-registry",
    "/usr/bin/buildah": "buildah",
    "/usr/sbin/debootstrap": "debootstrap",
}
_POLICY = Path("/usr/sbin/policy-rc.d")
_SECONDS = 900


def ensure_packages() -> None:
    """Install what is missing.

    Raises:
        RuntimeError: we are not root, or apt-get failed.
    """
    if os.geteuid() != 0:
        raise RuntimeError(
            "the test cluster makes bridges, mounts and cgroups: run it as root, or set KUBECONFIG to a cluster"
        )
    missing = sorted(package for path, package in _NEEDED.items() if not Path(path).exists())
    if not missing:
        return
    print(f"tests.cluster: installing {' '.join(missing)} with apt-get, once", file=sys.stderr, flush=True)
    with _services_stay_stopped():
        _apt_get("update", "--quiet")
        _apt_get("install", "--quiet", "--yes", "--no-install-recommends", *missing)


@contextmanager
def _services_stay_stopped() -> Iterator[None]:
    """Debian starts a service at its install; ours run with our own configuration."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()


def _apt_get(*arguments: str) -> None:
    done = subprocess.run(
        ["apt-get", *arguments],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"apt-get {' '.join(arguments)} failed:\n{done.stdout[-3000:]}")
