"""What Prometheus hears about runs: figures from their status, one series per run, gone with the run.

After kube-state-metrics: a run is known by namespace and name, so there are as many series as there are runs. What counts
over time (failures, ends) is counted as the operator writes it, without the run's name.
"""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from datetime import datetime

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dsft_api.conditions import WAITS, ConditionType, FailureClass, Phase
from dsft_api.status import FineTuneStatus
from dsft_operator.core.summary import condition_of
from dsft_operator.ports import Key

FAILURES = Counter("dsft_attempts_failed_total", "Attempts that failed, by their failure class.", ["class"])
FINISHED = Counter("dsft_runs_finished_total", "Runs that came to their end, by phase.", ["phase"])
# From zero on: an increase is seen only of what was there before.
for _class in FailureClass:
    FAILURES.labels(_class)
for _phase in (Phase.SUCCEEDED, Phase.FAILED):
    FINISHED.labels(_phase)
RUN = ("namespace", "name")


@dataclass(frozen=True)
class Figure:
    """One number of a run that is not over; None where its status has none."""

    name: str
    what: str
    read: Callable[[FineTuneStatus], float | None]


def _seconds(time: datetime | None) -> float | None:
    return None if time is None else time.timestamp()


def _last_safe(status: FineTuneStatus) -> float | None:
    """What would be lost now counts from here."""
    latest = status.checkpoints.latest if status.checkpoints is not None else None
    attempt = status.attempts[-1] if status.attempts else None
    times = [latest.time if latest else None, attempt.start_time if attempt and not attempt.end_time else None]
    return max((time.timestamp() for time in times if time is not None), default=None)


FIGURES = (
    Figure("dsft_run_attempt", "Number of the current attempt.", lambda status: status.attempt),
    Figure("dsft_run_step", "Optimizer steps done.", lambda status: status.progress and status.progress.step),
    Figure(
        "dsft_run_total_steps",
        "Optimizer steps in all.",
        lambda status: status.progress and status.progress.total_steps,
    ),
    Figure(
        "dsft_run_step_seconds",
        "Duration of an optimizer step, mean over the last ones.",
        lambda status: status.progress and status.progress.step_seconds,
    ),
    Figure(
        "dsft_run_tokens_per_second",
        "Tokens per second over all ranks.",
        lambda status: status.progress and status.progress.tokens_per_second,
    ),
    Figure("dsft_run_loss", "Training loss of the last step.", lambda status: status.progress and status.progress.loss),
    Figure(
        "dsft_run_last_progress_timestamp_seconds",
        "When the progress was measured.",
        lambda status: status.progress and _seconds(status.progress.updated_at),
    ),
    Figure(
        "dsft_run_last_checkpoint_timestamp_seconds",
        "When the newest checkpoint was committed; before the first one, when the attempt began.",
        _last_safe,
    ),
    Figure(
        "dsft_run_checkpoint_blocked_seconds",
        "How long training stood still for the newest checkpoint.",
        lambda status: status.checkpoints and status.checkpoints.blocked_seconds,
    ),
    Figure(
        "dsft_run_checkpoint_failures",
        "Saves in a row that failed up to now.",
        lambda status: status.checkpoints and status.checkpoints.failures,
    ),
    Figure(
        "dsft_run_goodput_ratio",
        "Share of the time, waits included, in steps that count.",
        lambda status: status.usage and status.usage.goodput,
    ),
    Figure(
        "dsft_run_wasted_gpu_seconds",
        "GPU seconds that trained nothing that is kept.",
        lambda status: status.usage and status.usage.wasted_gpu_seconds,
    ),
)


@dataclass(frozen=True)
class _Seen:
    """Of a run, what is told. Its whole status would be kilobytes."""

    phase: Phase
    wait: str | None
    figures: tuple[float | None, ...]


class RunMetrics(Collector):
    """The runs as the operator last saw them."""

    def __init__(self) -> None:
        self._seen: dict[Key, _Seen] = {}

    @property
    def known(self) -> Set[Key]:
        """The runs that something is told of."""
        return self._seen.keys()

    def saw(self, key: Key, status: FineTuneStatus) -> None:
        """A run is there, and this is its status."""
        phase = status.phase or Phase.PENDING
        over = status.completion_time is not None
        figures = tuple(None if over else figure.read(status) for figure in FIGURES)
        self._seen[key] = _Seen(phase, None if over else _wait(status), figures)

    def forget(self, key: Key) -> None:
        """A run is gone."""
        self._seen.pop(key, None)

    def clear(self) -> None:
        """Another replica sees the runs from now on."""
        self._seen.clear()

    def collect(self) -> Iterator[Metric]:
        """All of it, as Prometheus wants it."""
        by_phase = GaugeMetricFamily("dsft_runs", "Runs by phase, as the operator last saw them.", labels=["phase"])
        for phase in Phase:
            by_phase.add_metric([phase], sum(seen.phase is phase for seen in self._seen.values()))
        phases = GaugeMetricFamily("dsft_run_phase", "1 for the phase that a run is in.", labels=[*RUN, "phase"])
        waits = GaugeMetricFamily("dsft_run_waiting", "1 for the reason that a run waits for.", labels=[*RUN, "reason"])
        families = [GaugeMetricFamily(figure.name, figure.what, labels=RUN) for figure in FIGURES]
        for key, seen in self._seen.items():
            phases.add_metric([*key, seen.phase], 1)
            if seen.wait is not None:
                waits.add_metric([*key, seen.wait], 1)
            for family, value in zip(families, seen.figures, strict=True):
                if value is not None:
                    family.add_metric(key, value)
        yield from (by_phase, phases, waits, *families)


def count(before: FineTuneStatus, after: FineTuneStatus) -> None:
    """Count what a write of the status makes known: attempts that failed, and the end of the run."""
    known = {attempt.number for attempt in before.attempts if attempt.failure_class is not None}
    for attempt in after.attempts:
        if attempt.failure_class is not None and attempt.number not in known:
            FAILURES.labels(attempt.failure_class).inc()
    if after.completion_time is not None and before.completion_time is None:
        FINISHED.labels(after.phase or Phase.PENDING).inc()


def _wait(status: FineTuneStatus) -> str | None:
    ready = condition_of(status, ConditionType.CLUSTER_READY)
    return ready.reason if ready is not None and ready.status == "False" and ready.reason in WAITS else None
