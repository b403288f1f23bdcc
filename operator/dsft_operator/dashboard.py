"""The Grafana dashboard, from a table of panels. `python -m dsft_operator.chart` writes it into the chart."""

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

COLUMNS, HEIGHT = 3, 8
_WIDTH = 24 // COLUMNS
# Of the runs that are chosen above.
_CHOSEN = '{namespace=~"$namespace", name=~"$name"}'
_RUN = "{{namespace}}/{{name}}"


@dataclass(frozen=True)
class Panel:
    """One time series panel. `unit`: of Grafana."""

    title: str
    query: str
    legend: str
    unit: str = "short"


RUNS = (
    Panel("Runs by phase", "sum by (phase) (dsft_runs)", "{{phase}}"),
    Panel("Runs that wait, by reason", "sum by (reason) (dsft_run_waiting) or vector(0)", "{{reason}}"),
    Panel(
        "Attempts that failed, by class",
        "sum by (class) (increase(dsft_attempts_failed_total[$__rate_interval]))",
        "{{class}}",
    ),
    Panel("Steps", f"100 * dsft_run_step{_CHOSEN} / dsft_run_total_steps{_CHOSEN}", _RUN, "percent"),
    Panel("Loss", f"dsft_run_loss{_CHOSEN}", _RUN),
    Panel("Duration of a step", f"dsft_run_step_seconds{_CHOSEN}", _RUN, "s"),
    Panel("Tokens per second", f"dsft_run_tokens_per_second{_CHOSEN}", _RUN),
    Panel("Age of the newest checkpoint", f"time() - dsft_run_last_checkpoint_timestamp_seconds{_CHOSEN}", _RUN, "s"),
    Panel("Training stood still for it", f"dsft_run_checkpoint_blocked_seconds{_CHOSEN}", _RUN, "s"),
    Panel("Goodput", f"dsft_run_goodput_ratio{_CHOSEN}", _RUN, "percentunit"),
    Panel("Attempt", f"dsft_run_attempt{_CHOSEN}", _RUN),
    Panel("GPU seconds that trained nothing", f"dsft_run_wasted_gpu_seconds{_CHOSEN}", _RUN, "s"),
)
OPERATOR = (
    Panel("Leader", "dsft_leader == 1", "{{pod}}"),
    Panel("Runs to look at", "sum(dsft_queue_depth)", "queue"),
    Panel(
        "Wait for a worker, p99",
        "histogram_quantile(0.99, sum by (le) (rate(dsft_queue_latency_seconds_bucket[$__rate_interval])))",
        "p99",
        "s",
    ),
    Panel(
        "Duration of a pass, p99",
        "histogram_quantile(0.99, sum by (le) (rate(dsft_reconcile_duration_seconds_bucket[$__rate_interval])))",
        "p99",
        "s",
    ),
    Panel(
        "Passes, by how they ended",
        "sum by (result) (rate(dsft_reconcile_total[$__rate_interval]))",
        "{{result}}",
        "ops",
    ),
    Panel(
        "Requests to the API server",
        "sum by (verb, code) (rate(dsft_kubernetes_requests_total[$__rate_interval]))",
        "{{verb}} {{code}}",
        "reqps",
    ),
    Panel("Event loop comes late", "dsft_event_loop_lag_seconds", "{{pod}}", "s"),
    Panel("Watches are behind", "dsft_watch_lag_seconds", "{{pod}}", "s"),
    Panel("Memory", "process_resident_memory_bytes and on (instance, job) dsft_leader", "{{pod}}", "bytes"),
)


def dashboard() -> Json:
    """As Grafana imports it."""
    panels: list[Json] = []
    top = 0
    for title, group in (("Runs", RUNS), ("Operator", OPERATOR)):
        panels.append(_row(title, len(panels) + 1, top))
        top += 1
        for place, panel in enumerate(group):
            across, down = place % COLUMNS, place // COLUMNS
            panels.append(_panel(panel, len(panels) + 1, across * _WIDTH, top + down * HEIGHT))
        top += -(-len(group) // COLUMNS) * HEIGHT
    return {
        "uid": "dsft",
        "title": "dsft",
        "tags": ["dsft", "kubernetes"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_datasource(), _variable("namespace"), _variable("name")]},
        "panels": panels,
    }


def _row(title: str, number: int, top: int) -> Json:
    return {"id": number, "type": "row", "title": title, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}, "panels": []}


def _panel(panel: Panel, number: int, left: int, top: int) -> Json:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": {"x": left, "y": top, "w": _WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [{"refId": "A", "datasource": source, "expr": panel.query, "legendFormat": panel.legend}],
    }


def _datasource() -> Json:
    return {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _variable(label: str) -> Json:
    query = f"label_values(dsft_run_phase, {label})"
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "definition": query,
        "query": {"query": query, "refId": label},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
