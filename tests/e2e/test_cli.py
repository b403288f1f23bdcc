"""`dsft get`, `watch` and `logs` about a run on the cluster."""

import json

from dsft_api.conditions import ExitCode
from tests.e2e.followed import NAME, STEPS, Followed, dsft


def test_watch_follows_to_the_end(followed: Followed) -> None:
    """One line for each change, and the exit code of the run."""
    assert followed.watch_code == ExitCode.OK, followed.watch
    phases = [line.split(" ", 1)[1].partition(":")[0] for line in followed.watch.splitlines()]
    order = list(dict.fromkeys(phases))
    assert [phase for phase in order if phase in ("Provisioning", "Starting", "Running", "Succeeded")] == [
        "Provisioning",
        "Starting",
        "Running",
        "Succeeded",
    ]
    assert f"of {STEPS}" in followed.watch


def test_logs_are_the_drivers(followed: Followed) -> None:
    """From the head pod's own output: what Ray said at its start, then driver and ranks, to the last word."""
    assert "Ray runtime started" in followed.log
    assert f"of {STEPS}: loss" in followed.log
    assert f"step {STEPS}: evaluation: loss" in followed.log
    assert f"step {STEPS}: committed s3://" in followed.log


def test_get_lists_and_shows(followed: Followed) -> None:
    """A table while it ran; the whole resource as JSON afterwards."""
    row = next(line for line in followed.listed.splitlines() if NAME in line)
    assert f"/{STEPS}" in row
    assert "Running" in row
    shown = dsft(followed.tenant, "get", NAME, "--output", "json")
    assert shown.returncode == ExitCode.OK
    assert json.loads(shown.stdout)["status"]["phase"] == "Succeeded"


def test_what_is_not_there_is_said(followed: Followed) -> None:
    """No traceback: the API server's words, and the exit code of no access."""
    for command in (("get", "nobody"), ("watch", "nobody"), ("logs", "nobody")):
        ended = dsft(followed.tenant, *command)
        assert ended.returncode == ExitCode.ACCESS, command
        assert '"nobody" not found' in ended.stderr
    followed.tenant.until_nothing_left()
    ended = dsft(followed.tenant, "logs", NAME)
    assert ended.returncode == ExitCode.ACCESS
    assert "is gone (Succeeded)" in ended.stderr
