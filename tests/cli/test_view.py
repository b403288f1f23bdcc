"""What `dsft run` prints while a run goes on: each event once, nothing twice."""

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import CheckpointRef, Checkpoints, EvaluationStatus, ProgressStatus, Usage
from dsft_cli.view import View, size, usage_line

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def checkpoint(step: int) -> CheckpointRef:
    uri = f"file:///runs/checkpoints/step-{step}"
    return CheckpointRef(uri=uri, step=step, world_size=2, bytes=1_400_000, time=NOW, digest="sha256:0")


def told(phase: TrainerPhase = TrainerPhase.TRAINING, *, from_step: int = 0, step: int = 0, **more: object) -> Progress:
    return Progress(
        seq=step,
        run_uid="0",
        attempt=1,
        phase=phase,
        from_step=from_step,
        progress=ProgressStatus(step=step, total_steps=24, loss=0.5, tokens_per_second=1234.5) if step else None,
        updated_at=NOW,
        **more,  # type: ignore[arg-type]
    )


def kept(*steps: int) -> Checkpoints:
    return Checkpoints(retained=tuple(checkpoint(step) for step in steps))


def printed(*documents: Progress, terminal: bool = False) -> list[str]:
    """The lines that a view of these documents prints."""
    text = io.StringIO()
    with View(Console(file=text, force_terminal=terminal, width=120)) as view:
        for document in documents:
            view.show(document)
    return text.getvalue().splitlines()


def test_each_checkpoint_is_one_line() -> None:
    lines = printed(
        told(step=6, checkpoints=kept(6)),
        told(step=7, checkpoints=kept(6)),
        told(step=12, checkpoints=kept(6, 12)),
        told(step=18, checkpoints=kept(12, 18)),
    )
    found = [line for line in lines if line.startswith("checkpoint ")]
    assert found == [f"checkpoint step {step} (1.4 MB) file:///runs/checkpoints/step-{step}" for step in (6, 12, 18)]


def test_a_save_that_failed_is_told_once() -> None:
    failed = Checkpoints(failures=1, failure="StorageDenied: cannot write s3://x [now]")
    lines = printed(
        told(step=6, checkpoints=failed),
        told(step=7, checkpoints=failed),
        told(step=12, checkpoints=kept(12)),
        told(step=18, checkpoints=failed),
    )
    line = "checkpoint failed, training goes on: StorageDenied: cannot write s3://x [now]"
    assert [told for told in lines if told.startswith("checkpoint failed")] == [line, line]


def test_checkpoints_from_before_a_resume_are_no_news() -> None:
    lines = printed(told(TrainerPhase.LOADING, from_step=6, checkpoints=kept(3, 6)), told(step=7, from_step=6))
    assert "resuming from step 6" in lines
    assert not [line for line in lines if line.startswith("checkpoint ")]


def test_each_evaluation_is_one_line() -> None:
    first = EvaluationStatus(step=8, metrics={"loss": 0.25, "accuracy": 0.75})
    second = EvaluationStatus(step=16, metrics={"loss": 0.125})
    lines = printed(
        told(step=8, evaluation=first),
        told(step=9, evaluation=first),
        told(step=16, evaluation=second),
        told(TrainerPhase.SUCCEEDED, step=24, evaluation=second),
    )
    assert [line for line in lines if line.startswith("evaluation ")] == [
        "evaluation at step 8: loss 0.2500, accuracy 0.7500",
        "evaluation at step 16: loss 0.1250",
    ]


def test_steps_are_told_now_and_then_where_no_bar_can_move() -> None:
    lines = printed(*(told(step=step) for step in range(1, 25)))
    assert lines == ["step 1/24  loss 0.5000  1,234 tokens/s"]


def test_on_a_terminal_a_bar_moves_instead() -> None:
    lines = printed(told(step=3), told(step=4, checkpoints=kept(4)), terminal=True)
    assert sum("step 4 (1.4 MB)" in line for line in lines) == 1


def test_slow_phases_say_what_they_do() -> None:
    lines = printed(
        told(TrainerPhase.LOADING, message="loading model and data"),
        told(TrainerPhase.LOADING, message="loading model and data"),
        told(TrainerPhase.EXPORTING, step=24, message="exporting the model"),
    )
    assert [line for line in lines if "ing " in line] == ["loading model and data", "exporting the model"]


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (136_400_000, "136.4 MB"), (2 * 10**15, "2000.0 TB")],
)
def test_sizes(count: int, words: str) -> None:
    assert size(count) == words


def test_where_the_time_went_is_told_in_a_line() -> None:
    usage = Usage(useful_seconds=3700, redone_seconds=61.4, waiting_seconds=0, restart_seconds=30, goodput=0.976)
    line = "98 %: useful 1h01m, trained again or lost 1m01s, starting 0m30s"
    assert usage_line(usage) == line
    costs = usage.model_copy(update={"gpu_seconds": 36000, "wasted_gpu_seconds": 900})
    assert usage_line(costs) == f"{line}; 10.0 GPU hours, 0.2 of them wasted"
