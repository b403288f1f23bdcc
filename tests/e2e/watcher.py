"""One run as its user sees it: `kubectl get dsft NAME -w` into a file, and its status twice a second.

Both outlive an API server that is down for a while. A user would start the command again, and so does this.
"""

import subprocess
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from dsft_api.status import FineTuneStatus
from tests.e2e.tenant import POLL_SECONDS, Tenant

END_SECONDS = 30.0


@dataclass(frozen=True)
class Look:
    """The status at a time."""

    at: datetime
    status: FineTuneStatus

    @property
    def step(self) -> int:
        """The step that is told."""
        return self.status.progress.step if self.status.progress is not None else 0

    @property
    def committed(self) -> int:
        """The step of the newest commit that is told."""
        told = self.status.checkpoints
        return told.latest.step if told is not None and told.latest is not None else 0


class Watcher:
    """A context manager. `looks` grows meanwhile."""

    def __init__(self, tenant: Tenant, name: str, log: Path) -> None:
        self.looks: list[Look] = []
        self._tenant = tenant
        self._name = name
        self._log = log
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watcher-{name}", daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(END_SECONDS)

    @property
    def table(self) -> str:
        """What the command has printed."""
        return self._log.read_text()

    def _run(self) -> None:
        with self._log.open("wb") as stream:
            command = self._command(stream)
            try:
                while not self._stop.wait(POLL_SECONDS):
                    # Not while nobody would answer it.
                    if self._look() and command.poll() is not None:
                        command = self._command(stream)
            finally:
                command.kill()
                command.wait(END_SECONDS)

    def _command(self, stream: IO[bytes]) -> "subprocess.Popen[bytes]":
        argv = self._tenant.kubectl.argv("get", "dsft", self._name, "--watch")
        return subprocess.Popen(argv, stdout=stream, stderr=stream)

    def _look(self) -> bool:
        """Whether there was something to see."""
        try:
            status = self._tenant.status(self._name)
        except (ApiException, HTTPError):
            # The API server is down, or the run is gone.
            return False
        self.looks.append(Look(datetime.now(UTC), status))
        return True


def phases(table: str) -> list[str]:
    """The phases that a table of `kubectl get dsft` went through."""
    rows = [line.split() for line in table.splitlines()]
    told = [row[1] for row in rows if len(row) > 1 and row[1] != "PHASE" and row[1][0].isupper()]
    return [phase for phase, before in zip(told, [None, *told], strict=False) if phase != before]
