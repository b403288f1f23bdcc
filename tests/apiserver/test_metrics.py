"""What Prometheus gets from an operator on a real API server: every metric that alerts and dashboard name, and no empty panel."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import ProgressStatus, Spent
from dsft_operator.chart import CHART
from tests.apiserver.scene import ROOT, Scene
from tests.panels import PANELS, panels_without_data
from tests.unit.operator.situations import told

pytestmark = pytest.mark.timeout(180)


def training(uid: str) -> Progress:
    """What a trainer tells that has saved once."""
    now = datetime.now(UTC)
    progress = ProgressStatus(
        step=5, total_steps=100, loss=0.5, step_seconds=0.5, tokens_per_second=100.0, updated_at=now
    )
    first = told(TrainerPhase.TRAINING, step=5, committed=4)
    assert first.checkpoints is not None
    checkpoints = first.checkpoints.model_copy(update={"blocked_seconds": 0.1, "failures": 0})
    spent = Spent(useful_seconds=8.0, restart_seconds=2.0)
    return first.model_copy(
        update={"run_uid": uid, "progress": progress, "checkpoints": checkpoints, "spent": spent, "updated_at": now}
    )


def names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:dsft|process)_[a-z_]+", text))


def test_what_alerts_and_panels_ask_for_is_told(
    scene: Scene, kuberay: None, metrics: Callable[[], str], tmp_path: Path
) -> None:
    scene.operator.options["leaderElection"] = {"enabled": True}
    scene.head.hold = True
    scene.operator.start()
    uid = scene.apply()["metadata"]["uid"]
    scene.until("submitted", lambda: (scene.status().get("job") or {}).get("state") == "RUNNING")
    scene.head.progress = training(uid)
    scene.until("running", lambda: (scene.status().get("progress") or {}).get("step"))
    scene.until("told", lambda: "dsft_run_goodput_ratio{" in metrics())
    first = metrics()
    scene.until("looked again", lambda: metrics() != first)
    second = metrics()
    samples = {line.partition("{")[0].partition(" ")[0] for line in second.splitlines() if not line.startswith("#")}
    helped = {line.split()[2] for line in second.splitlines() if line.startswith("# TYPE")}
    alerts = (ROOT / CHART / "files" / "alerts.yaml").read_text()
    # dsft_run_waiting is told while a run waits.
    assert names(alerts) - samples <= {"dsft_run_waiting"}
    assert names(alerts) <= samples | helped
    assert names(" ".join(panel.query for panel in PANELS)) <= samples | helped
    assert panels_without_data(first, second, tmp_path) == []


def test_a_finished_run_tells_its_phase_only_and_a_deleted_one_nothing(
    scene: Scene, kuberay: None, metrics: Callable[[], str]
) -> None:
    scene.operator.start()
    scene.apply()
    scene.until_phase("Succeeded")
    mine = f'namespace="{scene.runs.namespace}"'
    scene.until("counted", lambda: 'dsft_runs_finished_total{phase="Succeeded"} 1.0' in metrics())
    scene.until("freed", lambda: not scene.clusters())
    assert [line.partition("{")[0] for line in metrics().splitlines() if mine in line] == ["dsft_run_phase"]
    scene.runs.delete(scene.name)
    scene.until("forgotten", lambda: mine not in metrics())
