"""The whole demo: `python -m dsft_demo [MANIFEST]`, run from the repository's root.

Each step is a command that can be run by hand, in a process of its own, so that the training has the memory to itself.
"""

import json
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

from dsft_demo import DemoError
from dsft_demo.render import render

MANIFEST = Path("examples/quickstart.yaml")
BASELINES = Path("build/demo/baselines.json")


def demo(manifest: Path) -> int:
    """Render, show what there is to beat, fine-tune, judge. Returns the exit code of the first step that failed, or 0.

    Raises:
        DemoError: the manifest does not exist, dsft is not installed, or it does not say where the status is.
    """
    if not manifest.exists():
        raise DemoError(f"{manifest} does not exist: run the demo from the root of the repository")
    render()
    report = [sys.executable, "-m", "dsft_demo.report"]
    dsft = [_dsft_command()]
    if code := subprocess.run([*report, "baselines", "--cache", str(BASELINES)], check=False).returncode:
        return code
    if code := subprocess.run([*dsft, "run", "-f", str(manifest)], check=False).returncode:
        return code
    status = subprocess.run(
        [*dsft, "status", "-f", str(manifest), "--output", "json"], check=False, stdout=subprocess.PIPE
    )
    if status.returncode:
        return status.returncode
    return subprocess.run(
        [*report, "result", json.loads(status.stdout)["statusFile"], "--cache", str(BASELINES)], check=False
    ).returncode


def _dsft_command() -> str:
    """The `dsft` of this environment, which need not be activated."""
    command = Path(sysconfig.get_path("scripts")) / "dsft"
    if not command.exists():
        raise DemoError(f"{command} does not exist: install dsft into this environment with `pip install -e .`")
    return str(command)


def main() -> int:
    """Run the demo, and print a DemoError."""
    # Ctrl-C reaches `dsft run` as well, which commits a checkpoint and ends: wait for it instead of killing it. A
    # handler, since SIG_IGN would be inherited.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return demo(Path(sys.argv[1]) if len(sys.argv) > 1 else MANIFEST)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
