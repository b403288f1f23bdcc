"""program.source: the user's code from an archive or a Git commit, held to its digest, fetched once per node, first on the path.

What is unpacked was written by somebody else: files and folders only, below their own folder, and no more than there is room for.
"""

import fcntl
import hashlib
import importlib
import io
import os
import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.spec.identity import ProgramSource
from dsft_api.spec.placement import StorageSpec
from dsft_trainer.ask import RAY_ADDRESS_ENV
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.errors import TrainerError

ARCHIVE, GIT = "spec.program.source.archive", "spec.program.source.git"
MAX_ARCHIVE_BYTES = 256 * 2**20
MAX_UNPACKED_BYTES = 2**30
MAX_FILES = 20_000

_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def use_source(job: Job) -> None:
    """Put the root of the code first on the path of this process and of those that it starts. Nothing without `program.source`.

    Raises:
        TrainerError: ConfigInvalid for an archive or commit that is not there, is another one, or is not safe to unpack.
    """
    source = job.spec.program.source if job.spec.program is not None else None
    if source is None:
        return
    folder = str(unpacked(source, job.spec.storage, _root()))
    if folder not in sys.path:
        sys.path.insert(0, folder)
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != folder]
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *others])
    # A rank on another node began with a path to a folder that was not there yet, and remembers that.
    importlib.invalidate_caches()


def unpacked(source: ProgramSource, storage: StorageSpec, root: Path) -> Path:
    """The folder of the code below `root`, which processes of one machine share: the first one makes it.

    Raises:
        TrainerError: as `use_source`.
    """
    pin = source.digest or source.rev
    assert pin is not None, "a rule of the spec"  # noqa: S101
    target = root / pin.removeprefix("sha256:")
    with (root / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=root, prefix=".new-") as name:
            folder = Path(name) / "code"
            folder.mkdir()
            _write_all(source, _members(source, storage, Path(name)), folder)
            folder.rename(target)
    return target


# A member: its name, its size, and its content; None of a folder, and a negative size of what is neither file nor folder.
_Member = tuple[str, int, IO[bytes] | None]
_LINK = -1


def _members(source: ProgramSource, storage: StorageSpec, folder: Path) -> Iterator[_Member]:
    """What is to be written, from what is fetched into `folder` first."""
    if source.git is not None and source.rev is not None:
        # Seldom wanted, and it takes a while.
        from dsft_trainer.git_source import commit_files

        for path, content in commit_files(source.git, source.rev, folder / "git", MAX_ARCHIVE_BYTES):
            yield path, len(content), io.BytesIO(content)
        return
    assert source.archive is not None, "a rule of the spec"  # noqa: S101
    archive = folder / "archive"
    _download(source.archive, storage, archive)
    _check_digest(source.archive, archive, source.digest)
    yield from _zip_members(archive) if source.archive.endswith(".zip") else _tar_members(archive)


def _root() -> Path:
    """A folder of this user's alone: what lies in it is run."""
    # On a cluster the same path on every node, head and workers: PYTHONPATH names it for what the ranks start.
    on_cluster = RAY_ADDRESS_ENV in os.environ
    scratch = tempfile.gettempdir() if on_cluster else os.environ.get("DSFT_SCRATCH", tempfile.gettempdir())
    root = Path(scratch) / f"dsft-programs-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"{root} is not a folder of this user's alone",
            "remove it",
        )
    return root


def _download(uri: str, storage: StorageSpec, path: Path) -> None:
    parent, _, name = uri.rpartition("/")
    store = open_store(parent, endpoint_url=storage.endpoint_url, region=storage.region)
    key = unquote(name) if uri.startswith("file:") else name
    entry = store.entry(key)
    if entry is None:
        raise _refused(uri, "does not exist", "correct it, or upload the archive")
    if entry.size > MAX_ARCHIVE_BYTES:
        raise _refused(
            uri, f"has {entry.size} bytes, and {MAX_ARCHIVE_BYTES} are the most", "leave out what is not code"
        )
    store.get_file(key, path)


def _check_digest(uri: str, path: Path, digest: str | None) -> None:
    with path.open("rb") as stream:
        found = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    if found != digest:
        raise _refused(uri, f"is {found}, not {digest}", "upload the archive that was meant, or write its digest")


def _write_all(source: ProgramSource, members: Iterator[_Member], target: Path) -> None:
    uri = source.archive or source.git or ""
    room = MAX_UNPACKED_BYTES
    try:
        for count, (name, size, content) in enumerate(members, start=1):
            room -= size
            if room < 0 or count > MAX_FILES:
                most = f"{MAX_UNPACKED_BYTES} bytes in {MAX_FILES} files are the most"
                raise _refused(uri, f"is too large unpacked: {most}", "leave out what is not code")
            _write(uri, target, name, size, content)
    except _BROKEN as error:
        raise _refused(uri, f"cannot be unpacked: {error}", "make it anew: git archive --format=tar.gz REV") from error


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.isfile():
                yield member.name, member.size, tar.extractfile(member)
            else:
                yield member.name, 0 if member.isdir() else _LINK, None


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as packed:
        for info in packed.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                yield info.filename, _LINK, None
            elif info.is_dir():
                yield info.filename, 0, None
            else:
                with packed.open(info) as content:
                    yield info.filename, info.file_size, content


def _write(uri: str, target: Path, name: str, size: int, content: IO[bytes] | None) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise _refused(uri, f"has a member that leads out of it: {name!r}", "make it anew, from its folder")
    if size < 0:
        raise _refused(uri, f"has a member that is no file and no folder: {name!r}", "put the file itself there")
    place = target / path
    if content is None:
        place.mkdir(parents=True, exist_ok=True)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with place.open("wb") as stream:
        # No more than was announced, whatever the archive says later.
        while left > 0 and (part := content.read(min(left, 2**20))):
            stream.write(part)
            left -= len(part)


def _refused(uri: str, problem: str, remedy: str) -> TrainerError:
    field = ARCHIVE if uri.startswith(("s3:", "file:")) else GIT
    return TrainerError(FailureClass.CONFIG_INVALID, f"{field}: {uri} {problem}", remedy)
