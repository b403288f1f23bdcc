"""The preStop hook where there is nothing to drain: it must not keep a node that is wanted elsewhere."""

import os
import subprocess
import sys

import pytest

from tests.cluster.processes import free_ports

# Ray alone would try for minutes; importing it takes seconds, more on a busy machine.
SECONDS = 60


@pytest.mark.slow
def test_a_head_that_is_gone_is_not_waited_for() -> None:
    (port,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, "-m", "dsft_trainer", "drain"],
        env={**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0
    assert f"the head at 127.0.0.1:{port} is gone" in done.stderr
