"""The real Helm, built once, away from the user's own settings."""

import subprocess
from pathlib import Path

from tests.cluster.build import HELM, GoProgram


def helm(
    folder: Path, *arguments: str, stdin: str | None = None, seconds: float = 120.0, program: GoProgram = HELM
) -> "subprocess.CompletedProcess[str]":
    """Run it, whatever the exit code. `folder`: for its caches."""
    homes = {f"HELM_{kind.upper()}_HOME": f"{folder}/{kind}" for kind in ("cache", "config", "data")}
    return subprocess.run(
        [str(program.built()), *arguments],
        env=homes,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
