"""What driver and ranks print, brought to storage all the time: a pod's log goes with the pod.

The end of it is what explains a failure, so an object holds the last part, replaced as a whole. Nothing waits for it, and a run
does not die of it.
"""

import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dsft_api.job import Job
from dsft_api.layout import attempt_logs
from dsft_api.progress import Progress
from dsft_trainer.bounded import within
from dsft_trainer.checkpoint.store import Store, store_of

log = logging.getLogger(__name__)

SHIP_SECONDS = 30.0
TAIL_BYTES = 2**20
LAST_LINES = 50
KEEP_SECONDS = 15.0


def output_files() -> tuple[Path, ...]:
    """The files that standard output and error of this process go to; none where they are no files."""
    targets = dict.fromkeys(Path(os.path.realpath(f"/proc/self/fd/{descriptor}")) for descriptor in (1, 2))
    return tuple(target for target in targets if target.is_file())


def log_name(rank: int, opening: Progress) -> str:
    """What a rank's files are called: each start inside an attempt has its own."""
    return f"rank-{rank}" + (f"-start-{opening.restarts + 1}" if opening.restarts else "")


class LogShipper:
    """Uploads the end of some files every `seconds` where they have grown, and once more when it is closed."""

    def __init__(self, store: Store, key: str, files: Sequence[Path], seconds: float = SHIP_SECONDS) -> None:
        self._store = store
        self._key = key
        self._files = files
        self._seconds = seconds
        self._shipped: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)

    @staticmethod
    def of(job: Job, store: Store, name: str, files: Sequence[Path]) -> "LogShipper":
        """That of one process of an attempt."""
        return LogShipper(store.impatient(), f"{attempt_logs(job.attempt)}/{name}.log", files)

    def __enter__(self) -> "LogShipper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._ship()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._ship()

    def _ship(self) -> None:
        try:
            sizes = [file.stat().st_size for file in self._files]
            if sizes != self._shipped:
                self._store.put_bytes(self._key, b"".join(_tail(file) for file in self._files))
                self._shipped = sizes
        except Exception as error:  # noqa: BLE001  a log is a courtesy
            # Not louder: the warning would be news to ship.
            log.debug("%s could not be written: %s", self._key, error)


def keep_last_lines(job: Job, name: str, files: Sequence[Path]) -> str | None:
    """Put the last lines that a process printed beside the attempt's logs; where they are, None where storage fails."""
    key = f"{attempt_logs(job.attempt)}/last-lines-{name}.txt"

    def keep() -> str:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        store = store_of(job).impatient()
        store.put_bytes(key, b"".join(_last_lines(file) for file in files))
        return f"{store.uri}/{key}"

    return within(KEEP_SECONDS, keep)


def _last_lines(file: Path) -> bytes:
    return b"".join(_tail(file).splitlines(keepends=True)[-LAST_LINES:])


def _tail(file: Path) -> bytes:
    """The last part of a file, from the beginning of a line."""
    with file.open("rb") as stream:
        left_out = stream.seek(0, os.SEEK_END) - TAIL_BYTES
        if left_out <= 0:
            stream.seek(0)
            return stream.read()
        stream.seek(left_out)
        stream.readline()
        return b"[the beginning is left out]\n" + stream.read()
