"""The real Helm, built once, away from the user's own settings."""

import subprocess
from pathlib import Path

from tests.cluster.build import HELM


def helm(
    folder: Path, *arguments: str, stdin: str | None = None, seconds: float = 120.0
) -> "subprocess.CompletedProcess[str]":
    """Run it, whatever the exit code. `folder`: for its caches."""
    homes = {f"HELM_{kind.upper()}_HOME": f"{folder}/{kind}" for kind in ("cache", "config", "data")}
    return subprocess.run(
        [str(HELM.built()), *arguments],
        env=homes,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
