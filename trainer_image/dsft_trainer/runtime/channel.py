"""Files by which ranks and their launcher on one machine talk: progress out; a drain or a save, in; failures out.

Every write is atomic, so a reader never sees half a document. Under Ray the same files are written by one actor on the
driver's node (see `runtime.ray`), since ranks may be on other machines.
"""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dsft_api.conditions import FailureClass
from dsft_api.progress import PROGRESS_FILE, Progress, TrainerFailure

ECHOES = (FailureClass.UNKNOWN, FailureClass.WORKER_LOST)
"""Classes that are often only the echo of another rank's failure."""


@dataclass(frozen=True)
class Channel:
    """A folder on the launcher's machine."""

    folder: Path

    def publish(self, progress: str) -> None:
        """Replace the progress document."""
        self._write(PROGRESS_FILE, progress)

    def progress(self) -> Progress | None:
        """The last document; None if there is none."""
        path = self.folder / PROGRESS_FILE
        return Progress.model_validate_json(path.read_text()) if path.exists() else None

    def request_drain(self) -> None:
        """Ask the ranks to commit at the next step boundary and stop."""
        if not self.drain_requested():
            self._write("drain", "")

    def drain_requested(self) -> bool:
        """Whether somebody asked for a drain."""
        return self.drain_time() is not None

    def drain_time(self) -> datetime | None:
        """When somebody first asked for a drain; None if nobody did."""
        path = self.folder / "drain"
        return datetime.fromtimestamp(path.stat().st_mtime, UTC) if path.exists() else None

    def listen(self) -> None:
        """Say that the ranks look whether something is asked of them: it helps to ask, and to wait."""
        self._write("listens", "")

    def listens(self) -> bool:
        """Whether the ranks look whether something is asked of them."""
        return (self.folder / "listens").exists()

    def request_save(self, value: str) -> None:
        """Ask the ranks for a checkpoint at the next step boundary. `value` is what they answer with once it is committed."""
        self._write("save", value)

    def save_requested(self) -> str | None:
        """The value of the last request for a checkpoint, if there was one."""
        path = self.folder / "save"
        return path.read_text() if path.exists() else None

    def fail(self, failure: TrainerFailure) -> None:
        """Record why a rank died."""
        self._write(f"failure-{failure.rank}.json", failure.model_dump_json(by_alias=True))

    def failure(self) -> TrainerFailure | None:
        """The failure that explains the others: the oldest one that is not an echo, else the oldest."""
        paths = sorted(self.folder.glob("failure-*.json"), key=lambda path: path.stat().st_mtime_ns)
        failures = [TrainerFailure.model_validate_json(path.read_text()) for path in paths]
        causes = [failure for failure in failures if failure.failure_class not in ECHOES]
        return next(iter([*causes, *failures]), None)

    def reset(self) -> None:
        """Forget the attempt before this one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (PROGRESS_FILE, "drain", "save", "listens"):
            (self.folder / name).unlink(missing_ok=True)
        self.forget_failures()

    def forget_failures(self) -> None:
        """Forget why the ranks died: they are about to start again."""
        for path in self.folder.glob("failure-*.json"):
            path.unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}"
        temporary.write_text(text)
        temporary.replace(self.folder / name)
