"""A temporary folder with running processes in it, of which nothing stays: not even when its owner is killed.

The owner holds a lock that the kernel gives back at its death; the next one to make such a folder clears up after it.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cluster.processes import end_recorded

_MARK = "owned"


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Make a folder of ours, and remove it at the end with what a killed owner of the same prefix left."""
    _clear_up(prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only now may others ask whether we live.
        (folder / _MARK).touch()
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _clear_up(prefix: str) -> None:
    for mark in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_MARK}"):
        # Another one may clear up too.
        with suppress(FileNotFoundError):
            if mark.stat().st_uid == os.getuid():
                _remove_if_abandoned(mark.parent)


def _remove_if_abandoned(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder)
    except BlockingIOError:
        pass  # its owner lives
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    for record in folder.rglob("*.pid"):
        end_recorded(record.parent)
    shutil.rmtree(folder, ignore_errors=True)
