"""The alerts by Prometheus' own tool: each one fires, and does not; and the waits they know are those of the code."""

import re
import shutil
import subprocess
from pathlib import Path

import yaml

from dsft_api.conditions import WAITS
from tests.charts.conftest import FOLDER, HERE
from tests.cluster.build import PROMTOOL

ALERTS = FOLDER / "files" / "alerts.yaml"
TESTS = HERE / "alerts_test.yaml"


def promtool(folder: Path, *arguments: str) -> str:
    for file in (ALERTS, TESTS):
        shutil.copy(file, folder)
    done = subprocess.run(
        [str(PROMTOOL.built()), *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_are_well_formed(tmp_path: Path) -> None:
    assert "SUCCESS: 12 rules found" in promtool(tmp_path, "check", "rules", "--lint=all", ALERTS.name)


def test_each_alert_fires_and_does_not(tmp_path: Path) -> None:
    assert "SUCCESS" in promtool(tmp_path, "test", "rules", TESTS.name)
    tests = yaml.safe_load(TESTS.read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


def test_the_waits_that_call_for_somebody_are_those_with_a_remedy() -> None:
    (reasons,) = re.findall(r'dsft_run_waiting\{reason=~"([^"]+)"', ALERTS.read_text())
    assert set(reasons.split("|")) == {str(reason) for reason, remedy in WAITS.items() if remedy}
