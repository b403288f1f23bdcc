"""Whether the dashboard's queries have an answer: asked of Prometheus' own engine, over what an operator really told."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from dsft_operator.dashboard import OPERATOR, RUNS, Panel
from tests.cluster.build import PROMTOOL

PANELS = (*RUNS, *OPERATOR)
# What Prometheus adds to what it scrapes.
TARGET = {"instance": "10.0.0.1:8080", "job": "dsft-operator", "pod": "dsft-operator-0"}
_VARIABLES = {"$__rate_interval": "5m", "$namespace": ".*", "$name": ".*"}


def panels_without_data(first: str, second: str, folder: Path) -> list[str]:
    """Titles of the panels that would be empty, by two scrapes of /metrics in a row."""
    before, after = dict(_samples(first)), dict(_samples(second))
    series = [{"series": name, "values": f"{before.get(name, value)}+0x5 {value}+0x5"} for name, value in after.items()]
    file = folder / "panels.yaml"
    empty: list[str] = []
    for panel in PANELS:
        case = {
            "expr": f"count({_query(panel)}) > bool 0",
            "eval_time": "8m",
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        test = {"interval": "1m", "input_series": series, "promql_expr_test": [case]}
        file.write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}))
        done = subprocess.run(
            [str(PROMTOOL.built()), "test", "rules", str(file)], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            told = done.stdout + done.stderr
            assert re.search(r"got:\s*nil", told), told
            empty.append(panel.title)
    return empty


def _query(panel: Panel) -> str:
    query = panel.query
    for name, value in _VARIABLES.items():
        query = query.replace(name, value)
    assert not re.search(r"\$\w", query), query
    return query


def _samples(scrape: str) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            labels = ",".join(f"{name}={json.dumps(value)}" for name, value in {**TARGET, **sample.labels}.items())
            yield f"{sample.name}{{{labels}}}", sample.value
