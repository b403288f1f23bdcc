"""Files of a checkpoint on their way to storage and back: a manifest keeps sizes and SHA-256, which are checked at reading."""

import hashlib
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

from dsft_trainer.checkpoint.commits import CommittedFile
from dsft_trainer.checkpoint.store import SMALL_BYTES, ObjectMissingError, Store, get_files, in_parallel

log = logging.getLogger(__name__)
# Two make a digest of more bytes in a second than one process uploads.
_DIGESTS = 2


def upload(store: Store, folder: Path, key: str, rank: int) -> tuple[CommittedFile, ...]:
    """Move all files below `folder` to `key`/; what a manifest says of them. `folder` may lose them.

    The digest of a large file is made while it is on its way: neither waits for the other.
    """
    with ThreadPoolExecutor(_DIGESTS, thread_name_prefix="digest") as pool:

        def send(path: Path) -> CommittedFile:
            name, size = path.relative_to(folder).as_posix(), path.stat().st_size
            # Opened here, since the store may move the file.
            with path.open("rb") as stream:
                digest = _sha256(stream) if size < SMALL_BYTES else pool.submit(_sha256, stream)
                store.put_file(path, f"{key}/{name}")
                sha256 = digest if isinstance(digest, str) else digest.result()
                return CommittedFile(path=name, size=size, sha256=sha256, rank=rank)

        return tuple(in_parallel(send, sorted(path for path in folder.rglob("*") if path.is_file())))


def missing(store: Store, key: str, files: Iterable[CommittedFile]) -> list[str]:
    """Those that are not listed below `key`/ in their size."""
    sizes = {entry.key: entry.size for entry in store.list(f"{key}/")}
    return [file.path for file in files if sizes.get(f"{key}/{file.path}") != file.size]


def fetch(store: Store, key: str, files: Iterable[CommittedFile], folder: Path) -> bool:
    """Download files from `key`/ to `folder`; False if one is missing or differs, twice: the first may be this node's fault."""
    wanted = list(files)
    for _ in range(2):
        try:
            get_files(store, [(f"{key}/{file.path}", folder / file.path) for file in wanted])
        except ObjectMissingError:
            return False
        wanted = [file for file in wanted if not _is_whole(folder / file.path, file)]
        if not wanted:
            return True
        log.warning("%s differ from their checksums below %s/%s", [file.path for file in wanted], store.uri, key)
    return False


def _is_whole(path: Path, file: CommittedFile) -> bool:
    return path.stat().st_size == file.size and _has_digest(path, file.sha256)


def _has_digest(path: Path, digest: str) -> bool:
    with path.open("rb") as stream:
        return _sha256(stream) == digest


def _sha256(stream: BufferedReader) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()
