"""`dsft suspend` and `dsft resume` against the operator on a real API server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsft_api.conditions import ExitCode
from tests.apiserver.scene import Scene

pytestmark = pytest.mark.timeout(180)


def dsft(scene: Scene, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(Path(sys.executable).with_name("dsft")), *arguments, "--namespace", scene.runs.namespace],
        env={**os.environ, "KUBECONFIG": str(scene.api.kubeconfig)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_suspend_waits_until_the_nodes_are_free(scene: Scene, kuberay: None) -> None:
    scene.head.hold = True
    scene.operator.start()
    scene.apply()
    scene.until("running", lambda: (scene.status().get("job") or {}).get("state") == "RUNNING")
    ended = dsft(scene, "suspend", scene.name, "--output", "json")
    assert ended.returncode == ExitCode.OK, ended.stderr
    assert json.loads(ended.stdout)["phase"] == "Suspended"
    assert "Suspending: the trainer commits" in ended.stderr
    assert scene.clusters() == []
    scene.head.hold = False
    ended = dsft(scene, "resume", scene.name)
    assert ended.returncode == ExitCode.OK, ended.stderr
    scene.until_phase("Succeeded")
    again = dsft(scene, "suspend", scene.name)
    assert again.returncode == ExitCode.OK
    assert "Succeeded: done" in again.stderr
    assert scene.status()["phase"] == "Succeeded"


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("StorageDenied", ExitCode.ACCESS),
        ("ProvisionTimeout", ExitCode.OTHER),
        ("DataInvalid", ExitCode.BAD_INPUT),
        ("Invalid", ExitCode.BAD_INPUT),
    ],
)
def test_watch_ends_with_the_code_of_the_failure_where_there_was_no_attempt(
    scene: Scene, reason: str, code: ExitCode
) -> None:
    """As a preflight ends a run, the deadline of a wait, or a manifest that is refused; there is no operator here."""
    scene.apply()
    times = {"lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1}
    condition = {"type": "Succeeded", "status": "False", "reason": reason, "message": "", **times}
    ended = {"phase": "Failed", "message": "told", "completionTime": "2026-01-01T00:00:00Z", "conditions": [condition]}
    scene.runs.apply_status(scene.name, ended)
    watched = dsft(scene, "watch", scene.name)
    assert (watched.returncode, "Failed: told" in watched.stderr) == (code, True), watched.stderr


def test_a_run_that_is_not_there_is_named(scene: Scene) -> None:
    for command in ("suspend", "resume"):
        ended = dsft(scene, command, "nobody")
        assert ended.returncode == ExitCode.ACCESS
        assert '"nobody" not found' in ended.stderr
