"""The live view of a run: one line per event, and a bar with step, loss, tokens per second and ETA.

On a terminal the bar moves; elsewhere (a pipe, CI) a line is printed now and then instead. Writes to standard error, so that
`--output json` leaves standard output to the result.
"""

import time
from datetime import UTC, datetime
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import CheckpointRef, Checkpoints, Usage

LINE_SECONDS = 10.0


class View:
    """Shows progress documents as they come; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID = self._bar.add_task("starting", total=None, text="")
        self._phase: TrainerPhase | None = None
        self._checkpoints: set[str] = set()
        self._failed_saves: int | None = None
        self._evaluated = 0
        self._restarts = 0
        self._printed = 0.0

    def __enter__(self) -> "View":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, highlight=False)

    def show(self, progress: Progress) -> None:
        """Show what is new in a document."""
        if progress.restarts > self._restarts:
            self._restarts = progress.restarts
            self.say(f"[yellow]ranks lost[/], starting them again: {escape(progress.message or '')}")
        if progress.phase is not self._phase:
            self._phase = progress.phase
            if progress.phase in (TrainerPhase.LOADING, TrainerPhase.EXPORTING):
                self.say(f"[dim]{progress.message or progress.phase}[/]")
            if progress.phase is TrainerPhase.LOADING and progress.from_step:
                self.say(f"resuming from step {progress.from_step}")
        self._show_evaluation(progress)
        self._show_checkpoints(progress)
        self._show_step(progress)

    def _show_evaluation(self, progress: Progress) -> None:
        evaluation = progress.evaluation
        if evaluation is not None and evaluation.step > self._evaluated:
            self._evaluated = evaluation.step
            values = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
            self.say(f"[cyan]evaluation[/] at step {evaluation.step}: {values}")
            if evaluation.samples:
                self.say(f"[dim]samples in {escape(evaluation.samples)}[/]")

    def _show_checkpoints(self, progress: Progress) -> None:
        checkpoints = progress.checkpoints or Checkpoints()
        if checkpoints.failures != self._failed_saves:
            self._failed_saves = checkpoints.failures
            if checkpoints.failures:
                self.say(f"[red]checkpoint failed[/], training goes on: {escape(checkpoints.failure or '')}")
        for checkpoint in checkpoints.retained:
            if checkpoint.uri not in self._checkpoints:
                self._checkpoints.add(checkpoint.uri)
                if checkpoint.step > progress.from_step:
                    self.say(f"[green]checkpoint[/] {checkpoint_line(checkpoint)}")

    def _show_step(self, progress: Progress) -> None:
        step = progress.progress
        if step is None:
            self._bar.update(self._task, description=str(progress.phase))
            return
        parts = [f"step {step.step}/{step.total_steps}"]
        if step.loss is not None:
            parts.append(f"loss {step.loss:.4f}")
        if step.tokens_per_second is not None:
            parts.append(f"{step.tokens_per_second:,.0f} tokens/s")
        if step.eta is not None:
            parts.append(f"ETA {_duration((step.eta - datetime.now(UTC)).total_seconds())}")
        text = "  ".join(parts)
        self._bar.update(
            self._task, description=str(progress.phase), total=step.total_steps, completed=step.step, text=text
        )
        if not self._console.is_terminal and time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            self.say(text)


def checkpoint_line(checkpoint: CheckpointRef) -> str:
    """A checkpoint in words."""
    return f"step {checkpoint.step} ({size(checkpoint.bytes)}) {checkpoint.uri}"


def size(count: int) -> str:
    """Bytes in words: 136.4 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def usage_line(usage: Usage) -> str:
    """Where the time of a run went, in words."""
    parts = (
        ("useful", usage.useful_seconds),
        ("trained again or lost", usage.redone_seconds),
        ("waiting", usage.waiting_seconds),
        ("stopped for saves", usage.blocked_seconds),
        ("starting", usage.restart_seconds),
    )
    text = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts if seconds)
    share = f"{100 * usage.goodput:.0f} %: " if usage.goodput is not None else ""
    hours, wasted = (usage.gpu_seconds or 0.0) / 3600, (usage.wasted_gpu_seconds or 0.0) / 3600
    return share + text + (f"; {hours:.1f} GPU hours, {wasted:.1f} of them wasted" if usage.gpu_seconds else "")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
