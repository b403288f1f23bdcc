"""Runs whose checkpoints are due by the clock: rank 0's clock, and all ranks save at the same step."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsft_api.conditions import ExitCode
from tests.cli.command import Dsft, classifier
from tests.trainer import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 12


def checkpoints(folder: Path, policy: dict[str, Any]) -> dict[str, Any]:
    """What status shows of them at the end of a run of two ranks."""
    dsft = Dsft(folder)
    manifest = classifier(
        tiny.bert(folder / "model"),
        tiny.dataset(folder, "classification"),
        **{
            "spec.data.evalFraction": None,
            "spec.evaluation": None,
            "spec.training.maxSteps": STEPS,
            "spec.checkpoint": {"keepLast": 10, **policy},
        },
    )
    ended = dsft("run", "-f", dsft.write(manifest), "--runtime", "torchrun", "-o", "json")
    assert ended.code == ExitCode.OK, ended.text
    return json.loads(ended.out)["status"]["checkpoints"]


def test_every_few_milliseconds(tmp_path: Path) -> None:
    shown = checkpoints(tmp_path, {"everyMinutes": 0.0001})
    steps = [commit["step"] for commit in shown["retained"]]
    assert len(steps) > 1
    assert steps[-1] == STEPS
    assert shown["intervalSeconds"] == pytest.approx(0.006, abs=0.1)


def test_an_automatic_interval_is_minutes_for_a_run_that_never_failed(tmp_path: Path) -> None:
    shown = checkpoints(tmp_path, {"interval": "auto"})
    assert [commit["step"] for commit in shown["retained"]] == [STEPS]
    # sqrt(2 x blocked x a day), for 0.1 s or more.
    assert shown["intervalSeconds"] >= 131
