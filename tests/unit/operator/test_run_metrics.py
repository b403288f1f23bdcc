"""What Prometheus hears about runs."""

from datetime import timedelta

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from dsft_api.conditions import ConditionType, FailureClass, Phase, Reason
from dsft_api.status import Attempt, CheckpointRef, Checkpoints, Condition, FineTuneStatus, ProgressStatus, Usage
from dsft_operator.ports import Key
from dsft_operator.runtime.run_metrics import FIGURES, RunMetrics, count
from tests.unit.operator.situations import NOW

KEY = Key("ml", "chat")
RUN = {"namespace": "ml", "name": "chat"}


def status(**fields: object) -> FineTuneStatus:
    return FineTuneStatus.model_validate({"phase": Phase.RUNNING, **fields})


def waiting(reason: str) -> Condition:
    return Condition(type=ConditionType.CLUSTER_READY, status="False", reason=reason, last_transition_time=NOW)


TRAINS = status(
    attempt=2,
    attempts=(Attempt(number=2, start_time=NOW),),
    progress=ProgressStatus(
        step=5, total_steps=10, step_seconds=0.5, tokens_per_second=100.0, loss=1.5, updated_at=NOW
    ),
    checkpoints=Checkpoints(blocked_seconds=0.25, failures=1),
    usage=Usage(goodput=0.75, wasted_gpu_seconds=3.0),
)


@pytest.fixture
def metrics() -> RunMetrics:
    return RunMetrics()


def value(metrics: RunMetrics, metric: str, /, **labels: str) -> float | None:
    registry = CollectorRegistry()
    registry.register(metrics)
    return registry.get_sample_value(metric, labels)


def test_a_run_that_trains_tells_every_figure(metrics: RunMetrics) -> None:
    metrics.saw(KEY, TRAINS)
    told = {figure.name: value(metrics, figure.name, **RUN) for figure in FIGURES}
    assert told == {
        "dsft_run_attempt": 2.0,
        "dsft_run_step": 5.0,
        "dsft_run_total_steps": 10.0,
        "dsft_run_step_seconds": 0.5,
        "dsft_run_tokens_per_second": 100.0,
        "dsft_run_loss": 1.5,
        "dsft_run_last_progress_timestamp_seconds": NOW.timestamp(),
        "dsft_run_last_checkpoint_timestamp_seconds": NOW.timestamp(),
        "dsft_run_checkpoint_blocked_seconds": 0.25,
        "dsft_run_checkpoint_failures": 1.0,
        "dsft_run_goodput_ratio": 0.75,
        "dsft_run_wasted_gpu_seconds": 3.0,
    }
    assert value(metrics, "dsft_run_phase", **RUN, phase="Running") == 1
    assert value(metrics, "dsft_runs", phase="Running") == 1
    assert value(metrics, "dsft_runs", phase="Failed") == 0


def test_what_a_status_lacks_is_not_told_as_zero(metrics: RunMetrics) -> None:
    metrics.saw(KEY, FineTuneStatus())
    assert [figure.name for figure in FIGURES if value(metrics, figure.name, **RUN) is not None] == []
    assert value(metrics, "dsft_run_phase", **RUN, phase="Pending") == 1


def test_the_age_of_a_checkpoint_counts_from_the_attempt_if_that_is_newer(metrics: RunMetrics) -> None:
    old, new = NOW - timedelta(hours=9), NOW + timedelta(hours=1)
    ref = {"uri": "s3://b/c", "step": 1, "world_size": 1, "bytes": 1, "digest": "sha256:0"}
    for time, expected in ((old, NOW), (new, new)):
        checkpoints = Checkpoints(latest=CheckpointRef.model_validate({**ref, "time": time}))
        metrics.saw(KEY, TRAINS.model_copy(update={"checkpoints": checkpoints}))
        assert value(metrics, "dsft_run_last_checkpoint_timestamp_seconds", **RUN) == expected.timestamp()


def test_a_wait_is_told_while_it_lasts(metrics: RunMetrics) -> None:
    metrics.saw(KEY, status(conditions=(waiting(Reason.NEVER_FITS),)))
    assert value(metrics, "dsft_run_waiting", **RUN, reason="NeverFits") == 1
    metrics.saw(KEY, TRAINS)
    assert value(metrics, "dsft_run_waiting", **RUN, reason="NeverFits") is None


def test_a_run_that_is_over_has_its_phase_only_and_one_that_is_gone_nothing(metrics: RunMetrics) -> None:
    metrics.saw(KEY, TRAINS.model_copy(update={"phase": Phase.FAILED, "completion_time": NOW}))
    assert value(metrics, "dsft_run_phase", **RUN, phase="Failed") == 1
    assert value(metrics, "dsft_run_loss", **RUN) is None
    metrics.forget(KEY)
    assert value(metrics, "dsft_run_phase", **RUN, phase="Failed") is None
    assert metrics.known == set()


def test_failures_and_ends_are_counted_once() -> None:
    def totals() -> tuple[float, float]:
        hangs = REGISTRY.get_sample_value("dsft_attempts_failed_total", {"class": "Hang"})
        ends = REGISTRY.get_sample_value("dsft_runs_finished_total", {"phase": "Failed"})
        assert hangs is not None
        assert ends is not None
        return hangs, ends

    failed = (Attempt(number=2, start_time=NOW, failure_class=FailureClass.HANG),)
    after = TRAINS.model_copy(update={"attempts": failed})
    over = after.model_copy(update={"phase": Phase.FAILED, "completion_time": NOW})
    hangs, ends = totals()
    count(TRAINS, after)
    assert totals() == (hangs + 1, ends)
    count(after, over)
    count(over, over)
    assert totals() == (hangs + 1, ends + 1)
