"""The store on a file system: a volume that all pods share, or a folder of this machine.

An object is written to a temporary file, synced, and only then given its name, so a crash at any point leaves either
nothing or all of it.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self
from uuid import uuid4

from tenacity import retry, retry_if_exception_type, stop_after_attempt
from typing_extensions import override

from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint.store import COMMIT, Entry, ObjectMissingError, Store, check_key
from dsft_trainer.errors import TrainerError

_TEMPORARY = ".tmp"
_STRAY_SECONDS = 24 * 3600.0

_ACCESS = "give the trainer's user write access to the folder (securityContext.fsGroup on Kubernetes)"
_SPACE = "free space there, or lower spec.checkpoint.keepLast"
_FOLDER = "correct spec.storage.uri: it must name a folder"
_REMEDIES = {
    errno.EACCES: _ACCESS,
    errno.EPERM: f"{_ACCESS}; the file system must allow hard links",
    errno.EOPNOTSUPP: "use a file system that allows hard links",
    errno.EROFS: "mount the volume read-write, or choose another folder in spec.storage.uri",
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.ENOTDIR: _FOLDER,
    errno.EEXIST: _FOLDER,
    errno.ENAMETOOLONG: _FOLDER,
}


class FileStore(Store):
    """Objects are files below `root`, on one file system. `Store` says what is promised."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = root.as_uri()
        self._swept = False

    @override
    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        path = self._path(key)
        with _explained("write", path), self._temporary() as temporary:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return self._publish(temporary, path, if_absent=if_absent)

    @override
    def get_bytes(self, key: str, *, first: int | None = None) -> bytes | None:
        path = self._path(key)
        with _explained("read", path), suppress(FileNotFoundError), path.open("rb") as file:
            return file.read(first)
        return None

    @override
    def put_file(self, path: Path, key: str) -> None:
        destination = self._path(key)
        with _explained("write", destination):
            _sync(path)
            try:
                self._publish(path, destination)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                with self._temporary() as temporary:
                    shutil.copyfile(path, temporary)
                    _sync(temporary)
                    self._publish(temporary, destination)

    @override
    def get_file(self, key: str, path: Path) -> None:
        source = self._path(key)
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        with _explained("copy", source):
            if not source.is_file():
                raise ObjectMissingError(source.as_uri())
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source, temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    @override
    def folders(self) -> list[str]:
        with _explained("list", self.root), suppress(FileNotFoundError):
            return sorted(path.name for path in self.root.iterdir() if path.is_dir() and path.name != _TEMPORARY)
        return []

    @override
    def list(self, prefix: str = "") -> list[Entry]:
        top = self.root / check_key(prefix.rstrip("/")) if prefix else self.root
        entries = []
        with _explained("list", top):
            for folder, folders, files in os.walk(top, onerror=_unless_gone):
                if Path(folder) == self.root and _TEMPORARY in folders:
                    folders.remove(_TEMPORARY)
                for path in (Path(folder, name) for name in files):
                    # A file that is deleted while we look is not there.
                    with suppress(FileNotFoundError):
                        entries.append(Entry(path.relative_to(self.root).as_posix(), path.stat().st_size))
        return sorted(entries, key=lambda entry: entry.key)

    @override
    def entry(self, key: str) -> Entry | None:
        path = self.root / check_key(key)
        with _explained("read", path):
            return Entry(key, path.stat().st_size) if path.is_file() else None

    @override
    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            with _explained("delete", path), suppress(FileNotFoundError):
                path.unlink()
                if path.name == COMMIT:
                    _sync(path.parent)
            self._remove_empty(path.parent)

    @override
    def impatient(self) -> Self:
        return self

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A path for a file that is not listed; what is left there is removed."""
        folder = self.root / _TEMPORARY
        _make_folder(folder)
        if not self._swept:
            self._swept = True
            _sweep(folder)
        path = folder / uuid4().hex
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    # Another process removes a folder when it deletes the last key in it: then it is made again.
    @retry(retry=retry_if_exception_type(FileNotFoundError), stop=stop_after_attempt(20), reraise=True)
    def _publish(self, source: Path, path: Path, *, if_absent: bool = False) -> bool:
        """Give the synced file `source` its name; False if `if_absent` and the name is taken."""
        _make_folder(path.parent)
        if if_absent:
            return self._link(source, path)
        source.replace(path)
        _sync_names(path.parent)
        return True

    def _link(self, source: Path, path: Path) -> bool:
        try:
            path.hardlink_to(source)
        except FileExistsError:
            # NFS repeats a request whose reply was lost: then the name that is in the way is our own.
            if source.stat().st_nlink == 1:
                return False
        _sync_names(path.parent)
        return True

    def _remove_empty(self, folder: Path) -> None:
        while folder != self.root and folder.is_relative_to(self.root):
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


def _make_folder(path: Path) -> None:
    """Make a folder and its parents so that they outlast a power loss."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    # A file in the way shows in the next step, as ENOTDIR; asking here could see what another process just changed.
    with suppress(FileExistsError):
        path.mkdir()
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    # Gone already: what was just named there has been deleted since, and must not be named again.
    with suppress(FileNotFoundError):
        _sync(folder)


def _sweep(folder: Path) -> None:
    """Remove what killed writers left; a file this old has no living writer."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _STRAY_SECONDS:
                path.unlink()


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextmanager
def _explained(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a TrainerError that says what to do."""
    try:
        yield
    except OSError as error:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
        message = f"cannot {action} {path.as_uri()}: {error.strerror or error}" + (f" ({names})" if names else "")
        remedy = _REMEDIES.get(error.errno or 0)
        raise TrainerError(FailureClass.STORAGE_DENIED if remedy else FailureClass.UNKNOWN, message, remedy) from error
